"""A run's learning rates as what loss curves depend on: the area under them, and the annealing they hold.

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

MEMORY = 0.999  # lambda of Tissue et al. 2024 (2408.11029), who find 0.99 to 0.999
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
    def areas(self) -> tuple[Array, Array, Array]:
        """Steps, and at each the area S1 = sum of rates and the annealing area S2 of Tissue et al. 2024, eq. 1:

        S2(s) = sum over i <= s of m(i), m(i) = MEMORY m(i - 1) + rate(i - 1) - rate(i), which begins behind a warm-up.
        """
        stride = max(1, math.ceil(self.steps / GRID))
        steps = np.append(np.arange(0.0, self.steps, stride), self.steps)
        rates = self.rates(np.maximum(steps, 1.0))
        widths = np.diff(steps, prepend=0.0)
        S1 = np.cumsum(rates * widths)
        momentum, S2 = 0.0, np.zeros(len(steps))
        warm = np.zeros(len(steps), bool)
        for part in self.parts:
            warm |= (steps > part.begin + part.warmup) & (steps <= part.end)
        falls = np.where(warm, np.maximum(0.0, -np.diff(rates, prepend=0.0)), 0.0)
        for i in range(1, len(steps)):
            momentum = momentum * MEMORY ** widths[i] + falls[i] if warm[i] else 0.0
            S2[i] = S2[i - 1] + momentum * widths[i]
        return steps, S1, S2

    def at(self, steps: Array) -> tuple[Array, Array]:
        """S1 and S2 behind each of these steps."""
        grid, S1, S2 = self.areas
        return np.interp(steps, grid, S1), np.interp(steps, grid, S2)


def _shape(kind: str, part: Part, steps: Array) -> Array:
    """Shares of a phase's peak."""
    at, length = steps - part.begin, part.end - part.begin
    warm = at / max(1, part.warmup)
    if kind == "cosine":
        after = 0.5 * (1 + np.cos(np.pi * (at - 1 - part.warmup) / max(1, length - part.warmup)))
    else:
        after = np.minimum(1.0, (length - at + 1) / (part.decay + 1))
    return np.where(at <= part.warmup, warm, after)
