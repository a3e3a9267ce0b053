"""A command that dies is started again as long as that helps: real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import SLOWLY, ended, history, settings, tensors_of, until

from lumina.checkpoint import store
from lumina.events import EventWriter, read_events
from lumina.run import supervised
from lumina.run.folder import Run
from lumina.run.supervisor import Supervisor
from lumina.training.trainer import Trainer, resume

# What a command does in these tests, instead of training: the next of a list of programs.
CHECKPOINT = """
folder = Path({run!r}) / "checkpoints" / "step-{step:06d}"
folder.mkdir(parents=True)
(folder / "COMPLETE").touch()
"""
BEGIN = """
import json, os, sys, time
from pathlib import Path
from lumina.run import supervised
supervised.tell_run(Path({run!r}))
with open({told!r}, "a") as told:
    told.write(json.dumps([sys.argv[1:], supervised.restart()]) + "\\n")
"""
KILLED = "os.kill(os.getpid(), 9)"


class Case:
    """A supervisor over programs that stand in for `lumina`."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        programs: list[str],
        restarts: int = 5,
        run: bool = False,
        processes: int = 1,
    ) -> None:
        self.run, self.told, self.pauses = Run(folder / "a run"), folder / "told", list[float]()
        self.run.path.mkdir(parents=True)
        with EventWriter(self.run.event_log, 0) as events:
            events.emit("step", step=7)
        monkeypatch.setattr("lumina.run.supervisor.LOOK", 0.01)
        monkeypatch.setattr(Supervisor, "_wait", lambda _, seconds: self.pauses.append(seconds))
        module = folder / "lumina_stand_in.py"
        monkeypatch.setattr("lumina.run.supervisor.PROGRAM", "lumina_stand_in")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        begin = BEGIN.format(run=str(self.run.path), told=str(self.told))
        self.said: list[str] = []
        left = iter(programs)

        def command(first: bool) -> list[str]:
            module.write_text(begin + next(left))
            return ["first"] if first else ["again"]

        known = self.run if run else None
        self.supervisor = Supervisor(command, self.said.append, known, processes, restarts)

    def starts(self) -> list[tuple[list[str], dict[str, Any] | None]]:
        return [tuple(json.loads(line)) for line in self.told.read_text().splitlines()]


@pytest.mark.parametrize("code", [0, 2, 3, 130])
def test_what_a_restart_cannot_mend_is_passed_on(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, monkeypatch, [f"sys.exit({code})"])
    assert case.supervisor.supervise() == code
    assert case.said == []
    assert case.starts() == [(["first"], None)]


def test_each_death_is_told_to_the_next_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, monkeypatch, [KILLED, *(f"sys.exit({code})" for code in (4, 5, 6, 1, 0))])
    assert case.supervisor.supervise() == 0
    commands, why = zip(*case.starts(), strict=True)
    assert commands == (["first"], *[["again"]] * 5)
    assert why[0] is None
    assert [(each["code"], each["signal"], each["restarts"]) for each in why[1:]] == [
        (None, "SIGKILL", 1), (4, None, 2), (5, None, 3), (6, None, 4), (1, None, 5),
    ]  # fmt: skip
    assert all(each["seconds_lost"] > 0 for each in why[1:])
    assert case.pauses == [1, 2, 4, 8, 16]
    assert "SIGKILL (as the system does when memory runs out) after step 7; restart 1 of 5 in 1 s" in case.said[0]


def test_a_new_checkpoint_counts_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(tmp_path / "a run")
    saves = [CHECKPOINT.format(run=run, step=step) + KILLED for step in (100, 200)]
    case = Case(tmp_path, monkeypatch, [KILLED, KILLED, saves[0], KILLED, saves[1], *[KILLED] * 9], restarts=2)
    assert case.supervisor.supervise() == 128 + 9
    assert case.pauses == [1, 2, 1, 2, 1, 2]
    assert len(case.starts()) == 7


