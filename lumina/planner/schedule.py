"""A run's learning rates as what loss curves depend on: the area under them, and how far they have fallen.

Legend: n points; every array is float64 of shape (n,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

GRID = 2000  # points on which areas are added up: a run may have millions of steps


class Part(NamedTuple):
    """One phase, as the `run` event tells it: steps `begin` + 1 to `end`."""

    begin: int
    end: int
    lr: float
    warmup: int
    decay: int


@dataclass(frozen=True)
class Schedule:
    """The planned learning rates of a run of one or more phases; `kind` is wsd or cosine.

    Rates are shares of the last phase's peak, so that areas count steps at that peak.
    """

    kind: str
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, kind: str, phases: Sequence[dict[str, Any]]) -> Schedule:
        """From `train.schedule` and the `phases` of a `run` event."""
        return cls(kind, tuple(Part(*(phase[name] for name in Part._fields)) for phase in phases))

    @property
    def steps(self) -> int:
        return self.parts[-1].end

    @property
    def warm(self) -> int:
        """The last step of the last phase's warm-up."""
        return self.parts[-1].begin + self.parts[-1].warmup

    @property
    def decay_begins(self) -> int:
        """The last step before the rate falls for good."""
        last = self.parts[-1]
        return self.warm if self.kind == "cosine" else last.end - last.decay

    @property
    def decay_share(self) -> float:
        """The share of the run in which the rate falls at its end; nearly all of it with cosine."""
        return (self.steps - self.decay_begins) / self.steps

    def rates(self, steps: Array) -> Array:
        """The rate in each of these steps, counted from 1; what `training.schedule.rate` computes, over the peak."""
        rates = np.zeros(len(steps))
        for part in self.parts:
            here = (steps > part.begin) & (steps <= part.end)
            rates[here] = part.lr / self.parts[-1].lr * _shape(self.kind, part, steps[here])
        return rates

    def decayed_after(self, step: int) -> Schedule:
        """The same, but that the last decay begins after `step` and is as long: the run ends earlier."""
        last = self.parts[-1]
        return replace(self, parts=(*self.parts[:-1], last._replace(end=step + last.decay)))

    @cached_property
    def _areas(self) -> tuple[Array, Array]:
        """Steps, and the area behind each of them: at most `GRID` of them, between which it is nearly straight."""
        stride = max(1, math.ceil(self.steps / GRID))
        steps = np.append(np.arange(0.0, self.steps, stride), float(self.steps))
        rates = self.rates(np.maximum(steps, 1.0))
        return steps, np.cumsum(rates * np.diff(steps, prepend=0.0))

    def area(self, steps: Array) -> Array:
        """The sum of the rates up to each of these steps: S1 of Tissue et al. 2024."""
        return np.interp(steps, *self._areas)

    def fallen(self, steps: Array) -> Array:
        """How much of the peak the rate has lost by each of these steps, behind the last warm-up; 0 before.

        S2 of Tissue et al. 2024 for a short memory: with lambda = 0, not 0.999, it is the rate that has fallen. Of
        runs of some hundred steps that form fits the losses better (benchmarks/planner/README.md), and in one of many
        thousands the two are nearly the same.
        """
        return np.where(steps > self.warm, np.maximum(0.0, 1.0 - self.rates(np.ceil(steps))), 0.0)


def _shape(kind: str, part: Part, steps: Array) -> Array:
    """Shares of a phase's peak."""
    at, length = steps - part.begin, part.end - part.begin
    warm = at / max(1, part.warmup)
    if kind == "cosine":
        after = 0.5 * (1 + np.cos(np.pi * (at - 1 - part.warmup) / max(1, length - part.warmup)))
    else:
        after = np.minimum(1.0, (length - at + 1) / (part.decay + 1))
    return np.where(at <= part.warmup, warm, after)
