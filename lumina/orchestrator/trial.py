"""A trial: what might help, held against going on as before, from one place and in pairs; won, or nothing is done.

    noise, candidates, what is left -> `size`, or why there is none
    pairs of arms, each `steps` and then the probe -> `judge` -> gains, intervals, the winner if there is one

In a pair all arms read the same batches; the first pair reads those of the run, the others other ones. The arm's end is
behind a linear decay to 0, the same in every arm: without it every cut of the learning rate wins, though the run that
takes it ends worse (short-horizon bias: Wu et al. 2018, 1803.02021; measured in benchmarks/trials). A candidate wins if
the lower bound of its mean gain is above 0 at `ALPHA` over the number of candidates (Student's t over the pairs,
Bonferroni), and the gain above `SIGMAS` times the noise of a pair and above `LEAST`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lumina.orchestrator.protocol import ENDPOINT

ALPHA = 0.05
SIGMAS = 2.0
LEAST = 0.01  # nats: a tie, however sure (the tolerance of Merrill et al. 2025, 2505.23971, for a branch as good)
NOISE = 0.004  # nats: of a pair, before a run has measured its own (0.0014 to 0.0062 in benchmarks/trials)
PAIRS, MOST_PAIRS = 3, 6
SHORTEST, LONGEST = 100, 400  # steps before the probe
SHARE = 0.1  # of the rest of the run: what is taken of it before the probe, within these
# Of the steps before it. A quarter is too little: behind a decay of 25 steps cuts of the rate still looked good that
# the end of the run, and a decay of 100, showed to be none (benchmarks/trials).
PROBE = 1.0


class Size(NamedTuple):
    """Of a trial: steps of an arm, of its probe, pairs."""

    steps: int
    probe: int
    pairs: int

    def cost(self, candidates: int, placebo: bool = False) -> int:
        """Steps' worth of compute at most, with those of the probation of a winner; its own steps are kept."""
        arm = self.steps + self.probe
        arms = (self.pairs * (candidates + 1) + placebo) * arm - self.steps
        again = self.steps if candidates > 1 else 0  # of a winner that did not lead before the last pair
        probation = 2 * self.steps + self.probe + self.probe  # the control goes on, and later the winner is probed
        return math.ceil(round((1 + ENDPOINT) * (arms + again + probation), 6))


def size(
    candidates: int, noise: float, rest: int, left: float, settle: int = SHORTEST, placebo: bool = False
) -> Size | str:
    """The trial of so many candidates that fits, or why there is none.

    `noise`: standard deviation of a pair's difference, nats. `rest`: steps that the run has left. `left`: steps' worth
    of compute that trials may still take. `settle`: steps that the optimizer's memory takes, which no arm undercuts.
    """
    least = max(SHORTEST, settle)
    enough = max(LEAST, SIGMAS * noise)  # more pairs would not see less than this, or what is not worth seeing
    pairs = next((n for n in range(PAIRS, MOST_PAIRS) if detectable(n, candidates, noise) <= enough), MOST_PAIRS)
    refused = ""
    for steps in (round(min(max(LONGEST, least), max(least, SHARE * rest))), least):
        found = Size(steps, max(1, round(PROBE * steps)), pairs)
        if (needs := 2 * found.steps + found.probe) > rest:
            refused = f"a trial and its probation take {needs} steps, and the run has {rest} left"
        elif found.cost(candidates, placebo) > left:
            takes = f"a trial of {candidates} takes {found.cost(candidates, placebo)} steps' worth of compute"
            refused = f"{takes}, and {max(0, math.floor(left))} are left of orchestrator.trial.budget"
        else:
            return found
    return refused


def detectable(pairs: int, candidates: int, noise: float) -> float:
    """The mean gain from which on a candidate wins, if its pairs differ by `noise`, nats."""
    bound = quantile(1 - ALPHA / candidates, pairs - 1) / math.sqrt(pairs)
    return max(SIGMAS, bound) * noise


@dataclass(frozen=True)
class Judged:
    """A candidate after its pairs. Gains are nats by which the control ended above it."""

    name: str
    ends: tuple[float, ...]  # losses
    gains: tuple[float, ...]  # of each pair, the run's own order first; NaN where there is nothing to compare
    mean: float
    noise: float  # standard deviation of a pair
    low: float  # lower bound of the mean gain, at `ALPHA` over the number of candidates
    won: bool

    def plain(self) -> dict[str, Any]:
        return {
            "name": self.name, "gains": [round(gain, 6) for gain in self.gains], "gain": round(self.mean, 6),
            "noise": round(self.noise, 6), "low": round(self.low, 6), "won": self.won,
        }  # fmt: skip


def judge(name: str, control: Sequence[float], ends: Sequence[float], candidates: int) -> Judged:
    """`control` and `ends` are the losses at the end of each pair's arms, nats.

    Where the control is not finite and the candidate is, the gain is unbounded: it has won if it is ahead by more than
    a tie in each other pair, too. Where the candidate is not finite, it has lost.
    """
    gains = tuple(_gain(before, after) for before, after in zip(control, ends, strict=True))
    if any(math.isnan(gain) or gain == -math.inf for gain in gains):
        return Judged(name, tuple(ends), gains, math.nan, math.nan, math.nan, False)
    if math.inf in gains:
        won = all(gain > LEAST for gain in gains)
        return Judged(name, tuple(ends), gains, math.inf, math.nan, math.inf if won else math.nan, won)
    mean, noise = statistics.fmean(gains), statistics.stdev(gains)
    low = mean - quantile(1 - ALPHA / candidates, len(gains) - 1) * noise / math.sqrt(len(gains))
    return Judged(name, tuple(ends), gains, mean, noise, low, low > 0 and mean > max(LEAST, SIGMAS * noise))


def _gain(control: float, end: float) -> float:
    if not math.isfinite(end):
        return -math.inf
    return control - end if math.isfinite(control) else math.inf


def winner(judged: Sequence[Judged]) -> Judged | None:
    """The first that won and that no other winner beats as it would have to beat the control.

    They are in the order of trust, and what a short trial sees is biased towards small steps: a tie goes to the first.
    """
    winners = [one for one in judged if one.won]

    def beaten(one: Judged) -> bool:
        return any(judge(other.name, one.ends, other.ends, len(judged)).won for other in winners if other is not one)

    first = next((one for one in winners if not beaten(one)), None)
    return first or max(winners, key=lambda one: one.mean, default=None)


def quantile(p: float, degrees: int) -> float:
    """Of Student's t with so many degrees of freedom, for 0.5 < p < 1: its distribution is bisected."""
    low, high = 0.0, 1.0
    while _distribution(high, degrees) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _distribution(middle, degrees) < p else (low, middle)
    return high


def _distribution(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0 (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, term, total = math.cos(angle) ** 2, 1.0, 1.0
    if degrees % 2:
        for k in range(3, degrees, 2):
            term *= cosine * (k - 1) / k
            total += term
        inner = angle + (math.sin(angle) * math.cos(angle) * total if degrees > 1 else 0.0)
        return 0.5 + inner / math.pi
    for k in range(2, degrees, 2):
        term *= cosine * (k - 1) / k
        total += term
    return 0.5 + math.sin(angle) * total / 2
