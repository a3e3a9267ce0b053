"""How often a run saves, and whether its checkpoints fit on the disk."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from support import settings

from lumina.checkpoint import retention, store
from lumina.config.resolve import read, resolve
from lumina.errors import UserError
from lumina.events import read_events
from lumina.model.transformer import Transformer
from lumina.run.lock import RunLock
from lumina.telemetry.console import disk_lines
from lumina.training import interval, room
from lumina.training.optim import Optimizer
from lumina.training.trainer import Trainer

Usage = namedtuple("Usage", "total used free")


def lost(every: float, stall: float, mtbf: float) -> float:
    """The share of the time that goes into saving, and into doing again what a failure took."""
    return stall / every + every / 2 / mtbf


@pytest.mark.parametrize(("stall", "mtbf"), [(0.3, 86400.0), (12.0, 3600.0), (0.01, 10.0)])
def test_no_other_interval_loses_less(stall: float, mtbf: float) -> None:
    best = interval.best_interval(stall, mtbf)
    assert best == math.sqrt(2 * mtbf * stall)
    for other in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert lost(best, stall, mtbf) < lost(other * best, stall, mtbf)
    assert lost(2 * best, stall, mtbf) == pytest.approx(1.25 * lost(best, stall, mtbf))


def test_the_interval_in_steps_comes_with_its_reasoning() -> None:
    assert interval.choose(0.31, 1.09, 86400.0, steps=10_000, eval_every=0) == {
        "checkpoint.every": (
            212,
            "sqrt(2 x 24h x 0.31s) = 231s at 1.09s a step; about 0.13 % of the time goes into saving, "
            "a failure costs 116s on average",
        )
    }


@pytest.mark.parametrize(
    ("stall", "step_time", "steps", "eval_every", "every"),
    [
        (0.31, 1.09, 100, 0, 100),  # longer than the run
        (0.31, 1e6, 100, 0, 1),  # a step takes longer
        (0.31, 1.09, 10_000, 100, 200),  # 212, moved to the evaluations
        (0.31, 1.09, 10_000, 1000, 200),  # a divisor
        (0.31, 1.09, 10_000, 997, 212),  # none that is near
        (0.31, 1.09, 250, 250, 212),  # the only evaluation is the last one
        (1e-9, 1.0, 10, 3, 1),
    ],
)
def test_the_interval_is_whole_steps_in_the_run_and_falls_together_with_evaluations(
    stall: float, step_time: float, steps: int, eval_every: int, every: int
) -> None:
    assert interval.choose(stall, step_time, 86400.0, steps, eval_every)["checkpoint.every"][0] == every


@pytest.mark.parametrize(("mtbf", "every"), [("0.000001s", 1), ("1000d", 6)])
def test_auto_is_settled_once_and_what_is_assumed_matters(mtbf: str, every: int, tmp_path: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == 3 and event["attempt"] == 0:
            raise RuntimeError("power cut")

    keys = settings(tmp_path, "dense", checkpoint__every="auto", checkpoint__mtbf=mtbf)
    trainer = Trainer("tiny", root=tmp_path / "runs", listeners=[stop], **keys)
    with pytest.raises(RuntimeError):
        trainer.fit()
    assert trials(tmp_path) == []
    (path,) = (tmp_path / "runs").iterdir()
    saved = read(path / "config.yaml")
    assert saved.config.checkpoint.every == every
    run = trainer.fit()  # goes on with it
    assert run.path == path
    told = [event for event in read_events(run.event_log) if event["t"] == "run"]
    assert [event["disk"]["every"] for event in told] == [every, every]
    why = saved.origins["checkpoint.every"].removeprefix("resolved: ")
    assert re.match(r"sqrt\(2 x .* x .*s\) = .*s at .*s a step", why)
    assert [event["choices"]["checkpoint.every"] for event in told] == [why, why]


KILLED = """
import os, sys
from lumina.checkpoint import phases
from lumina.cli import main
phases.seal = lambda *_: os.kill(os.getpid(), 9)
main(sys.argv[1:])
"""


def trials(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith(interval.NAME))


def test_what_a_process_that_was_killed_while_it_measured_left_goes_at_the_next_start(tmp_path: Path) -> None:
    keys = settings(tmp_path, "dense", checkpoint__every="auto")
    command = ["train", "tiny", *(f"{key}={value}" for key, value in keys.items()), "--root", str(tmp_path / "runs")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert len(trials(tmp_path)) == 1
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()  # by another run, meanwhile
    shutil.copytree(trials(tmp_path)[0], tmp_path / "runs" / f"{interval.NAME}too")
    alive = tmp_path / f"{interval.NAME}alive"
    alive.mkdir()
    with RunLock(alive / interval.LOCK):
        Trainer("tiny", root=tmp_path / "runs", **keys).fit()
        assert trials(tmp_path) == [alive]
    assert trials(tmp_path / "runs") == []


def test_a_folder_that_another_start_took_for_a_leftover_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = interval.tempfile.mkdtemp, list[Path]()

    def swept_at_once(**where: Any) -> str:
        made.append(Path(make(**where)))
        if len(made) == 1:
            made[0].rmdir()
        return str(made[-1])

    monkeypatch.setattr(interval.tempfile, "mkdtemp", swept_at_once)
    with interval._trial_folder(tmp_path) as path:
        assert [path] == trials(tmp_path) == made[1:]
        with pytest.raises(UserError):
            RunLock(path / interval.LOCK).__enter__()
    assert trials(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "more"),
    [("dense", {}), ("moe", {"train.optimizer": "adamw"}), ("hybrid", {}), ("dense", {"train.lora.rank": 8}),
     ("dense", {"precision.mode": "bf16_pure"})],
)  # fmt: skip
def test_the_size_of_a_checkpoint_is_known_beforehand(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    shape = {"model.width": 128, "model.layers": 3, "model.vocab": 2000}
    config = resolve("tiny", {"model.kind": kind, **shape, **more}).config
    model = Transformer(config.model, lora=config.train.lora)
    if config.precision.mode == "bf16_pure":
        model.bfloat16()
    optimizer = Optimizer(model, config.train)
    receipt = store.save(tmp_path, 1, model.tensors(), optimizer.tensors(), {})
    assert room.checkpoint_bytes(config) == pytest.approx(receipt.bytes, rel=0.05)


@pytest.mark.parametrize(
    ("keys", "most"),
    [
        ({"checkpoint.every": 0}, 1),
        ({"checkpoint.every": 50}, 2),
        ({"checkpoint.every": 10}, 4),  # two newest, the best, the next
        ({"checkpoint.every": 10, "checkpoint.keep_last": 3, "checkpoint.keep_best": 2}, 6),
        ({"checkpoint.every": 10, "checkpoint.keep_every": 20}, 9),
        ({"checkpoint.every": 10, "checkpoint.keep_every": 15}, 7),  # 30, 60, 90
        ({"checkpoint.every": "auto"}, 4),
    ],
)
def test_what_is_kept_at_the_same_time_is_counted(keys: dict[str, Any], most: int) -> None:
    assert room.at_once(resolve("tiny", {"train.steps": 100, **keys}).config) == most


def test_what_is_kept_to_undo_overlays_is_counted_besides(tmp_path: Path) -> None:
    told = room.facts(resolve("tiny", {"train.steps": 100, "checkpoint.every": 10}).config, tmp_path, pinned=2)
    assert (told["most"], told["pinned"]) == (6, 2)
    assert "at most 6 x" in disk_lines(told, "")[0]
    assert "(2 to undo overlays)" in disk_lines(told, "")[0]


def test_the_disk_use_is_told_and_counted_right(tmp_path: Path) -> None:
    keys = settings(tmp_path, checkpoint__every=1, checkpoint__keep_every=2)
    seen = 0

    def look(event: dict[str, Any]) -> None:
        nonlocal seen
        if event["t"] == "checkpoint":
            (path,) = (tmp_path / "runs").iterdir()
            seen = max(seen, len(store.checkpoints(path / "checkpoints")))

    run = Trainer("tiny", root=tmp_path / "runs", listeners=[look], **keys).fit()
    (told,) = (event["disk"] for event in run.events() if event["t"] == "run")
    assert told["most"] == 6 >= seen + 1
    assert (told["used"], told["every"]) == (0, 1)
    assert told["free"] > 0
    assert room.facts(resolve("tiny", keys).config, run.checkpoints)["used"] > 3 * told["bytes"]


def test_a_disk_too_small_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = settings(tmp_path)
    one = room.checkpoint_bytes(resolve("tiny", keys).config)

    def set_free(amount: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10 * one, 0, amount))

    set_free(2 * one - 1)
    with pytest.raises(UserError, match=r"two of them have to fit; [\d.]+ MiB are free"):
        Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    assert not (tmp_path / "runs").exists()
    set_free(2 * one)
    run = Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    (told,) = (event["disk"] for event in run.events() if event["t"] == "run")
    assert disk_lines(told, "")[-1].startswith("! the checkpoints will not all fit")
    set_free(3 * one)
    assert len(disk_lines(told | {"free": 3 * one}, "")) == 1


def test_what_stays_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on needs room for one, beside what only goes once that was read back."""
    config = resolve("tiny", settings(tmp_path, checkpoint__keep_last=2)).config
    one, weights = room.checkpoint_bytes(config), {"w": torch.zeros(room.checkpoint_bytes(config) // 4)}
    for step in (1, 2, 3):
        store.save(tmp_path, step, weights, {}, {})
    (tmp_path / f"step-000004.tmp-{os.getpid()}").mkdir()
    store.point(tmp_path, "latest", 2)
    store.folder(tmp_path, 1).rename(tmp_path / "step-000001.damaged")

    def fits(free: int, **more: Any) -> bool:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10 * one, 0, free))
        try:
            room.require(config, tmp_path, **more)
        except UserError:
            return False
        return True

    assert fits(one)
    assert not fits(one - 1)
    assert fits(0, abandoned=[store.folder(tmp_path, 3)])
    retention.pin(tmp_path, {3: "before overlay 1"})
    assert not fits(one - 1, abandoned=[store.folder(tmp_path, 3)])
    (tmp_path / f"step-000004.tmp-{os.getpid()}" / "half").write_bytes(bytes(100))  # of a killed save
    assert fits(one - 100)
    assert one < room.facts(config, tmp_path)["used"] - one < 1.1 * one  # what was set aside is none of `most`
