"""What a finished run teaches the forecasts of the next: its curve in a few numbers, and the priors made of many.

The numbers are figures of the calibration (`planner.calibration`): own runs and those that came with the package, whose
constants `prior.SHIPPED` holds, count as one collection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lumina.config.schema.config import Config
from lumina.events import Event
from lumina.model.cost import count
from lumina.planner.curve import Curve
from lumina.planner.deviation import SHARES, Reference, normalised
from lumina.planner.forecast import Aim, View, window
from lumina.planner.laws import DEFAULT, LAWS, params_of
from lumina.planner.posterior import fit
from lumina.planner.prior import EXPONENTS, SHIPPED, Prior

Figures = Mapping[str, float]

WIDE = 1.0  # standard deviation, as a share of the loss, of what the run itself is to tell
LEAST_EVALS = 5  # of which a drift and a scatter can be told
ALIKE = 1.25  # factor by which the tokens a parameter of two runs of one sort may differ
SAME = 0.02  # difference of the shares of warm-up and decay


def findings(curve: Curve, aim: Aim, tokens_per_param: float) -> dict[str, float]:
    """The figures of a finished, undisturbed run; none of one that was changed on its way.

    `exponent_i` are the weights of the exponents; `gain`, `drift` or `repeat`, and `wobble` as in `Prior`, where the
    run shows them; `curve_i` its normalised losses.
    """
    begin, _ = window(curve, aim)
    steps = aim.schedule.steps
    if curve.changes or aim.never or curve.now < steps or len(aim.schedule.parts) > 1:
        return {}
    points = View(aim.schedule, begin).points(curve)
    if (~points.heldout).sum() < 2 * len(SHARES):
        return {}
    expected = aim.prior(SHIPPED)
    open_ = replace(expected, exponents=(1.0,) * len(EXPONENTS), drift=WIDE)
    decays = aim.schedule.kind == "wsd" and aim.schedule.parts[-1].decay > 0
    told = fit(points, replace(open_, gain_spread=WIDE) if decays else open_)
    level = float(np.mean(points.loss[~points.heldout][-12:]))
    means = told.weights @ told.means
    found = {f"exponent_{i}": float(weight) for i, weight in enumerate(told.weights)}
    found |= {f"curve_{i}": loss for i, loss in enumerate(normalised(curve.steps, curve.losses, steps))}
    if decays and aim.epochs <= 1:  # of text that is read again losses also fall by what is learnt by heart
        found["gain"] = float(means[2]) / level / math.sqrt(aim.schedule.decay_share)
    if points.heldout.sum() >= LEAST_EVALS:
        found["repeat" if aim.epochs > 1 else "drift"] = float(means[4]) / level / max(1.0, aim.epochs - 1)
        left = [
            points.loss[i] - told.at(View(aim.schedule, begin).at(round(points.share[i] * steps)), heldout=True)[0]
            for i in np.flatnonzero(points.heldout)
        ]
        found["wobble"] = math.sqrt(sum(one**2 for one in left) / (len(left) - 2)) / level
    return found | sort_of(aim, tokens_per_param)


def tokens_per_param(config: Config, begun: Event) -> float:
    """Of a run, by its configuration and its `run` event; in the default law's count, whatever law is in use."""
    return float(begun["steps"] * begun["batch_tokens"] / params_of(count(config.model), LAWS[DEFAULT]))


def sort_of(aim: Aim, tokens_per_param: float) -> dict[str, float]:
    """What makes the curves of two runs comparable, once each is divided by its final loss."""
    last, steps = aim.schedule.parts[-1], aim.schedule.steps
    cosine = aim.schedule.kind == "cosine"
    return {
        "cosine": float(cosine),
        "warmup_share": last.warmup / steps,
        "decay_share": 0.0 if cosine else last.decay / steps,
        "tokens_per_param": tokens_per_param,
    }


def prior_of(runs: Sequence[Figures], shipped: Prior = SHIPPED) -> Prior:
    """The shipped prior and own `runs`, each counted as one of the runs that it was measured on."""
    mine = [one for one in runs if "exponent_0" in one]
    if not mine:
        return shipped
    total = shipped.runs + len(mine)
    weights = shipped.runs * np.array(shipped.exponents)
    weights = weights + sum(np.array([one[f"exponent_{i}"] for i in range(len(EXPONENTS))]) for one in mine)
    gains, drifts, repeats = ([one[name] for one in mine if name in one] for name in ("gain", "drift", "repeat"))
    gain, spread = _pooled(gains, shipped.gain, shipped.gain_spread, shipped.runs)
    _, drift = _pooled(drifts, 0.0, shipped.drift, shipped.runs, centre=0.0)
    _, repeat = _pooled(repeats, 0.0, shipped.repeat, shipped.runs, centre=0.0)
    return replace(
        shipped,
        exponents=tuple(float(weight) for weight in weights / total),
        gain=gain,
        gain_spread=spread,
        drift=drift,
        repeat=repeat,
        runs=total,
    )


def _pooled(
    values: Sequence[float], mean: float, spread: float, count: int, centre: float | None = None
) -> tuple[float, float]:
    """Mean and standard deviation of `count` values of this mean and spread and these values together."""
    total = count + len(values)
    middle = (count * mean + sum(values)) / total if centre is None else centre
    squares = count * (spread**2 + (mean - middle) ** 2) + sum((value - middle) ** 2 for value in values)
    return middle, math.sqrt(squares / total)


def reference_of(runs: Sequence[tuple[str, Figures]], wanted: Figures) -> Reference | None:
    """The newest of the named `runs` (oldest first) that is of the `wanted` sort; None if none is."""
    for name, one in reversed(runs):
        if "curve_0" in one and _alike(one, wanted):
            return Reference(name, tuple(one[f"curve_{i}"] for i in range(len(SHARES))))
    return None


def _alike(one: Figures, other: Figures) -> bool:
    near = all(abs(one[name] - other[name]) <= SAME for name in ("cosine", "warmup_share", "decay_share"))
    ratios = one["tokens_per_param"], other["tokens_per_param"]
    return near and min(ratios) > 0 and max(ratios) <= ALIKE * min(ratios)
