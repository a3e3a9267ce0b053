"""A disk that fills up, becomes read-only or goes away while a run trains: a clean stop, or patience, as configured."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import settings

from lumina.checkpoint import store
from lumina.cli import main
from lumina.errors import DiskRefused
from lumina.events import Event, read_events
from lumina.run.folder import Run
from lumina.telemetry.console import Console
from lumina.training.endings import Stopped
from lumina.training.evaluate import Evaluation
from lumina.training.trainer import Trainer, resume

SMALL = {"model.width": 16, "model.layers": 2, "model.heads": 2, "model.kv_heads": 1, "model.head_dim": 8,
         "model.seq_len": 32, "train.batch_tokens": 64}  # fmt: skip
STEPS = 8


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("runs on Linux as root, as CI's container is: only there a small file system can be mounted")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def keys(folder: Path, **more: Any) -> dict[str, Any]:
    return (
        settings(folder, **more)
        | SMALL
        | {"train.steps": STEPS, "checkpoint.keep_last": 1, "checkpoint.write": "inline"}
    )


def at(step: int, act: Any) -> Any:
    """A listener that acts when it hears of a step of the first attempt."""

    def listen(event: Event) -> None:
        if (event["t"], event.get("step"), event["attempt"]) == ("step", step, 0):
            act()

    return listen


def losses(run: Run) -> list[tuple[int, float]]:
    return [(event["step"], event["loss"]) for event in run.events() if event["t"] == "step"]


@pytest.fixture
def undisturbed(tmp_path: Path) -> list[tuple[int, float]]:
    return losses(Trainer("tiny", root=tmp_path / "undisturbed", **keys(tmp_path)).fit())


def fill(disk: Path) -> None:
    """Takes the room that is left, to the last byte, when what was saved before has landed."""
    saved(only_run(disk), 2)
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017


def saved(run: Run, step: int) -> None:
    """Waits until the checkpoint of `step` is there and nobody writes beside it."""
    end = time.monotonic() + 120
    while not store.folder(run.checkpoints, step).exists() or threads_of_saves():
        assert time.monotonic() < end, "not saved"
        time.sleep(0.01)


def threads_of_saves() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint of step")]


def only_run(root: Path) -> Run:
    (path,) = (path for path in root.iterdir() if path.is_dir())
    return Run(path)


def test_a_full_disk_stops_the_run_and_leaves_nothing_half(
    disk: Path, tmp_path: Path, undisturbed: list[tuple[int, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Event] = []
    with pytest.raises(DiskRefused, match="No space left"):
        Trainer("tiny", root=disk, listeners=[told.append, at(3, lambda: fill(disk))], **keys(tmp_path)).fit()
    run = only_run(disk)
    assert [path.name for path in run.checkpoints.iterdir() if not path.is_symlink()] == ["step-000002"]
    assert store.verify(store.folder(run.checkpoints, 2)) == []
    assert main(["resume", str(run.path), "--quiet"]) == 2  # still full
    assert "two of them have to fit" in capsys.readouterr().err
    (disk / "ballast").unlink()
    assert losses(resume(run)) == undisturbed


def test_a_run_told_to_go_on_waits_a_full_disk_out(
    disk: Path, tmp_path: Path, undisturbed: list[tuple[int, float]]
) -> None:
    told: list[Event] = []
    acts = [at(3, lambda: fill(disk)), at(7, (disk / "ballast").unlink)]
    patient = keys(tmp_path, checkpoint__on_error="continue")
    said: list[str] = []
    run = Trainer("tiny", root=disk, listeners=[told.append, Console(show=said.append), *acts], **patient).fit()
    assert losses(run) == undisturbed
    assert len([line for line in said if "training goes on" in line]) == 1  # of two refusals
    assert len([line for line in said if "wait in memory" in line]) in (1, 2)  # a refused save gives room for some
    assert list(read_events(run.event_log)) == told  # every line, in order
    refused = [(event["step"], event["ends"]) for event in told if event.get("kind") == "save refused"]
    assert refused == [(4, False), (6, False)]
    assert [event["step"] for event in told if event["t"] == "checkpoint"] == [2, 8]
    assert store.verify((run.checkpoints / "latest").resolve()) == []


def test_a_last_save_that_fails_is_an_error_in_either_mode(disk: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        "tiny",
        root=disk,
        listeners=[at(5, lambda: fill(disk))],
        **keys(tmp_path, checkpoint__on_error="continue") | {"checkpoint.keep_last": 9},
    )
    with pytest.raises(DiskRefused, match="step-000008: checkpoint not written: No space left"):
        trainer.fit()
    run = only_run(disk)
    assert not run.finished
    assert store.verify((run.checkpoints / "latest").resolve()) == []


def test_a_stop_while_lines_of_the_log_wait_says_how_many_are_lost(tmp_path: Path) -> None:
    root, told, said = tmp_path / "runs", list[Event](), list[str]()

    def go() -> None:
        only_run(root).event_log.unlink()
        os.kill(os.getpid(), signal.SIGTERM)

    listeners = [told.append, Console(show=said.append), at(3, go)]
    with pytest.raises(Stopped):
        Trainer("tiny", root=root, listeners=listeners, **keys(tmp_path, checkpoint__on_error="continue")).fit()
    heard = [(event["t"], event.get("kind")) for event in told]
    assert ("incident", "log refused") in heard
    assert heard[-1] == ("incident", "log lost")
    waited = told[told.index(next(e for e in told if e["t"] == "step" and e["step"] == 3)) + 1 : -1]
    assert told[-1]["error"].endswith(f"lines that waited for it are lost: {len(waited)}")
    assert said[-1] == f"! {told[-1]['error']}"


@pytest.mark.parametrize("mode", ["stop", "continue"])
def test_a_folder_that_vanishes_is_not_begun_again_without_its_configuration(mode: str, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    told: list[Event] = []

    def vanish() -> None:
        saved(only_run(root), 2)
        shutil.rmtree(only_run(root).path)

    act = at(3, vanish)
    trainer = Trainer("tiny", root=root, listeners=[told.append, act], **keys(tmp_path, checkpoint__on_error=mode))
    with pytest.raises(DiskRefused, match=r"the folder of the run is gone|events.jsonl: event not written"):
        trainer.fit()
    assert list(root.iterdir()) == []
    assert max(event["step"] for event in told if event["t"] == "step") == (3 if mode == "stop" else STEPS - 1)


def test_a_folder_that_comes_back_is_written_again(tmp_path: Path, undisturbed: list[tuple[int, float]]) -> None:
    """As when a network disk was away: what is there then is another file of the same name."""
    root, away = tmp_path / "runs", tmp_path / "away"
    here: list[Path] = []

    def go() -> None:
        here.append(only_run(root).path)
        saved(Run(here[0]), 2)
        shutil.copytree(here[0], away, symlinks=True)
        shutil.rmtree(here[0])

    acts = [at(3, go), at(5, lambda: away.rename(here[0]))]
    run = Trainer("tiny", root=root, listeners=acts, **keys(tmp_path, checkpoint__on_error="continue")).fit()
    assert losses(run) == undisturbed
    assert [event["step"] for event in run.events() if event["t"] == "checkpoint"] == [2, 6, 8]


def test_a_read_only_disk_is_said_and_an_incident_tells_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, told = Path.mkdir, list[Event]()

    def refuse(self: Path, *rest: Any, **more: Any) -> None:
        if ".tmp-" in self.name and "step-000004" in self.name:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        make(self, *rest, **more)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DiskRefused, match="Read-only file system"):
        Trainer("tiny", root=tmp_path / "runs", listeners=[told.append], **keys(tmp_path)).fit()
    run = only_run(tmp_path / "runs")
    assert list(read_events(run.event_log)) == told
    incident, end = told[-2:]
    assert (incident["t"], incident["kind"], incident["step"]) == ("incident", "save refused", 4)
    assert (end["t"], end["reason"]) == ("end", "save refused")
    monkeypatch.undo()
    assert not resume(run).checkpoints.joinpath("step-000004").exists()
    assert run.finished


def test_the_best_is_one_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation whose checkpoint the disk refused is no mark to beat."""
    script = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr("lumina.training.oom.evaluate", lambda *_: Evaluation(next(script), 1.0, 0.0, 1.0, 1, [], True))
    make = Path.mkdir

    def refuse(self: Path, *rest: Any, **more: Any) -> None:
        if "step-000004.tmp-" in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        make(self, *rest, **more)

    monkeypatch.setattr(Path, "mkdir", refuse)
    patient = keys(tmp_path, checkpoint__on_error="continue", train__eval_every=2)
    run = Trainer("tiny", root=tmp_path / "runs", **patient).fit()
    assert os.readlink(run.checkpoints / "best") == "step-000006"
