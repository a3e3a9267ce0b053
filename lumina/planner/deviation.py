"""Whether the newest losses are what they should be: a residual in nats, and in standard deviations.

At equal tokens a parameter and schedule the loss curves of models of different size coincide once each is divided by
its final loss, and a departure from that is an early alarm (2509.25087). So the reference is, where there is one, the
curve of an own finished run of the same sort; else the form that the run's own earlier losses have. Either way the
newest losses are held against what those before them lead one to expect: nothing is judged by itself.

`deviation` is a pure function of a window of points, for whoever watches a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.planner.posterior import Place, Points, fit
from lumina.planner.prior import Prior

Array = NDArray[np.float64]

SHARES: Array = np.linspace(0.05, 1.0, 20)  # of a run, at which a reference curve is kept
OWN = "its own earlier losses"


class Deviation(NamedTuple):
    """`nats` above what was expected of the newest `points`, in standard deviations `z`, and `against` what."""

    nats: float
    z: float
    points: int
    against: str


@dataclass(frozen=True)
class Reference:
    """A finished run's training losses at `SHARES` of its steps, over the last of them."""

    name: str
    losses: tuple[float, ...]

    def at(self, share: Array) -> Array:
        losses: Array = np.interp(share, SHARES, np.array(self.losses))
        return losses


def deviation(points: Points, newest: int, prior: Prior, reference: Reference | None = None) -> Deviation | None:
    """How far the last `newest` training points are from what those before them and the reference lead one to expect.

    None if those before are fewer than twice as many.
    """
    train = np.flatnonzero(~points.heldout)
    before, last = train[:-newest], train[-newest:]
    if newest < 1 or len(before) < 2 * newest:
        return None
    weights = points.count[last] / points.count[last].sum()
    seen = float(weights @ points.loss[last])
    found = fit(_chosen(points, before), prior)
    noise = found.noise / math.sqrt(points.count[last].sum())
    if reference is None:
        middle = Place(*(float(weights @ values[last]) for values in (points.x, points.y, points.share)))
        expected, spread = found.at(middle)
        ahead = prior.ahead * found.rise(_last(points, before), middle)[0]
        return Deviation(seen - expected, (seen - expected) / math.hypot(spread, noise, ahead), newest, OWN)
    ratios = points.loss / reference.at(points.share)
    scale, off = _level(ratios[before], points.count[before])
    expected = float(weights @ (scale * reference.at(points.share[last])))
    spread = math.hypot(noise, off * expected)
    return Deviation(seen - expected, (seen - expected) / spread, newest, reference.name)


def _level(ratios: Array, counts: Array) -> tuple[float, float]:
    """The scale between two curves, by the newer half of what is known, and how far it wanders (relative)."""
    half = slice(len(ratios) // 2, None)
    scale = float(np.average(ratios[half], weights=counts[half]))
    thirds = [float(part.mean()) for part in np.array_split(ratios, 3)]
    return scale, float(np.std(thirds, ddof=1)) / scale


def _last(points: Points, chosen: NDArray[np.intp]) -> Place:
    return Place(*(float(values[chosen[-1]]) for values in (points.x, points.y, points.share)))


def _chosen(points: Points, chosen: NDArray[np.intp]) -> Points:
    fields = ("x", "y", "share", "loss", "count", "heldout")
    return replace(points, **{name: getattr(points, name)[chosen] for name in fields})


def normalised(steps: Array, losses: Array, end: int) -> tuple[float, ...]:
    """A finished run's losses at `SHARES`, over the last: what a `Reference` holds. Each is a mean around its place."""
    share, half = steps / end, (SHARES[1] - SHARES[0]) / 2
    means = [float(losses[np.abs(share - at) <= half + 1e-9].mean()) for at in SHARES]
    return tuple(mean / means[-1] for mean in means)
