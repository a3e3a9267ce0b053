"""Phases, learning rate and depth capacity as pure functions of the step: resuming and skipping steps need no state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lumina.config.phases import phases
from lumina.config.schema.data import DataConfig
from lumina.config.schema.model import MoDConfig
from lumina.config.schema.train import TrainConfig
from lumina.config.units import span
from lumina.model.cost import depth_stages
from lumina.orchestrator.protocol import Stage


@dataclass(frozen=True)
class Part:
    """A phase of the run: steps `begin` + 1 to `end`, on `data` (text, chat or both), with a schedule of its own."""

    begin: int
    end: int
    data: str
    lr: float
    warmup: int  # steps
    decay: int  # steps

    def rate(self, step: int, schedule: str) -> float:
        """The learning rate of step `step` of the run, counted from 1.

        `wsd`: linear warm-up, constant, linear decay towards 0 (Hägele et al. 2024, 2405.18392). `cosine`: linear
        warm-up, then half a cosine towards 0.
        """
        step, steps = step - self.begin, self.end - self.begin
        if step <= self.warmup:
            return self.lr * step / self.warmup
        if schedule == "cosine":
            progress = (step - 1 - self.warmup) / max(1, steps - self.warmup)
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        start = steps - self.decay
        return self.lr if step <= start else self.lr * (steps - step + 1) / (self.decay + 1)

    def stage(self, step: int) -> Stage:
        """Of the schedule, in step `step` of the run, counted from 1."""
        if step <= self.begin + self.warmup:
            return "warmup"
        return "decay" if step > self.end - self.decay else "stable"


def parts(train: TrainConfig, data: DataConfig, steps: int) -> list[Part]:
    """The phases of a run of `steps`: those of `train.phases`, or one; `hybrid_sequential` has two by itself.

    Each warms up, and decays at its end, for its own share of its own steps.
    """
    planned = phases(train, data)
    begins = [span(phase.at, steps) for phase in planned]
    everything = "both" if len(data.kinds) > 1 else min(data.kinds)
    made = []
    for phase, begin, end in zip(planned, begins, [*begins[1:], steps], strict=True):
        length = end - begin
        warmup = span(train.warmup if phase.warmup is None else phase.warmup, length)
        decay = max(0, min(span(train.decay, length), length - warmup))
        wanted = everything if phase.data == "both" else phase.data
        made.append(Part(begin, end, wanted, train.lr if phase.lr is None else phase.lr, warmup, decay))
    return made


def rate(planned: Sequence[Part], schedule: str, step: int) -> float:
    """The learning rate of step `step`, counted from 1."""
    return next(phase for phase in reversed(planned) if step > phase.begin).rate(step, schedule)


def shortened(planned: Sequence[Part], begin: int, steps: int) -> list[Part]:
    """The phases when the decay is started in step `begin`: that phase ends with `steps` of it, and with it the run.

    What was planned behind is left out: up to there and from there on it is the run that was planned so long.
    """
    before = [phase for phase in planned if begin > phase.begin]
    return [*before[:-1], replace(before[-1], end=begin - 1 + steps, decay=steps)]


def stage(planned: Sequence[Part], step: int) -> Stage:
    """Where the schedule of this step's phase is. A cosine falls from the warm-up on; its decay is where `wsd`'s is."""
    return next(phase for phase in reversed(planned) if step > phase.begin).stage(step)


def depth_capacity(mod: MoDConfig, step: int, steps: int) -> float:
    """The share of a sequence that routed blocks compute in step `step`, counted from 1."""
    end = 0
    for capacity, length in depth_stages(mod, steps):
        end += length
        if step <= end:
            return capacity
    return mod.capacity