def test_a_loop_ends_and_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, monkeypatch, ["sys.exit(4)"] * 9, restarts=2, run=True)
    assert case.supervisor.supervise() == 4
    assert [command for command, _ in case.starts()] == [["first"]] * 3  # it never begins an attempt
    said = "\n".join(case.said[-3:])
    assert "ended 3 times without a new checkpoint, at last by exit code 4" in said
    assert "each time there" in said
    assert str(case.run.log) in said
    assert f"lumina resume '{case.run.path}'" in said


def test_the_pause_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, monkeypatch, [])
    codes = iter([1] * 9)
    monkeypatch.setattr(case.supervisor, "_start_and_wait", lambda: next(codes))
    case.supervisor.limit = 8
    assert case.supervisor.supervise() == 1
    assert case.pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert "did not come as far as having a run folder" in case.said[-1]


def asked_in_a_pause(supervisor: Supervisor, seconds: float) -> bool:
    signal.raise_signal(signal.SIGTERM)
    return bool(supervisor.asked)


def test_who_asks_for_an_end_in_a_pause_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(tmp_path / "a run")
    for program, code in (("sys.exit(1)", 130), (CHECKPOINT.format(run=run, step=100) + "sys.exit(1)", 3)):
        case = Case(tmp_path / str(code), monkeypatch, [program.replace(run, str(tmp_path / str(code) / "a run"))])
        monkeypatch.setattr(Supervisor, "_wait", asked_in_a_pause)
        assert case.supervisor.supervise() == code
        assert len(case.starts()) == 1


def test_what_is_asked_while_a_command_starts_is_passed_on_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, monkeypatch, ["time.sleep(60)"])
    command = case.supervisor.command

    def asked(first: bool) -> list[str]:
        signal.raise_signal(signal.SIGTERM)
        return [*command(first)]

    case.supervisor.command = asked
    assert case.supervisor.supervise() == 128 + signal.SIGTERM


def test_a_process_of_several_that_was_killed_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_dies = f"{KILLED} if os.environ['RANK'] == '1' else time.sleep(60)"
    case = Case(tmp_path, monkeypatch, [one_dies, "sys.exit(1)", "sys.exit(0)"], processes=2)
    assert case.supervisor.supervise() == 0
    assert "ended by SIGKILL (as the system does when memory runs out)" in case.said[0]
    assert "ended by exit code 1" in case.said[1]


SAVES = """
from lumina.run.signals import Requests
with Requests() as requests:
    Path(f"{ready}-{{os.environ.get('RANK', '0')}}").touch()
    while not requests.stop:
        time.sleep(0.02)
    time.sleep(1)
supervised.tell_exit(3)
sys.exit(3)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2], ids=lambda n: n.name)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_that_is_sent_to_every_process_saves(
    processes: int, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As systemd, scancel and srun do; those that do the work may hear of it before who passes it on to them."""
    case = Case(tmp_path, monkeypatch, [SAVES.format(ready=tmp_path / "ready")], processes=processes)
    supervisor = case.supervisor

    def stop() -> None:
        while len([*tmp_path.glob("ready-*")]) < processes:
            time.sleep(0.02)
        assert supervisor.child
        below = psutil.Process(supervisor.child.pid)
        for process in (*below.children(), below, psutil.Process()):
            process.send_signal(number)

    thread = threading.Thread(target=stop)
    thread.start()
    assert supervisor.supervise() == 3
    thread.join()


def test_without_a_supervisor_nothing_is_told_and_with_a_dead_one_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(supervised.VARIABLE, raising=False)
    supervised.tell_run(tmp_path)
    supervised.tell_exit(3)
    assert supervised.restart() is None
    assert not supervised.abandoned(os.getppid())
    monkeypatch.setenv(supervised.VARIABLE, supervised.environment(tmp_path)[supervised.VARIABLE])
    assert not supervised.abandoned(os.getppid())
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setenv(supervised.VARIABLE, f"{gone.pid}:{tmp_path}")
    assert supervised.abandoned(os.getppid())


