"""What a run's loss will be at its end, from the losses so far and the learning rates still to come.

With a learning rate that decays at the end, the loss in the middle is not the final loss: the decay takes off a part
that no curve shows before it begins (`planner.posterior` has the form). The interval covers 80 %: the posterior's
spread, and with it `ahead` of what the loss is still to fall, which is what forecasts of finished runs were off
(`planner.prior`): so it is the wider, the more of the run is left.

A forecast is a pure function of the curve and the aim: a resumed run says what an uninterrupted one says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.planner.curve import Curve
from lumina.planner.laws import Interval
from lumina.planner.posterior import Place, Points, Posterior, fit
from lumina.planner.prior import SHIPPED, Prior
from lumina.planner.schedule import Schedule

Array = NDArray[np.float64]

LEVEL = 0.8
HALF_WIDTH = 1.2816  # standard deviations on each side that hold `LEVEL` of a normal distribution
WINDOW = 0.1  # share of the run behind its warm-up, or behind a change, before anything is said
LEAST = 12  # bins
EARLY = 0.6  # of the cost of an early decay: what it was off by (RMS) in eight branched runs, benchmarks/planner/study
NEWEST = 0.05  # share of the run whose losses are held against what was expected of them


@dataclass(frozen=True)
class Aim:
    """Where a run is going.

    `settled` is the step behind which it computes, by plan, what it goes on computing; `because` says what does not
    until then. `never` says why no curve of this run is of the form. `epochs` are those that it reads its text.
    """

    schedule: Schedule
    settled: int = 0
    because: str = ""
    never: str = ""
    epochs: float = 1.0

    def prior(self, prior: Prior) -> Prior:
        """What is expected of this run by what is known of others."""
        return prior.of_run(self.schedule.decay_share, self.epochs)


@dataclass(frozen=True)
class Refusal:
    """Why nothing is forecast; `early`: only because the run has not come far enough."""

    reason: str
    early: bool = False


class DecayNow(NamedTuple):
    """What it costs to begin the decay now: nats by which the final loss is higher, the last step, steps saved."""

    cost: Interval
    end: int
    saved: int


@dataclass(frozen=True)
class Forecast:
    """The final training loss, and the held-out one of a run that evaluates: nats a token, intervals of `LEVEL`.

    `exponent` is the mean α; the `points` bins behind step `begin` were used. `decay_now` is None once the rate falls.
    """

    step: int
    train: Interval
    heldout: Interval | None
    decay_now: DecayNow | None
    exponent: float
    begin: int
    points: int


def forecast(curve: Curve, aim: Aim, prior: Prior = SHIPPED) -> Forecast | Refusal:
    """What the run will come to, as far as `curve` tells; or why nothing can be said."""
    begin, why = window(curve, aim)
    if refused := refusal(curve, aim, begin, why):
        return refused
    view = View(aim.schedule, begin, curve.stretch)
    points = view.points(curve)
    found = fit(points, aim.prior(prior))
    evaluated = bool(points.heldout.any())
    return Forecast(
        step=curve.now,
        train=_final(found, view, curve.now, prior, heldout=False),
        heldout=_final(found, view, curve.now, prior, heldout=True) if evaluated else None,
        decay_now=_decay_now(found, view, curve.now),
        exponent=found.exponent,
        begin=begin,
        points=int((~points.heldout).sum()),
    )


def window(curve: Curve, aim: Aim) -> tuple[int, str]:
    """The step behind which the points are of one and the same run, and what ended there."""
    begins = [(aim.schedule.warm, "the warm-up"), *([(aim.settled, aim.because)] if aim.settled else [])]
    begins += [(change.step, change.why) for change in curve.changes]
    return max(begins, key=lambda one: one[0])


def refusal(curve: Curve, aim: Aim, begin: int, why: str) -> Refusal | None:
    """Why no forecast is made of this curve; None if one can be."""
    steps, last = aim.schedule.steps, aim.schedule.parts[-1]
    if aim.never:
        return Refusal(aim.never)
    if curve.now <= last.begin:
        return Refusal("another phase is still to come, with losses of its own", early=True)
    if curve.changes and begin == curve.changes[-1].step and curve.now < begin + WINDOW * steps:
        return Refusal(f"behind step {begin} the run is another: {why}; {WINDOW:.0%} of the run are needed from there")
    if curve.now < begin + WINDOW * steps:
        return Refusal(f"too early: {WINDOW:.0%} of the steps are needed behind {why}", early=True)
    bins = int((curve.steps - curve.counts >= begin).sum())
    if bins < LEAST:
        return Refusal(f"{bins} points are too few for a form of three numbers; {LEAST} are needed", early=True)
    return None


@dataclass(frozen=True)
class View:
    """A run from step `begin` on, at `stretch` times its planned rates, as the form sees it."""

    schedule: Schedule
    begin: int
    stretch: float = 1.0

    def place(self, steps: Array, schedule: Schedule | None = None) -> tuple[Array, Array, Array]:
        """x, y and share of the run behind each step of the schedule, or of another that parts from it later."""
        schedule, end = schedule or self.schedule, np.array([float(self.schedule.steps)])
        return (
            self._area(schedule, steps) / self._area(self.schedule, end),
            self.stretch * schedule.fallen(steps),
            steps / end,
        )

    def at(self, step: int, schedule: Schedule | None = None) -> Place:
        return Place(*(float(values[0]) for values in self.place(np.array([float(step)]), schedule)))

    def points(self, curve: Curve) -> Points:
        """The bins that begin behind `begin`, and the evaluations there."""
        mine = curve.steps - curve.counts >= self.begin
        middle = (curve.steps - (curve.counts - 1) / 2)[mine]
        evals = [one for one in curve.heldout if self.begin < one.step <= curve.now]
        evaluated = np.array([float(one.step) for one in evals])
        steps = np.append(middle, evaluated)
        x, y, share = self.place(steps)
        return Points(
            x,
            y,
            share,
            np.append(curve.losses[mine], [one.loss for one in evals]),
            np.append(curve.counts[mine], np.ones(len(evals))),
            np.arange(len(steps)) >= len(middle),
        )

    def _area(self, schedule: Schedule, steps: Array) -> Array:
        before = schedule.area(np.array([float(self.begin)]))
        return before + self.stretch * (schedule.area(steps) - before)


def _final(found: Posterior, view: View, now: int, prior: Prior, heldout: bool) -> Interval:
    here, end = view.at(now), view.at(view.schedule.steps)
    mean, spread = found.at(end, heldout)
    ahead = prior.ahead * abs(found.rise(here, end, heldout)[0])
    return _interval(mean, math.hypot(spread, ahead, prior.wobble * mean if heldout else 0.0))


def _decay_now(found: Posterior, view: View, now: int) -> DecayNow | None:
    """Both ends have the same decay: what is not known of its gain hardly matters, what is not known ahead does."""
    if view.schedule.kind != "wsd" or now >= view.schedule.decay_begins or not view.schedule.parts[-1].decay:
        return None
    sooner = view.schedule.decayed_after(now)
    planned, early = view.at(view.schedule.steps), view.at(sooner.steps, sooner)
    mean, spread = found.rise(planned, early)
    cost = _interval(mean, math.hypot(spread, EARLY * mean))
    return DecayNow(cost, sooner.steps, view.schedule.steps - sooner.steps)


def _interval(mean: float, spread: float) -> Interval:
    return Interval(mean - HALF_WIDTH * spread, mean, mean + HALF_WIDTH * spread)
