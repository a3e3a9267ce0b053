"""A run's saves: what their events say, what is kept until a newer one has lasted, and what a run does not take."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import settings
from test_resume import history

from lumina.checkpoint import phases, places, retention, store
from lumina.checkpoint.readback import fingerprint
from lumina.config.resolve import resolve
from lumina.errors import UserError
from lumina.inference.engine import load
from lumina.model.cost import state_bytes
from lumina.parallel.world import World
from lumina.planner.memory import memory as peak
from lumina.run.folder import Run
from lumina.telemetry.console import Console
from lumina.training import machine, memory
from lumina.training.step import METRICS
from lumina.training.trainer import Trainer, resume
from lumina.training.ways_back import Back


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


@pytest.mark.parametrize("noted", [True, False])
def test_a_damaged_one_that_the_disk_keeps_in_place_counts_for_nothing(
    noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else good ones would go in its favour, and it would stay `latest`."""
    harm(monkeypatch, 4)
    rename, replace, seen = Path.rename, Path.replace, dict[int, str]()

    def refuse(self: Path, target: Path) -> Path:
        if str(target).endswith(".damaged"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(self, target)

    def refuse_notes(self: Path, target: Path) -> Path:
        if str(target).endswith("notes.json") and not noted:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return replace(self, target)

    def look(event: dict[str, Any]) -> None:
        if event["t"] == "step":
            (path,) = (tmp_path / "runs").iterdir()
            seen[event["step"]] = os.readlink(path / "checkpoints" / "latest") if event["step"] > 4 else ""
            while event["step"] == 4 and any(t.name.startswith("checkpoint") for t in threading.enumerate()):
                time.sleep(0.01)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(Path, "replace", refuse_notes)
    keys = settings(tmp_path, "dense", checkpoint__keep_last=2, checkpoint__on_error="continue", train__steps=10)
    run = Trainer("tiny", root=tmp_path / "runs", listeners=[look], **keys).fit()
    assert [(event["step"], event["verified"]) for event in saves(run)] == [
        (2, True), (4, False), (6, True), (8, True), (10, True)
    ]  # fmt: skip
    refused = [event for event in run.events() if event["t"] == "incident"]
    assert [event["step"] for event in refused] == [5]
    assert "step-000004: damaged, and not set aside" in refused[0]["error"]
    assert seen[5] == "step-000002"  # told while step 6 is under way
    assert [store.step_of(path) for path in store.checkpoints(run.checkpoints)] == [10, 8, 4]  # it is evidence
    assert (4 in map(store.step_of, retention.counting(run.checkpoints))) is not noted


def test_the_log_is_on_the_disk_before_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a run that goes on from a checkpoint knows what was told before it."""
    done: list[str] = []
    sync, publish = places.sync, phases.publish
    monkeypatch.setattr(places, "sync", lambda path: (done.append(path.name), sync(path)))

    def published(*arguments: Any) -> Path:
        done.append("publish")
        return publish(*arguments)

    monkeypatch.setattr(phases, "publish", published)
    Trainer("tiny", root=tmp_path / "runs", **settings(tmp_path, "dense")).fit()
    order = [name for name in done if name in ("events.jsonl", "publish", "COMPLETE")]
    assert order == ["COMPLETE", "events.jsonl", "publish"] * 3


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
        (change_state(progress__step=3), "its progress is at step 3"),
        (change_state(progress__tokens=-1), "its progress has tokens=-1"),
        (change_state(progress__wall=float("nan")), "its progress has wall=nan"),
        (change_state(progress__best_step=5), "its progress has best_step=5"),
        (change_state(progress__pending=[1.0]), f"its progress has 1 figures of pending, where {len(METRICS)} belong"),
        (change_state(progress__experts=[1.0]), "its progress has 1 figures of experts, where 0 belong"),
        (change_state(optimizer_steps=-1), "its state has optimizer_steps=-1"),
        (change_state(attempt=-1), "its state has attempt=-1"),
        (change_state(overlays=[{"key": "lr.scale"}]), "damaged overlays"),
        (change_state(heldout_loss="1"), "its state has no heldout_loss of type float | None"),
    ],
)
def test_what_nobody_can_go_on_from_is_passed_over_and_said(change: Any, reason: str, tmp_path: Path) -> None:
    run = crashed(tmp_path / "runs", settings(tmp_path, "dense"))
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


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path: Path) -> None:
    """Of another seed: the data, the tokenizer and the shapes are the same."""
    other = Trainer("tiny", root=tmp_path / "other", **settings(tmp_path, "dense", train__seed=7)).fit()
    run = crashed(tmp_path / "runs", settings(tmp_path, "dense"), 3)
    shutil.copytree(store.folder(other.checkpoints, 6), store.folder(run.checkpoints, 6))
    assert load(run).step == 2
    assert resume(run).finished
    started = [event for event in run.events() if event["t"] == "run"][-1]
    assert started["parent_step"] == 2
    assert "another run" in dict(started["skipped_checkpoints"])["step-000006"]
    assert store.read(store.folder(run.checkpoints, 6), own=run.id).state["run"] == run.id


def test_where_all_are_of_another_run_it_is_not_begun_again(tmp_path: Path) -> None:
    run = crashed(tmp_path / "runs", settings(tmp_path, "dense"), 3)
    other = crashed(tmp_path / "other", settings(tmp_path, "dense", train__seed=7), 3)
    shutil.rmtree(run.checkpoints)
    shutil.copytree(other.checkpoints, run.checkpoints, symlinks=True)
    with pytest.raises(UserError, match=r"damaged or of another run(.|\n)*step-000002: it is of another run"):
        resume(run)


def test_a_run_that_was_copied_as_a_whole_goes_on(tmp_path: Path) -> None:
    run = crashed(tmp_path / "runs", settings(tmp_path, "dense"), 3)
    shutil.copytree(run.path, tmp_path / "copy", symlinks=True)
    copy = resume(Run(tmp_path / "copy"))
    assert [event["skipped_checkpoints"] for event in copy.events() if event["t"] == "run"] == [[], []]


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


def skipped(run: Run) -> list[list[str]]:
    started: list[list[str]] = [event for event in run.events() if event["t"] == "run"][-1]["skipped_checkpoints"]
    return started


def test_a_run_that_lost_its_checkpoints_says_that_it_begins_again(tmp_path: Path) -> None:
    keys = settings(tmp_path, "dense", checkpoint__keep_last=9)
    early = crashed(tmp_path / "early", keys, step=1)
    assert skipped(resume(early)) == []  # there was none
    run = crashed(tmp_path / "runs", keys)
    with pytest.raises(RuntimeError, match="power cut"):  # before the new attempt has tidied
        resume(run, [cut], back=Back(2))
    shutil.rmtree(store.folder(run.checkpoints, 2))
    said: list[str] = []
    assert resume(run, [Console(show=said.append)]).finished
    undone = ["step-000004", "the run went back before it"]
    assert skipped(run) == [["step-000002", "gone: it was saved"], undone]
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
        monkeypatch.setattr(memory, "free_memory", lambda have=have: have)
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
