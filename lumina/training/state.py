"""Everything that a run needs to go on to the bit, as tensors and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from lumina.config import overlay
from lumina.config.overlay import Overlay
from lumina.model.transformer import Transformer
from lumina.planner.memory import EVAL_TOKENS
from lumina.training.optim import Optimizer
from lumina.training.probe import Probe


@dataclass
class Progress:
    """Where a run stands. Batch i is a pure function of i, so `step` is also the data cursor."""

    step: int = 0  # optimizer steps done or skipped
    tokens: int = 0  # trained tokens
    wall: float = 0.0  # seconds of training, over all attempts; shown, never used
    best_loss: float | None = None  # lowest held-out loss of a step that was saved
    best_step: int | None = None
    pending: list[float] | None = None  # metrics of `step`, not yet observed (they are consumed one step late)
    step_seconds: float = 0.0  # that `step` took
    experts: list[float] | None = None  # what the expert layers did since the last event of it, as of `step` - 1
    depth: list[float] | None = None  # what the depth routers did, likewise
    eval_tokens: int = EVAL_TOKENS  # evaluated at once; less once the memory did not hold so many


class State:
    """Everything that changes while a run trains: what a checkpoint holds, and what a snapshot copies."""

    def __init__(self, model: Transformer, optimizer: Optimizer, probe: Probe) -> None:
        self.model, self.optimizer, self.probe = model, optimizer, probe
        self.progress = Progress()
        self.pending: Lagged | None = None  # metrics of `progress.step`, if this attempt took it
        self.overlays: tuple[Overlay, ...] = ()  # what lies over the plan
        self.attempt = 0

    def model_tensors(self) -> dict[str, Tensor]:
        """Weights and router buffers by name; writing into them changes the model."""
        return self.model.tensors()

    def tensors(self) -> dict[str, Tensor]:
        """What a snapshot copies: all tensors, with AdamW's own counts of steps, so that no device is waited for."""
        return self.model_tensors() | self.optim_tensors() | self.optimizer.step_tensors()

    def optim_tensors(self) -> dict[str, Tensor]:
        """Moments and what the probe remembers, likewise."""
        return self.optimizer.tensors() | self.probe.tensors()

    def pack(self) -> dict[str, Any]:
        """The plain values, as `state.json` holds them."""
        if self.pending:  # else it is what this attempt began with, if that is not observed yet
            self.progress.pending = self.pending.read()
        return {
            "progress": vars(self.progress),
            "optimizer_steps": self.optimizer.steps_taken,
            "attempt": self.attempt,
            "overlays": overlay.pack(self.overlays),
        }

    def unpack(self, state: dict[str, Any]) -> None:
        """Restores what `pack` gave, but for the attempt; the tensors are loaded separately."""
        self.optimizer.steps_taken = state["optimizer_steps"]
        self.progress, self.pending = Progress(**state["progress"]), None
        self.overlays = overlay.unpack(state["overlays"], "state.json")


def state_problems(state: dict[str, Any], identity: Mapping[str, str]) -> list[str]:
    """What is not as `pack` and the run's `identity` write it: a file on disk may hold anything."""
    wanted: dict[str, Any] = {
        **dict.fromkeys(identity, str),
        "optimizer_steps": int,
        "attempt": int,
        "overlays": list,
        "progress": dict,
    }
    problems = [
        f"its state has no {key} of type {kind.__name__}"
        for key, kind in wanted.items()
        if type(state.get(key)) is not kind
    ]
    if not problems:
        kinds = get_type_hints(Progress)
        for key, value in state["progress"].items():
            if key not in kinds or not _fits(value, kinds[key]):
                problems.append(f"its progress has {str(key)[:50]}={str(value)[:50]}")
    return problems


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value out of JSON is of a field's type; a float may have been written without its point."""
    if args := get_args(kind):
        if get_origin(kind) is list:
            return type(value) is list and all(_fits(item, args[0]) for item in value)
        return any(_fits(value, one) for one in args)
    return type(value) is kind or (kind is float and type(value) is int)


class Lagged:
    """A metrics vector on its way to the host: copied at once, read one step later, without stopping the device."""

    def __init__(self, metrics: Tensor) -> None:
        self._event = None
        if metrics.device.type == "cuda":
            self._host = torch.empty(metrics.shape, dtype=metrics.dtype, pin_memory=True)
            self._host.copy_(metrics, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = metrics

    def __deepcopy__(self, memo: object) -> Lagged:
        return self  # nothing writes into it

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._host.tolist()
        return values
