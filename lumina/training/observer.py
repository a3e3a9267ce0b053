"""What a step did, told as events: once its metrics, one step later, are on the host.

Every step has a `step` event; what its routers did is added up, and told every `telemetry.log_every` steps and at the
end (`moe`, `mod`); a step that the guard did not take is a `decision`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from lumina.model import cost
from lumina.orchestrator.protocol import Decision, Observation
from lumina.training import depth, experts, machine
from lumina.training.invariants import counted
from lumina.training.schedule import Part, stage
from lumina.training.setup import Parts
from lumina.training.state import Progress
from lumina.training.step import METRICS

Emit = Callable[..., None]
FIGURES = ("grad_embed", "grad_head", "grad_router", "update_ratio", "adam_rms", "log_z")  # that a person wants, too


class Acting(Protocol):
    """The course: what was planned, and what overlays made of it."""

    @property
    def phases(self) -> Sequence[Part]: ...

    @property
    def steps(self) -> int:
        """With which the run ends."""
        ...

    def values(self, step: int) -> Mapping[str, float]:
        """The numbers that acted in a step."""
        ...

    def changed(self, step: int) -> str:
        """What the plan, or what lies over it, changed with a step."""
        ...


class Observer:
    """Turns the metrics of steps into events and observations.

    `peak` is what MFU is measured against, in FLOP/s; `acting` says what acted in a step.
    """

    def __init__(
        self,
        parts: Parts,
        peak: float,
        emit: Emit,
        acting: Acting,
    ) -> None:
        self.parts, self.config, self.peak, self.emit, self.acting = parts, parts.config, peak, emit, acting
        self.layers = len(parts.model.moes), len(parts.model.routers)
        self.flops = dict[float | None, float]()  # of a token, by depth capacity

    def __call__(self, progress: Progress, values: Sequence[float]) -> Observation:
        """Tells what `progress.step` did, as `train_step` returned it."""
        seen = self._observation(progress, values)
        config = self.config
        tok_s = config.train.batch_tokens / progress.step_seconds
        self.emit(
            "step",
            step=seen.step,
            tokens=seen.tokens,
            wall=round(progress.wall, 3),
            loss=seen.loss,
            acc=seen.acc,
            lr=seen.lr,
            grad_norm=seen.grad_norm,
            tok_s=round(tok_s, 1),
            mfu=round(tok_s * self._flops(progress.step) / self.peak, 4),
            mem=machine.memory_used(config.parallel.device),
            bal=seen.balance,
            agree=seen.agreement,
            batch=seen.batch,
            **{name: _short(getattr(seen, name)) for name in FIGURES},
            **({"broken": list(seen.broken)} if seen.broken else {}),
        )
        unmoved = bool(dict(zip(METRICS, values, strict=False))["skipped"])
        progress.skipped += unmoved
        if seen.skipped:
            self._skipped(seen)
        elif not unmoved:
            self._count(progress, values[len(METRICS) :])
        if progress.step % config.telemetry.log_every == 0 or progress.step == self.acting.steps:
            self._tell(progress)
        return seen

    def _observation(self, progress: Progress, values: Sequence[float]) -> Observation:
        metrics, rows = dict(zip(METRICS, values, strict=False)), values[len(METRICS) :]
        acted, (moes, routers) = self.acting.values(progress.step), self.layers
        end, parts = len(rows) - routers * depth.WIDTH, self.parts.optimizer.part_of.values()
        top_k = self.parts.model.moes[0].top_k if moes else 0
        return Observation(
            step=progress.step,
            tokens=progress.tokens,
            loss=metrics["nats"] / metrics["count"],
            acc=metrics["correct"] / metrics["count"],
            lr=acted["lr"],
            clip=acted["clip"],
            stage=stage(self.acting.phases, progress.step),
            changed=self.acting.changed(progress.step),
            grad_norm=metrics["grad_norm"],
            grad_embed=metrics["grad_embed"],
            grad_head=metrics["grad_head"] if "head" in parts else None,
            grad_router=metrics["grad_router"] if "router" in parts else None,
            update_ratio=0.0 if metrics["skipped"] else metrics["moved"] / (metrics["size"] or math.nan),
            adam_rms=0.0 if metrics["skipped"] else math.sqrt(metrics["adam"] / max(1.0, metrics["adam_count"])),
            log_z=math.sqrt(metrics["square"] / metrics["count"]),
            skipped=bool(metrics["skipped"]) and not (acted["skip"] and math.isfinite(metrics["grad_norm"])),
            batch=progress.batch,
            content=progress.content,
            load=tuple(map(tuple, experts.loads(rows[:end], moes))),
            entropy=tuple(experts.entropies(rows[:end], moes, top_k)),
            capacity=tuple(depth.capacities(rows[end:], routers)),
            agreement=depth.agreement(rows[end:]) if routers else None,
            loss_scale=metrics["loss_scale"] if self.parts.optimizer.loss_scale else None,
            broken=(*progress.broken, *counted(progress, metrics)),
        )

    def _flops(self, step: int) -> float:
        """Of a token trained in this step."""
        capacity = self.acting.values(step)["mod_capacity"] if self.config.model.mod else None
        if capacity not in self.flops:
            rank = self.config.train.lora.rank
            self.flops[capacity] = cost.count(self.config.model, capacity=capacity, rank=rank).flops_per_token
        return self.flops[capacity]

    def _skipped(self, seen: Observation) -> None:
        if seen.loss_scale is not None and math.isfinite(seen.loss):
            why = Decision("overflow", "skip_step", {"loss_scale": seen.loss_scale, "halved_to": seen.loss_scale / 2})
        else:
            why = Decision("non_finite", "skip_step", {"loss": seen.loss, "grad_norm": seen.grad_norm})
        self.emit("decision", step=seen.step, **why.fields())

    def _count(self, progress: Progress, rows: Sequence[float]) -> None:
        """Adds what the routers did to what they did since they were last told of."""
        moes, routers = self.layers
        end = len(rows) - routers * depth.WIDTH
        if moes:
            width = end // moes
            progress.experts = _added(progress.experts, rows[:end], width, experts.counts(width))
        if routers:
            progress.depth = _added(progress.depth, rows[end:], depth.WIDTH, depth.COUNTS)

    def _tell(self, progress: Progress) -> None:
        moes, routers = self.layers
        if progress.experts:
            top_k = self.parts.model.moes[0].top_k
            self.emit("moe", step=progress.step, **experts.describe(progress.experts, moes, top_k))
        if progress.depth:
            self.emit("mod", step=progress.step, **depth.describe(progress.depth, routers))
        progress.experts = progress.depth = None


def _added(window: list[float] | None, rows: Sequence[float], width: int, counts: int) -> list[float]:
    """The window and another step's rows: the first `counts` of each row added up, the others the newest."""
    if window is None:
        return list(rows)
    return [old + new if i % width < counts else new for i, (old, new) in enumerate(zip(window, rows, strict=True))]


def _short(value: float | None) -> float | None:
    """Six digits, as many as fp32 has."""
    return None if value is None else float(f"{value:.6g}")
