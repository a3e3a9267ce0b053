"""Runs that are acted on between two steps, and what must be equal of them afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import settings, write_chats

from lumina.checkpoint import store
from lumina.checkpoint.catalogue import abandoned
from lumina.orchestrator.protocol import Decision
from lumina.run.folder import Run
from lumina.run.lineage import lineage
from lumina.training.controls import SessionControls
from lumina.training.session import Session
from lumina.training.trainer import Trainer

Act = Callable[[SessionControls], object]
STEPS = 10
WHY = Decision("test", "whatever", {"loss": 1.0}, "because", ["trials/x"])
# Determined by training, unlike times and memory.
KEYS = ("t", "step", "tokens", "loss", "acc", "lr", "grad_norm", "bal", "agree", "bpb", "churn", "load", "rule")
REMEMBERED = ("content", "contents", "golden", "sums", "looked", "rates", "travel")


def request(folder: Path, kind: str = "hybrid", **keys: Any) -> dict[str, Any]:
    """A short tiny run that evaluates, looks and saves every few steps; `mode` is of data."""
    usual = {"train.steps": STEPS, "train.eval_every": 4, "checkpoint.every": 3, "checkpoint.keep_last": 9}
    usual |= {"orchestrator.probe_every": 2, "telemetry.log_every": 3, "model.layers": 2, "train.batch_tokens": 256}
    made = settings(folder, kind) | usual | {key.replace("__", "."): value for key, value in keys.items()}
    if "data.mode" in made:
        made["data.train"] = [made["data.train"], str(write_chats(folder))]
    return made


def act(monkeypatch: pytest.MonkeyPatch, at: dict[int, Act]) -> None:
    """From now on, what sessions do once after each of these steps."""
    step, left = Session._step, dict(at)

    def stepping(session: Session) -> None:
        step(session)
        if todo := left.pop(session.state.progress.step, None):
            todo(SessionControls(session))

    monkeypatch.setattr(Session, "_step", stepping)


def trained(root: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, at: dict[int, Act] | None = None) -> Run:
    """A run trained to its end, acted on after these steps."""
    with monkeypatch.context() as patch:
        act(patch, at or {})
        return Trainer("tiny", root=root, **keys).fit()


def last(run: Run, steps: int = STEPS) -> store.Checkpoint:
    """The newest checkpoint that counts, of the last step."""
    newest, skipped = store.newest(run.checkpoints, without=abandoned(run.checkpoints, lineage(run).counts))
    assert newest is not None
    assert not skipped
    assert newest.step == steps
    return newest


def tensors(run: Run, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """All that were saved last."""
    return {
        f"{path.parent.name}/{name}": tensor
        for path in last(run, steps).path.glob("*/*.safetensors")
        for name, tensor in load_file(path).items()
    }


def values(run: Run, steps: int = STEPS) -> dict[str, Any]:
    """The plain state that was saved last, but for times."""
    state = last(run, steps).state
    timeless = {name: value for name, value in state["progress"].items() if name not in ("wall", "step_seconds")}
    return timeless | {"optimizer_steps": state["optimizer_steps"]}


def history(run: Run, watched: bool = True) -> list[tuple[Any, ...]]:
    """Every number that training determines, in order; text, so that NaN equals NaN."""
    told = ("step", "eval", "probe", "moe", "mod", "phase", *(["decision"] if watched else []))
    events = [e for e in run.events() if e["t"] in told and e.get("rule") not in ("test", "hand")]
    return [tuple(str(event.get(key)) for key in KEYS) for event in events]


def require_equal(one: Run, other: Run, watched: bool = True, steps: int = STEPS) -> None:
    """To the bit: every tensor, and every number that was told. `watched`: also decisions, and what invariants
    remember."""
    first, second = tensors(one, steps), tensors(other, steps)
    assert sorted(first) == sorted(second)
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []
    assert history(one, watched) == history(other, watched)
    a, b = values(one, steps), values(other, steps)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name] and (watched or name not in REMEMBERED)] == []


def crash(*_: object, **__: object) -> None:
    raise RuntimeError("power cut")
