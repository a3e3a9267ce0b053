"""Stopping and going on gives the run that never stopped: every tensor and every logged loss, at zero tolerance."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import KINDS, history, settings, write_chats

from lumina.checkpoint import store
from lumina.errors import UserError
from lumina.run.folder import Run
from lumina.training.endings import Stopped
from lumina.training.trainer import Trainer, resume

STEPS = 8
VARIANTS: list[dict[str, Any]] = [
    *({"kind": kind} for kind in KINDS),
    {"kind": "hybrid", "train__optimizer": "adamw"},
    {"kind": "hybrid", "train__micro_batch": 2},
    {"kind": "hybrid", "precision__mode": "bf16", "train__schedule": "cosine", "train__decay": 0},
    {"kind": "hybrid", "train__deterministic": True},
    {"kind": "dense", "precision__mode": "fp16"},
    {"kind": "hybrid", "precision__mode": "bf16_pure", "train__recompute": "full"},
    {"kind": "hybrid", "model__mod__routing": "random", "model__moe__dropout": 0.2, "model__moe__balance": 0.1},
    {"kind": "mod", "model__mod__decode": "threshold", "train__micro_batch": 2},
    {"kind": "dense", "train__lora__rank": 4},
    {"kind": "hybrid", "data__mode": "finetune"},
    {"kind": "moe", "data__mode": "hybrid_interleaved", "data__base_ratio": 0.5},
    {"kind": "dense", "data__mode": "hybrid_sequential", "data__base_ratio": 0.5, "train__micro_batch": 4},
    {"kind": "moe", "train__optimizer": "adamw", "train__micro_batch": 4, "model__tied": False},
]


class StopAt:
    """A listener that sends this process a real SIGTERM when it sees a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == self.step and event["attempt"] == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def tensors(run: Run) -> dict[str, torch.Tensor]:
    newest, skipped = store.newest(run.checkpoints)
    assert newest is not None
    assert not skipped
    assert newest.step == STEPS
    return {
        f"{path.parent.name}/{name}": tensor
        for path in newest.path.glob("*/*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(str(x) for x in v.values()))
def test_interrupted_equals_uninterrupted(
    variant: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lumina.training.precision.FIRST_SCALE", 2.0**22)  # fp16 overflows in some steps
    keys = settings(tmp_path, **variant) | {
        "train.steps": STEPS,
        "train.eval_every": 3,
        "checkpoint.every": 3,
    }
    if mode := variant.get("data__mode"):
        chats = str(write_chats(tmp_path))
        keys["data.train"] = [chats] if mode == "finetune" else [keys["data.train"], chats]
    whole = Trainer("tiny", root=tmp_path / "whole", **keys).fit()
    overflows = [event["step"] for event in whole.events() if event["t"] == "decision"]
    assert 2 <= len(overflows) < STEPS if variant.get("precision__mode") == "fp16" else not overflows

    stop = random.Random(str(variant)).randrange(1, STEPS - 1)
    interrupted = Trainer("tiny", root=tmp_path / "parts", listeners=[StopAt(stop)], **keys)
    with pytest.raises(Stopped) as stopped:
        interrupted.fit()
    assert stop <= stopped.value.step <= stop + 1
    again = Trainer("tiny", root=tmp_path / "parts", **keys).fit()
    assert again == stopped.value.run  # the same command goes on with the same run

    expected, got = tensors(whole), tensors(again)
    assert sorted(expected) == sorted(got)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert history(whole) == history(again)
    assert all(event["tok_s"] > 0 for event in again.events() if event["t"] == "step")
    assert [event[1] for event in history(again) if event[0] == "step"] == list(range(1, STEPS + 1))


def test_a_crash_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    keys = settings(tmp_path) | {"train.steps": STEPS, "checkpoint.every": 3}
    whole = Trainer("tiny", root=tmp_path / "whole", **keys).fit()

    def crash(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        Trainer("tiny", root=tmp_path / "parts", listeners=[crash], **keys).fit()
    again = Trainer("tiny", root=tmp_path / "parts", **keys).fit()
    started = [event for event in again.events() if event["t"] == "run"]
    assert [event["parent_step"] for event in started] == [None, 3]
    assert history(whole) == history(again)
    expected, got = tensors(whole), tensors(again)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("saved", [3, STEPS])
def test_a_crash_right_after_a_checkpoint_loses_no_event(saved: int, tmp_path: Path) -> None:
    """The metrics of the saved step are observed one step later: they must be in the checkpoint, also in the last."""

    def crash(event: dict[str, Any]) -> None:
        if event["t"] == "checkpoint" and event["step"] == saved and event["attempt"] == 0:
            raise RuntimeError("power cut")

    keys = settings(tmp_path) | {"train.steps": STEPS, "checkpoint.every": 3}
    whole = Trainer("tiny", root=tmp_path / "whole", **keys).fit()
    with pytest.raises(RuntimeError, match="power cut"):
        Trainer("tiny", root=tmp_path / "parts", listeners=[crash], **keys).fit()
    again = Trainer("tiny", root=tmp_path / "parts", **keys).fit()
    assert history(whole) == history(again)


def test_a_broken_checkpoint_is_passed_over_and_said(tmp_path: Path) -> None:
    keys = settings(tmp_path) | {"train.steps": STEPS, "checkpoint.every": 3}
    with pytest.raises(Stopped):
        Trainer("tiny", root=tmp_path, listeners=[StopAt(6)], **keys).fit()
    run = Run(next(tmp_path.glob("tiny-*")))
    newest, _ = store.newest(run.checkpoints)
    assert newest is not None
    shard = next((newest.path / "model").glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    again = resume(run)
    start = next(event for event in again.events() if event["t"] == "run" and event["attempt"] == 1)
    assert start["parent_step"] < newest.step
    assert start["skipped_checkpoints"][0][0] == newest.path.name
    assert again.finished


def test_a_finished_run_is_returned_as_it_is(tmp_path: Path) -> None:
    keys = settings(tmp_path)
    first = Trainer("tiny", root=tmp_path, **keys).fit()
    events = first.event_log.read_bytes()
    trainer = Trainer("tiny", root=tmp_path, **keys)
    assert trainer.fit() == first
    assert trainer.already_finished
    assert first.event_log.read_bytes() == events
    assert Trainer("tiny", root=tmp_path, fresh=True, **keys).fit() != first
    assert Trainer("tiny", root=tmp_path, **keys | {"train.seed": 1}).fit() != first


def test_changed_data_or_tokenizer_is_refused(tmp_path: Path) -> None:
    keys = settings(tmp_path)
    with pytest.raises(Stopped) as stopped:
        Trainer("tiny", root=tmp_path, listeners=[StopAt(3)], **keys).fit()
    text = Path(keys["data.train"])
    original = text.read_text()
    text.write_text(original + "one more line\n" * 30)
    with pytest.raises(UserError, match="changed since it was started"):
        resume(stopped.value.run)
    text.write_text(original)
    assert resume(stopped.value.run).finished
