"""A run's saves: what their events say, what is kept until a newer one has lasted, and what a run does not take."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import settings
from test_resume import history

from lumina.checkpoint import phases, store
from lumina.checkpoint.readback import fingerprint
from lumina.config.resolve import resolve
from lumina.errors import UserError
from lumina.model.cost import state_bytes
from lumina.parallel.world import World
from lumina.planner.memory import memory as peak
from lumina.run.folder import Run
from lumina.telemetry.console import Console
from lumina.training import machine, memory
from lumina.training.session import Back
from lumina.training.trainer import Trainer, resume


def saves(run: Run) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["t"] == "checkpoint"]


def reseal(path: Path) -> None:
    """COMPLETE as somebody writes it who changed the files."""
    entries = {
        file.relative_to(path).as_posix(): dict(zip(("size", "xxh3_128"), fingerprint(file), strict=True))
        for file in path.rglob("*")
        if file.is_file() and file.name != "COMPLETE"
    }
    seal = json.loads((path / "COMPLETE").read_text())
    (path / "COMPLETE").write_text(json.dumps(seal | {"files": entries}))


@pytest.mark.parametrize("way", ["inline", "background"])
def test_every_save_has_one_event_in_order_with_its_cost(way: str, tmp_path: Path) -> None:
    run = Trainer("tiny", root=tmp_path / "runs", **settings(tmp_path, checkpoint__write=way)).fit()
    events = saves(run)
    assert [event["step"] for event in events] == [2, 4, 6]
    for event in events:
        assert (event["way"], event["verified"]) == (way, True)
        assert 0 <= event["waited"] <= event["stall"] <= event["seconds"] + event["waited"]
        assert event["stall_steps"] is not None
        assert event["bandwidth"] == pytest.approx(event["bytes"] / event["seconds"], rel=0.01)
    files = json.loads((run.checkpoints / "latest" / "COMPLETE").read_text())["files"]
    assert events[-1]["bytes"] == sum(file["size"] for file in files.values())
    assert events[0]["slowed"] is not None


def test_both_ways_leave_the_same_run(tmp_path: Path) -> None:
    runs = [
        Trainer("tiny", root=tmp_path / way, **settings(tmp_path, checkpoint__write=way, train__eval_every=2)).fit()
        for way in ("inline", "background")
    ]
    assert history(runs[0]) == history(runs[1])
    first, second = ({f.name: f.read_bytes() for f in (run.checkpoints / "latest" / "optim").iterdir()} for run in runs)
    assert first == second


@pytest.mark.parametrize(
    ("threads", "processes", "way"), [(4, 1, "inline"), (3, 1, "background"), (2, 2, "inline"), (1, 3, "background")]
)
def test_auto_writes_beside_the_steps_where_cores_are_free(
    threads: int, processes: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    config = resolve("tiny", {"parallel.threads": threads, "train.batch_tokens": 768}).config
    choices = machine.choose(config, World(size=processes, local_size=processes))
    assert choices["checkpoint.write"][0] == way
    assert machine.choose_writing("cuda", 4, room=True)[0] == "background"
    assert machine.choose_writing("cuda", 4, room=False)[0] == "inline"
    asked = resolve("tiny", {"parallel.threads": threads, "checkpoint.write": "inline"}).config
    assert "checkpoint.write" not in machine.choose(asked)


def harm(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The disk loses a bit of the checkpoint of a step when it is published."""
    publish = phases.publish

    def published(root: Path, aside: Path, of: int) -> Path:
        path = publish(root, aside, of)
        if of == step:
            file = next((path / "model").iterdir())
            raw = bytearray(file.read_bytes())
            raw[-1] ^= 1
            file.write_bytes(raw)
        return path

    monkeypatch.setattr(phases, "publish", published)


def test_older_ones_stay_until_a_newer_one_was_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harm(monkeypatch, 4)
    run = Trainer("tiny", root=tmp_path / "runs", **settings(tmp_path, checkpoint__keep_last=1)).fit()
    assert [(event["step"], event["verified"]) for event in saves(run)] == [(2, True), (4, False), (6, True)]
    assert "has other bytes" in saves(run)[1]["problems"][0]
    assert {path.name for path in store.checkpoints(run.checkpoints)} == {"step-000006"}
    assert (run.checkpoints / "step-000004.damaged").is_dir()


def test_a_run_whose_last_save_did_not_last_is_not_called_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = settings(tmp_path)
    with monkeypatch.context() as patch:
        harm(patch, 6)
        with pytest.raises(UserError, match="the last checkpoint did not last"):
            Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    (run,) = (Run(path) for path in (tmp_path / "runs").iterdir())
    assert not run.finished
    assert os.readlink(run.checkpoints / "latest") == "step-000004"
    assert resume(run).finished


def test_a_refusing_disk_stops_the_run_and_what_was_saved_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, seal = settings(tmp_path, checkpoint__write="background"), phases.seal

    def full(root: Path, aside: Path, step: int, files: phases.Files) -> str:
        if step == 4:
            raise UserError(f"{phases.refused(root, step)}: No space left on device")
        return seal(root, aside, step, files)

    with monkeypatch.context() as patch:
        patch.setattr(phases, "seal", full)
        with pytest.raises(UserError, match="step-000004: checkpoint not written"):
            Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    (run,) = (Run(path) for path in (tmp_path / "runs").iterdir())
    assert sorted(os.listdir(run.checkpoints)) == ["latest", "step-000002"]
    assert resume(run).finished


