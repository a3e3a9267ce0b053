"""Everything that a run needs to go on to the bit, as tensors and plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from lumina.checkpoint.catalogue import LOSS
from lumina.config import overlay
from lumina.config.overlay import Overlay
from lumina.errors import UserError
from lumina.model.transformer import Transformer
from lumina.planner.memory import EVAL_TOKENS
from lumina.training import depth, experts
from lumina.training.optim import Optimizer
from lumina.training.probe import Probe
from lumina.training.step import METRICS

# What figures of the progress are at least.
LEAST: dict[str, float] = {"tokens": 0, "wall": 0.0, "step_seconds": 0.0, "eval_tokens": 1}
LEAST |= {"skipped": 0, "looked": 0, "rates": 0.0, "travel": 0.0}


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
    skipped: int = 0  # steps observed that the guard did not take
    batch: int = -1  # number of the batch of `step`, as planned; here and below: what `invariants` remember
    content: str = ""  # hash of its tokens
    broken: list[str] = field(default_factory=list)  # invariants that did not hold in `step`
    contents: list[str] = field(default_factory=list)  # of the last batches, the newest last
    golden: str = ""  # hash of the batch that every look reads again
    sums: list[float] | None = None  # of each tensor of the model at the last look, and of its squares
    looked: int = 0  # steps that the optimizer had taken then
    rates: float = 0.0  # sum of the learning rates since
    travel: float = 0.0  # how far the router biases can have moved since


class State:
    """Everything that changes while a run trains: what a checkpoint holds, and what a snapshot copies."""

    def __init__(self, model: Transformer, optimizer: Optimizer, probe: Probe) -> None:
        self.model, self.optimizer, self.probe = model, optimizer, probe
        self.progress = Progress()
        self.pending: Lagged | None = None  # metrics of `progress.step`, if this attempt took it
        self.overlays: tuple[Overlay, ...] = ()  # what lies over the plan
        self.attempt = 0
        self.unpacked: dict[str, Any] | None = None  # the orchestrator's state, as it was restored
        self.saved_in = -1  # the attempt that saved it
        self.orchestrator: Callable[[], dict[str, Any] | None] = lambda: self.unpacked  # as it is now, plain values

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
            "orchestrator": self.orchestrator(),
        }

    def problems(self, state: Mapping[str, Any], identity: Mapping[str, str], step: int) -> list[str]:
        """What is not as `pack` and the run's `identity` write it at `step`: a file on disk may hold anything."""
        return list(_mistyped(state, identity)) or list(_impossible(state, step, self._figures()))

    def _figures(self) -> dict[str, int]:
        """How many figures the lists of the progress have."""
        of_experts = sum(experts.width(moe.router.bias_E.numel()) for moe in self.model.moes)
        of_depth = depth.WIDTH * len(self.model.routers)
        lengths = {"pending": len(METRICS) + of_experts + of_depth, "experts": of_experts, "depth": of_depth}
        return lengths | {"sums": 2 * len(self.model_tensors())}

    def unpack(self, state: dict[str, Any]) -> None:
        """Restores what `pack` gave, but for the attempt; the tensors are loaded separately."""
        self.optimizer.steps_taken = state["optimizer_steps"]
        self.progress, self.pending = Progress(**state["progress"]), None
        self.overlays = overlay.unpack(state["overlays"], "state.json")
        self.unpacked, self.saved_in = state["orchestrator"], state["attempt"]


def _mistyped(state: Mapping[str, Any], identity: Mapping[str, str]) -> Iterator[str]:
    wanted: dict[str, Any] = {
        **dict.fromkeys(identity, str),
        LOSS: float | None,
        "optimizer_steps": int,
        "attempt": int,
        "overlays": list,
        "orchestrator": dict[str, Any] | None,
        "progress": dict,
    }
    for key, kind in wanted.items():
        if key not in state or not _fits(state[key], kind):
            yield f"its state has no {key} of type {getattr(kind, '__name__', kind)}"
    progress, kinds = state.get("progress"), get_type_hints(Progress)
    if type(progress) is dict:
        yield from (f"its progress has no {key}" for key in kinds if key not in progress)
        for key, value in progress.items():
            if key not in kinds or not _fits(value, kinds[key]):
                yield f"its progress has {str(key)[:50]}={str(value)[:50]}"


def _impossible(state: Mapping[str, Any], step: int, figures: Mapping[str, int]) -> Iterator[str]:
    """What no run has at `step`, in values of the right types; `figures`: how many each list of them has."""
    progress = Progress(**state["progress"])
    if progress.step != step:
        yield f"its progress is at step {progress.step}"
    if not 0 <= state["optimizer_steps"] <= step:
        yield f"its state has optimizer_steps={state['optimizer_steps']}"
    if state["attempt"] < 0:
        yield f"its state has attempt={state['attempt']}"
    for name, least in LEAST.items():
        if not getattr(progress, name) >= least:  # nor is nan
            yield f"its progress has {name}={getattr(progress, name)}"
    if progress.best_step is not None and not 0 < progress.best_step <= step:
        yield f"its progress has best_step={progress.best_step}"
    for name, length in figures.items():
        if (found := getattr(progress, name)) is not None and len(found) != length:
            yield f"its progress has {len(found)} figures of {name}, where {length} belong"
    try:
        overlay.unpack(state["overlays"], "its state")
    except UserError as error:
        yield error.message


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value out of JSON is of a field's type; a float may have been written without its point."""
    if args := get_args(kind):
        if get_origin(kind) is list:
            return type(value) is list and all(_fits(item, args[0]) for item in value)
        if get_origin(kind) is dict:
            return type(value) is dict
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
