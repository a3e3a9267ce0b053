"""Whoever reads what a run says may go away, before it or in the middle: the run goes on, and its exit code is true."""

from __future__ import annotations

import errno
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import ended, until, write_text

from lumina.cli import main
from lumina.events import read_events

TRAIN = [sys.executable, "-m", "lumina", "train", "tiny", "data.train=text.txt", "checkpoint.every=0"]
FOR_EVER = "train.steps=100000"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    return tmp_path


@pytest.fixture
def unread() -> Iterator[int]:
    """A pipe whose reader is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def log(here: Path) -> Path | None:
    """The events of the only run, once a step is told."""
    logs = [path for path in here.glob("runs/*/events.jsonl") if any(e["t"] == "step" for e in read_events(path))]
    return logs[0] if logs else None


def last(here: Path) -> dict[str, Any]:
    (path,) = here.glob("runs/*/events.jsonl")
    return [*read_events(path)][-1]


@pytest.mark.parametrize("how", [[], ["--json"], ["--quiet"], ["--supervise", "--json"]], ids=" ".join)
def test_a_run_that_nobody_reads_is_finished_and_that_is_said_once(how: list[str], here: Path, unread: int) -> None:
    process = subprocess.Popen([*TRAIN, "train.steps=3", *how], stdout=unread, stderr=subprocess.PIPE, text=True)
    _, err = ended(process)
    assert process.returncode == 0, err
    assert (last(here)["t"], last(here)["reason"], last(here)["attempt"]) == ("end", "done", 0)
    (path,) = here.glob("runs/*/log.txt")
    assert "[Step 3]" in path.read_text()
    assert err.count("\n") == 1
    assert err.startswith("! standard output: Broken pipe; nothing more is written there, and the work goes on")


@pytest.mark.parametrize("how", [[], ["--json"], ["--supervise"]], ids=" ".join)
def test_a_run_that_nobody_reads_is_stopped_with_its_state_saved(how: list[str], here: Path, unread: int) -> None:
    """As in `lumina train 2>&1 | head`: what a signal makes it say is refused, too."""
    process = subprocess.Popen([*TRAIN, FOR_EVER, *how], stdout=unread, stderr=unread, text=True)
    until(lambda: log(here), process)
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert process.returncode == 3
    assert (last(here)["reason"], last(here)["signal"]) == ("stopped", "SIGTERM")
    assert [*here.glob("runs/*/checkpoints/latest/COMPLETE")]


# A shell gives a terminal to what it starts.
WITH_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # not as under `nohup`
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, sys.argv[1:])
"""


def test_a_terminal_that_closes_saves_and_stops(here: Path) -> None:
    """It sends SIGHUP, and refuses what is said from then on."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    command = [sys.executable, "-c", WITH_TERMINAL, *TRAIN, FOR_EVER]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, text=True)
    os.close(slave)

    def trains() -> Path | None:
        with suppress(BlockingIOError):
            while os.read(master, 65536):
                pass
        return log(here)

    until(trains, process)
    os.close(master)
    ended(process)
    assert process.returncode == 3
    assert (last(here)["reason"], last(here)["signal"]) == ("stopped", "SIGHUP")


def test_an_error_that_nobody_reads_has_its_code(here: Path, unread: int) -> None:
    process = subprocess.Popen([*TRAIN, "train.lr=-1"], stdout=unread, stderr=unread, text=True)
    ended(process)
    assert process.returncode == 2


def test_another_pipe_that_breaks_is_no_reader_that_went_away(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_pipe(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr("lumina.training.trainer.Trainer.fit", break_pipe)
    with pytest.raises(RuntimeError, match="a pipe inside of the program"):
        main([*TRAIN[3:], "train.steps=3"])
