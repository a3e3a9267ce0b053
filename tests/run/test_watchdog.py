"""A process without a sign of life says where it stands and ends; a slow one, or a stopped one, is let alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import ended, history, settings, tensors_of

from lumina.events import read_events
from lumina.progress import silent, tracked, whole
from lumina.run.folder import Run
from lumina.run.watchdog import Watchdog
from lumina.training.trainer import Trainer, resume


class Case:
    """A watchdog that reports and would have left; its clock is the test's."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **limits: float) -> None:
        self.reports: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.codes: list[int] = []
        self.dog = Watchdog(folder / "log.txt", self.reports.append, leave=self._leave, **limits)
        self.now = 0.0
        monkeypatch.setattr("lumina.run.watchdog.time", self)

    def monotonic(self) -> float:
        return self.now

    def _leave(self, code: int) -> None:
        self.codes.append(code)
        self.left.set()


def test_what_is_too_long_is_learned_for_each_kind_of_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, monkeypatch)
    dog, tell = case.dog, case.dog.hear(silent)
    assert dog.limit() == 1800
    for seconds in (300.0, 20.0, 20.0):  # the first was compiled
        assert dog.limit() == 1800
        dog.step()
        case.now += seconds
    dog.step()
    assert dog.limit() == 200
    for seconds in (1.0, 1.0, 1.0, 1.0):
        case.now += seconds
        dog.step()
    assert dog.limit() == 60  # 10 x the median of 1 s
    for _ in tracked(range(4), "evaluating", 4, tell):
        case.now += 9.0
        known = dog.limit()
    assert known == 90
    assert dog.limit() == 60  # steps again; the evaluation is not part of one
    for _ in tracked(range(5), "verifying step-000003", 5, tell):
        known = dog.limit()
        case.now += 1.0
    assert known == 1800  # the next file may be large, and not in memory
    dog.step(new=True)
    assert dog.limit() == 1800
    for number in range(4):
        with whole(f"saving step {number}", tell):
            known = dog.limit()
            case.now += 300.0
    assert known == 3000
    assert max(dog.seconds["a step"]) == 300


def test_words_of_other_threads_are_no_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, monkeypatch)
    thread = threading.Thread(target=case.dog.hear(silent), args=("verifying", 0, 9))
    thread.start()
    thread.join()
    assert case.dog.beats == 0
    case.dog.hear(silent)("verifying", 0, 9)
    assert case.dog.beats == 1


@pytest.fixture
def no_second_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would end these tests with the process, where a machine is so slow that the first comes late."""
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *_, **__: None)


@pytest.mark.usefixtures("no_second_line")
def test_a_hang_is_told_with_its_place(tmp_path: Path) -> None:
    reports: list[dict[str, Any]] = []
    left, codes = threading.Event(), []

    def leave(code: int) -> None:
        codes.append(code)
        left.set()

    with Watchdog(tmp_path / "log.txt", reports.append, floor=2.0, first=2.0, leave=leave) as dog:
        for _ in range(10):  # as long as it lives it is let alone
            dog.step()
            time.sleep(0.06)
        assert not codes
        a_place_to_hang_in(left)
    (report,) = reports
    assert report["kind"] == "hang"
    assert report["seconds"] >= 2.0
    assert report["doing"] == "a step"
    assert "wait (" in report["where"]
    assert codes == [4]
    assert "in a_place_to_hang_in" in (tmp_path / "log.txt").read_text()


def a_place_to_hang_in(left: threading.Event) -> None:
    assert left.wait(30)


@pytest.mark.usefixtures("no_second_line")
def test_a_disk_that_refuses_does_not_keep_it_alive(tmp_path: Path) -> None:
    left = threading.Event()

    def refuse(facts: dict[str, Any]) -> None:
        raise OSError("disk full")

    raised: list[Any] = []
    before, threading.excepthook = threading.excepthook, raised.append
    try:
        with Watchdog(tmp_path / "log.txt", refuse, floor=0.1, first=0.1, leave=lambda code: left.set()):
            assert left.wait(30)
    finally:
        threading.excepthook = before
    assert [type(args.exc_value) for args in raised] == [OSError]


SCRIPT = """
import os, signal, sys, time
import lumina.run.watchdog as watchdog
{change}
"""
STOPPED = """
dog = watchdog.Watchdog(__import__("pathlib").Path(sys.argv[1]), print, floor=1.0, first=float(sys.argv[3]))
with dog:
    for _ in range(40):  # its limit is learned, and armed
        dog.step()
        time.sleep(0.02)
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    time.sleep(0.15)
    dog.step()
    print("alive")
"""
HOLDING = """
import ctypes
with watchdog.Watchdog(__import__("pathlib").Path(sys.argv[1]), print, floor=1.0, first=1.0):
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter
"""
LINGERING = """
import threading
watchdog.expect_exit(0.2)
threading.Thread(target=time.sleep, args=(60,)).start()
"""


def python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT.format(change=code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(("number", "first"), [("SIGTSTP", 1.0), ("SIGSTOP", 30.0)])
def test_a_process_that_was_stopped_is_not_taken_for_one_that_hangs(number: str, first: float, tmp_path: Path) -> None:
    process = python(STOPPED, tmp_path / "log.txt", number, first, process_group=0)
    until_stopped(process)
    time.sleep(2.5)  # more than twice the limit
    process.send_signal(18)  # SIGCONT
    out, err = ended(process)
    assert (process.returncode, out) == (0, "alive\n"), err


def until_stopped(process: subprocess.Popen[str]) -> None:
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def test_who_holds_the_interpreter_is_ended_by_the_second_line(tmp_path: Path) -> None:
    process = python(HOLDING, tmp_path / "log.txt")
    _, err = ended(process)
    assert process.returncode == 1, err
    assert "Timeout" in (tmp_path / "log.txt").read_text()


def test_who_does_not_end_after_the_end_is_ended() -> None:
    _, err = ended(process := python(LINGERING))
    assert process.returncode == 1
    assert "Timeout" in err


HANGING = """
import functools, threading
from pathlib import Path
from lumina.training import session
from lumina.cli import main
batch = session.setup.Loader.batch
session.Watchdog = functools.partial(session.Watchdog, floor=3.0)

def a_disk_that_never_answers(loader, i, *rest):
    if i == 4 and [*Path(sys.argv[-1]).glob("*/checkpoints/step-000002")]:
        threading.Event().wait()
    return batch(loader, i, *rest)

session.setup.Loader.batch = a_disk_that_never_answers
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_that_hangs_ends_with_its_own_code_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    keys = settings(tmp_path, "dense")
    whole = Trainer("tiny", root=tmp_path / "whole", **keys).fit()
    arguments = ["train", "tiny", *(f"{key}={value}" for key, value in keys.items()), "--root", tmp_path / "parts"]
    process = python(HANGING, *arguments)
    _, err = ended(process)
    assert process.returncode == 4, err
    run = Run(next((tmp_path / "parts").glob("tiny-*")))
    for said in (err, run.log.read_text()):
        assert "no sign of life" in said
        assert "in a_disk_that_never_answers" in said
    last = [*read_events(run.event_log)][-1]
    assert " (training/course.py:" in last["where"]
    assert (last["t"], last["kind"], last["step"], last["doing"]) == ("incident", "hang", 4, "a step")
    resume(run)
    assert history(run) == history(whole)
    assert tensors_of(run) == tensors_of(whole)
