"""What signals ask of a run; the last test sends them to a real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import SLOWLY, ended, history, settings, tensors_of, until

from lumina.run.folder import Run
from lumina.run.signals import AT_ONCE, SAVE, STOP, NothingToSave, Requests, read
from lumina.training.trainer import Trainer, resume


@pytest.fixture
def hearing() -> Iterator[None]:
    """SIGHUP is not ignored, as it is if these tests run under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", AT_ONCE, ids=lambda n: n.name)
def test_the_first_signal_asks_and_the_second_interrupts(number: signal.Signals) -> None:
    with Requests() as requests:
        assert read(requests.take()) == ("", "")
        signal.raise_signal(number)
        assert read(requests.take()) == (number.name, "")
        assert read(requests.take()) == (number.name, "")  # it stays
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("hearing")
@pytest.mark.parametrize("number", sorted(set(STOP) - set(AT_ONCE)), ids=lambda n: n.name)
def test_a_notice_may_repeat_and_does_not_make_what_follows_a_second(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with Requests() as requests:
        signal.raise_signal(number)
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert read(requests.take()) == (number.name, "")  # the first one is named
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err.count(number.name) == 1


def test_to_save_is_asked_once_and_stopping_outranks_it_in_whichever_process() -> None:
    with Requests() as one, Requests() as other:
        signal.raise_signal(SAVE)
        saving = other.take()
        assert read(saving) == ("", "SIGUSR1")
        assert read(other.take()) == ("", "")
    with one:
        signal.raise_signal(signal.SIGUSR2)
        assert read(max(saving, one.take()))[0] == "SIGUSR2"


def test_earlier_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (*STOP, SAVE)]
    with NothingToSave():
        signal.raise_signal(SAVE)
        with Requests():
            assert signal.getsignal(signal.SIGTERM) != before[1]
        signal.raise_signal(SAVE)
    assert [signal.getsignal(number) for number in (*STOP, SAVE)] == before


def test_nohup_holds() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Requests() as requests:
            signal.raise_signal(signal.SIGHUP)
            assert read(requests.take()) == ("", "")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_it_does_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    asked: list[int] = []

    def work() -> None:
        with NothingToSave(), Requests() as requests:
            assert signal.getsignal(signal.SIGTERM) == before
            asked.append(requests.take())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [0]


def test_a_run_saves_and_goes_on_then_saves_and_stops_and_is_resumed_to_the_bit(tmp_path: Path) -> None:
    keys = settings(tmp_path, "dense") | {"train.steps": 200, "checkpoint.every": 0, "checkpoint.keep_last": 9}
    whole = Trainer("tiny", root=tmp_path / "whole", **keys).fit()
    command = [sys.executable, "-c", SLOWLY, "train", "tiny", *(f"{key}={value}" for key, value in keys.items())]
    process = subprocess.Popen(
        [*command, "--root", str(tmp_path / "parts")], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    run = Run(until(lambda: next((tmp_path / "parts").glob("tiny-*/events.jsonl"), None), process).parent)
    until(lambda: any(event["t"] == "step" for event in run.events()), process)
    os.kill(process.pid, signal.SIGUSR1)
    until(lambda: any(event["t"] == "checkpoint" for event in run.events()), process)
    os.kill(process.pid, signal.SIGTERM)
    _, said = ended(process)
    assert process.returncode == 3, said

    asked = [(event["t"], event.get("signal")) for event in run.events() if event["t"] in ("checkpoint", "end")]
    assert asked == [("checkpoint", "SIGUSR1"), ("checkpoint", "SIGTERM"), ("end", "SIGTERM")]
    resume(run)
    assert history(run) == history(whole)
    assert tensors_of(run) == tensors_of(whole)
