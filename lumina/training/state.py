"""Everything that a run needs to go on to the bit, as tensors and plain values for `checkpoint.store`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lumina.training.optim import Optimizer


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


def pack(progress: Progress, optimizer: Optimizer, identity: dict[str, Any]) -> dict[str, Any]:
    """The `state.json` of a checkpoint. `identity` names what the state belongs to (tokenizer, data, model)."""
    return {**identity, "progress": vars(progress), "optimizer_steps": optimizer.steps_taken}


def unpack(state: dict[str, Any], optimizer: Optimizer) -> Progress:
    """Restores what `pack` saved; the tensors are loaded separately."""
    optimizer.steps_taken = state["optimizer_steps"]
    return Progress(**state["progress"])


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

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._host.tolist()
        return values