def test_a_parent_that_is_gone_is_known_if_it_was_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(supervised.VARIABLE, raising=False)
    monkeypatch.delenv(supervised.TORCHRUN, raising=False)
    had = os.getpid()  # which nobody is the child of any more
    assert not supervised.abandoned(had)
    monkeypatch.setenv(supervised.TORCHRUN, "none")
    assert supervised.abandoned(had)
    assert not supervised.abandoned(os.getppid())


SUPERVISE = """
import sys
from lumina.cli import main
from lumina.run import supervisor
supervisor.PROGRAM = "lumina_slowly"
sys.exit(main())
"""


def train(folder: Path, keys: dict[str, Any], *options: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "lumina_slowly.py").write_text(SLOWLY)
    command = [sys.executable, "-c", SUPERVISE, "train", "tiny", *(f"{key}={value}" for key, value in keys.items())]
    command += ["--root", str(folder), "--supervise", *options]
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run_below(folder: Path, process: subprocess.Popen[str]) -> Run:
    return Run(until(lambda: next(folder.glob("tiny-*/events.jsonl"), None), process).parent)


def steps_since(run: Run, attempt: int) -> Callable[[], bool]:
    """Whether this attempt, or a later one, took a step."""
    return lambda: any(event["t"] == "step" and event["attempt"] >= attempt for event in read_events(run.event_log))


def holder(run: Run) -> int:
    return int(json.loads(run.lock.read_text())["pid"])


def test_killed_twice_and_stopped_it_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    keys = settings(tmp_path, "dense") | {"train.steps": 100, "checkpoint.every": 10}
    whole = Trainer("tiny", root=tmp_path / "whole", **keys).fit()
    process = train(tmp_path / "parts", keys, "--fresh")
    run = run_below(tmp_path / "parts", process)
    until(steps_since(run, 0), process)
    os.kill(holder(run), signal.SIGKILL)
    until(lambda: [*run.checkpoints.glob("step-*/COMPLETE")], process)
    os.kill(holder(run), signal.SIGKILL)
    until(steps_since(run, 2), process)
    process.send_signal(signal.SIGTERM)
    out, err = ended(process)
    assert process.returncode == 3, err
    assert err.count("SIGKILL") == 2
    assert "lumina resume" in out
    events = [*read_events(run.event_log)]
    assert (events[-1]["reason"], events[-1]["signal"]) == ("stopped", "SIGTERM")
    restarts = [event for event in events if event["t"] == "incident" and event["kind"] == "restart"]
    assert [(event["kind"], event["attempt"], event["signal"]) for event in restarts] == [
        ("restart", 1, "SIGKILL"), ("restart", 2, "SIGKILL"),
    ]  # fmt: skip
    assert "! restart 2: the attempt before ended by SIGKILL" in run.log.read_text()
    resume(run)
    assert history(run) == history(whole)
    assert tensors_of(run) == tensors_of(whole)
    assert len([*(tmp_path / "parts").glob("tiny-*")]) == 1


LEFT = """
import time
from lumina.run.signals import Requests, read
from lumina.run.watchdog import Watchdog
with Requests() as requests, Watchdog(Path({log!r}), print, floor=3.0):
    Path({ready!r}).touch()
    while not requests.stop:
        time.sleep(0.02)
Path({ended!r}).write_text(read(requests.take())[0])
"""


def test_whoever_loses_its_supervisor_is_asked_to_save_and_stop(tmp_path: Path) -> None:
    ready, end = tmp_path / "ready", tmp_path / "ended"
    program = LEFT.format(log=str(tmp_path / "log.txt"), ready=str(ready), ended=str(end))
    (tmp_path / "lumina_stand_in.py").write_text("from pathlib import Path\n" + program)
    watching = """
import lumina.run.supervisor as s
s.PROGRAM = "lumina_stand_in"
s.Supervisor(lambda first: [], print).supervise()
"""
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", watching], stdout=subprocess.PIPE, text=True, env=environment)
    until(ready.exists, process)
    process.kill()
    ended(process)  # until the last of its processes has closed its output
    assert end.read_text() == "SIGUSR2"


