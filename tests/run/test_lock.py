from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumina.errors import UserError
from lumina.run.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from lumina.run.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `tmp_path/lock`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError) as error, RunLock(tmp_path / "lock"):
        pytest.fail("two holders")
    assert f"{tmp_path}: in use by process {holder.pid} on {socket.gethostname()} since 2" in error.value.message
    assert "--fresh" in error.value.fix


def test_a_killed_holder_leaves_nothing_to_clear(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert str(holder.pid) in (tmp_path / "lock").read_text()
    with RunLock(tmp_path / "lock"):
        assert f'"pid": {os.getpid()}' in (tmp_path / "lock").read_text()


def test_one_process_cannot_hold_a_run_twice_but_again(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path / "lock"), pytest.raises(UserError, match=f"process {os.getpid()}"):
            RunLock(tmp_path / "lock").__enter__()
        assert (tmp_path / "lock").read_text() == ""


def test_a_holder_that_has_not_signed_yet_still_holds(tmp_path: Path) -> None:
    with RunLock(tmp_path / "lock"):
        (tmp_path / "lock").write_text("")
        with pytest.raises(UserError, match="in use by another process"):
            RunLock(tmp_path / "lock").__enter__()