def nan_in_a_weight(path: Path) -> None:
    file = next((path / "model").glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    (length,) = (int.from_bytes(raw[:8], "little"),)
    raw[8 + length : 12 + length] = torch.tensor([float("nan")]).numpy().tobytes()
    file.write_bytes(raw)


def change_state(**keys: Any) -> Any:
    def change(path: Path) -> None:
        state = json.loads((path / store.STATE).read_text())
        for key, value in keys.items():
            inside, _, name = key.rpartition("__")
            (state[inside] if inside else state)[name] = value
        (path / store.STATE).write_text(json.dumps(state))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (nan_in_a_weight, r"model tensor \S+: not all numbers are finite"),
        (change_state(optimizer_steps="7"), "its state has no optimizer_steps of type int"),
        (change_state(kind=None), "its state has no kind of type str"),
        (change_state(progress__step="4"), "its progress has step=4"),
        (change_state(progress__pending=[1.0, "x"]), "its progress has pending="),
        (change_state(progress__surprise=1), "its progress has surprise=1"),
    ],
)
def test_what_nobody_can_go_on_from_is_passed_over_and_said(change: Any, reason: str, tmp_path: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == 5 and event["attempt"] == 0:
            raise RuntimeError("power cut")

    keys = settings(tmp_path, "dense")
    with pytest.raises(RuntimeError):
        Trainer("tiny", root=tmp_path / "runs", listeners=[stop], **keys).fit()
    (run,) = (Run(path) for path in (tmp_path / "runs").iterdir())
    path = store.folder(run.checkpoints, 4)
    change(path)
    reseal(path)
    assert store.verify(path) == []
    assert resume(run).finished
    started = [event for event in run.events() if event["t"] == "run"][-1]
    assert started["parent_step"] == 2
    assert re.search(reason, dict(started["skipped_checkpoints"])["step-000004"])


def crashed(folder: Path, keys: dict[str, Any], step: int = 5) -> Run:
    """A run that died right after this step was told."""

    def stop(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == step and event["attempt"] == 0:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        Trainer("tiny", root=folder, listeners=[stop], **keys).fit()
    (run,) = (Run(path) for path in folder.iterdir())
    return run


@pytest.mark.parametrize("came", [False, True])
def test_what_a_killed_save_was_replacing_has_its_name_again(came: bool, tmp_path: Path) -> None:
    """Killed between two renames; or after them, and what came in its place is damaged."""
    keys = settings(tmp_path, "dense")
    run = crashed(tmp_path / "runs", keys)
    latest, old = store.folder(run.checkpoints, 4), run.checkpoints / "step-000004.old"
    latest.rename(old)
    if came:
        shutil.copytree(old, latest)
        nan_in_a_weight(latest)
    with pytest.raises(RuntimeError, match="power cut"):
        resume(run, [cut])
    assert os.readlink(run.checkpoints / "latest") == "step-000004"
    assert store.verify(latest) == []
    assert not old.exists()
    assert (run.checkpoints / "step-000004.damaged").exists() is came
    whole = Trainer("tiny", root=tmp_path / "whole", **keys).fit()
    assert history(resume(run)) == history(whole)


def cut(event: dict[str, Any]) -> None:
    raise RuntimeError("power cut")


def cut_in_a_step(event: dict[str, Any]) -> None:
    if event["t"] == "step":
        cut(event)


def skipped(run: Run) -> list[list[str]]:
    started: list[list[str]] = [event for event in run.events() if event["t"] == "run"][-1]["skipped_checkpoints"]
    return started


def test_a_run_that_lost_its_checkpoints_says_that_it_begins_again(tmp_path: Path) -> None:
    keys = settings(tmp_path, "dense", checkpoint__keep_last=9)
    early = crashed(tmp_path / "early", keys, step=1)
    assert skipped(resume(early)) == []  # there was none
    run = crashed(tmp_path / "runs", keys)
    with pytest.raises(RuntimeError, match="power cut"):  # before the new attempt has saved anything
        resume(run, [cut_in_a_step], back=Back(2))
    shutil.rmtree(store.folder(run.checkpoints, 2))
    said: list[str] = []
    assert resume(run, [Console(show=said.append)]).finished
    gone, undone = ["step-000002", "gone: it was saved"], ["step-000004", "the run went back before it"]
    assert skipped(run) == [gone, undone]
    assert f"resume {run.path} from step 0" in said
    assert "! skipped step-000002: gone: it was saved" in said


def test_a_run_that_went_back_to_its_start_misses_nothing(tmp_path: Path) -> None:
    run = crashed(tmp_path / "runs", settings(tmp_path, "dense"))
    with pytest.raises(RuntimeError, match="power cut"):
        resume(run, [cut], back=Back(0))
    assert skipped(resume(run)) == []


def test_a_copy_needs_room_for_weights_and_moments_beside_what_a_cpu_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve("tiny", {"parallel.device": "cpu"}).config
    trains, state = peak(config).total, state_bytes(config.model, config.train.optimizer, config.precision.mode)
    for have, fits in ((trains + state.weights + state.moments, True), (trains + state.weights, False)):
        monkeypatch.setattr(memory, "usable", lambda have=have: have)
        assert memory.room_for_copy(config) is fits


def test_a_run_killed_after_its_last_save_leaves_nothing_of_the_kills_before(tmp_path: Path) -> None:
    run = Trainer("tiny", root=tmp_path / "runs", **settings(tmp_path, train__eval_every=2)).fit()
    lines = run.event_log.read_text().splitlines(keepends=True)
    run.event_log.write_text("".join(line for line in lines if json.loads(line)["t"] != "end"))
    leftover = run.checkpoints / f"step-000006.tmp-{os.getpid()}"
    leftover.mkdir()
    resume(run)
    assert run.finished
    assert not leftover.exists()