BEFORE_TRAINING = """
import sys, time
from lumina.cli import main
from lumina.training.trainer import Trainer

def fit(trainer):
    print("begun", flush=True)
    time.sleep(600)

Trainer.fit = fit
sys.argv = ["lumina", "train", "tiny", "--quiet"]
main()
"""
STARTING = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.skipif(sys.platform != "linux", reason="runs on Linux: other systems tell nobody that a parent is gone")
def test_whoever_has_nothing_to_save_ends_with_the_launcher() -> None:
    environment = os.environ | {supervised.TORCHRUN: "none"}
    process = subprocess.Popen(
        [sys.executable, "-c", STARTING, BEFORE_TRAINING], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    process.kill()
    ended(process)  # which waits until the other one has closed its output


def test_processes_of_a_torchrun_that_is_killed_save_and_stop(tmp_path: Path) -> None:
    keys = settings(tmp_path, "dense") | {"train.steps": 100000, "checkpoint.every": 0}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lumina"]
    command += ["train", "tiny", *(f"{key}={value}" for key, value in keys.items()), "--root", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = run_below(tmp_path, process)
    until(steps_since(run, 0), process)
    workers = psutil.Process(process.pid).children()
    try:
        process.kill()
        _, err = ended(process)
        assert psutil.wait_procs(workers, timeout=120)[1] == [], err
    finally:
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
    last = [*read_events(run.event_log)][-1]
    assert (last["reason"], last["signal"]) == ("stopped", "SIGUSR2"), err
    assert store.verify((run.checkpoints / "latest").resolve()) == []
    assert err.count("SIGUSR2: saving after this step") == 2  # once in each


def test_two_processes_are_started_again_when_one_of_them_or_their_launcher_is_killed(
    tmp_path: Path,
) -> None:
    keys = settings(tmp_path, "dense") | {"train.steps": 100000, "checkpoint.every": 0}
    process = train(tmp_path, keys, "--processes", "2")
    run = run_below(tmp_path, process)
    until(steps_since(run, 0), process)
    process.send_signal(signal.SIGUSR1)
    until(lambda: any(event["t"] == "checkpoint" for event in read_events(run.event_log)), process)
    os.kill(holder(run), signal.SIGKILL)
    until(steps_since(run, 1), process)
    (torchrun,) = psutil.Process(process.pid).children()
    torchrun.kill()
    until(steps_since(run, 2), process)
    process.send_signal(signal.SIGTERM)
    _, err = ended(process)
    assert process.returncode == 3, err
    events = [*read_events(run.event_log)]
    assert [(event["attempt"], event.get("signal")) for event in events if event["t"] in ("checkpoint", "end")] == [
        (0, "SIGUSR1"), (1, "SIGUSR2"), (1, "SIGUSR2"), (2, "SIGTERM"), (2, "SIGTERM"),
    ]  # fmt: skip
    restarts = [event for event in events if event["t"] == "incident"]
    assert [(event["kind"], event["code"], event["signal"], event["attempt"]) for event in restarts] == [
        ("restart", None, "SIGKILL", 1), ("restart", None, "SIGKILL", 2),
    ]  # fmt: skip
    assert [event["processes"] for event in events if event["t"] == "run"] == [2, 2, 2]


def test_what_a_command_is_to_begin_it_is_told_until_it_has(tmp_path: Path) -> None:
    """Going back, or other settings, once; a run that was known before has attempts already."""
    run = Run(tmp_path)
    with EventWriter(run.event_log, 0) as events:
        events.emit("run", step=0)
    supervisor = Supervisor(lambda first: [], lambda line: None, run)
    assert supervisor._first()
    with EventWriter(run.event_log, 1) as events:
        events.emit("run", step=0)
    assert not supervisor._first()
    assert Supervisor(lambda first: [], lambda line: None)._first()
