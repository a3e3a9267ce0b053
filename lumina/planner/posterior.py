"""The form of a loss curve fitted to the points there are: what is known, and how well.

    train(s)   = L0 + A·x^-α - C·y
    heldout(s) = train(s) + G + H·(s/end - now/end)

x is the area under the learning rates up to s over that of the planned run, y how far the rate has fallen from its
peak: the form of Tissue et al. 2024 (2408.11029) in which A and C are nats at the planned end. For a given α all is
linear and the posterior exact, so α has a grid. L0, A and G are free; C and H have priors from finished runs, for
before the decay begins nothing determines C. Points further off than `HUBER` count linearly (Huber 1964).

Legend: n points, k exponents, 5 coefficients L0, A, C, G, H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lumina.planner.prior import EXPONENTS, Prior

Array = NDArray[np.float64]

HUBER = 1.5  # standard deviations
COEFFICIENTS = 5
ROUNDS = 4  # of reweighting
FREE = 1e-6  # precision of what is free, in 1/nats²: keeps the equations solvable


@dataclass(frozen=True)
class Points:
    """Where losses were seen, (n,) each: `x` and `y` as above, `share` of the run, its mean `loss` over `count` steps;
    of an evaluation `heldout` is true."""

    x: Array
    y: Array
    share: Array
    loss: Array
    count: Array
    heldout: NDArray[np.bool_]


@dataclass(frozen=True)
class Place:
    """A step of a run, planned or not, as the form sees it."""

    x: float
    y: float
    share: float


@dataclass(frozen=True)
class Posterior:
    """For each exponent its weight (k,), mean (k, 5) and covariance (k, 5, 5) of the coefficients.

    `noise` is the standard deviation of one step's training loss, `now` the share of the run behind the last point.
    """

    weights: Array
    means: Array
    covariances: Array
    noise: float
    now: float

    @property
    def exponent(self) -> float:
        """The mean α."""
        return float(self.weights @ EXPONENTS)

    def at(self, place: Place, heldout: bool = False) -> tuple[float, float]:
        """Mean and standard deviation of the expected loss there."""
        return self._moments(self._row(place, heldout))

    def rise(self, first: Place, second: Place, heldout: bool = False) -> tuple[float, float]:
        """The same of how much higher the expected loss is at the second place than at the first."""
        return self._moments(self._row(second, heldout) - self._row(first, heldout))

    def _row(self, place: Place, heldout: bool) -> Array:
        one = np.ones_like(EXPONENTS)
        apart = [one, (place.share - self.now) * one] if heldout else [0 * one, 0 * one]
        return np.stack([one, place.x**-EXPONENTS, -place.y * one, *apart], axis=1)

    def _moments(self, rows: Array) -> tuple[float, float]:
        means = np.einsum("ki,ki->k", rows, self.means)
        variances = np.einsum("ki,kij,kj->k", rows, self.covariances, rows)
        mean = float(self.weights @ means)
        return mean, math.sqrt(float(self.weights @ (variances + (means - mean) ** 2)))


def fit(points: Points, prior: Prior) -> Posterior:
    """The posterior of at least two training points."""
    now = float(points.share.max())
    train = ~points.heldout
    level = float(np.mean(points.loss[train][-12:]))
    noise = _noise(points.loss[train], points.count[train])
    variances = np.where(points.heldout, (prior.wobble * level) ** 2, noise**2 / points.count)
    X = _design(points, now)
    means_before = np.array([0.0, 0.0, prior.gain * level, 0.0, 0.0])
    spreads = np.array([FREE**-0.5, FREE**-0.5, prior.gain_spread * level, FREE**-0.5, prior.drift * level])
    precision = np.diag(spreads**-2)
    weights = np.broadcast_to(1 / variances, X.shape[:2])
    for _ in range(ROUNDS):
        normal = np.einsum("kni,kn,knj->kij", X, weights, X) + precision
        right = np.einsum("kni,kn,n->ki", X, weights, points.loss) + precision @ means_before
        means = np.linalg.solve(normal, right[..., None])[..., 0]
        z = np.abs(points.loss - np.einsum("kni,ki->kn", X, means)) / np.sqrt(variances)
        weights = np.minimum(1.0, HUBER / np.maximum(z, HUBER)) / variances
    misfit = np.where(z < HUBER, z**2 / 2, HUBER * (z - HUBER / 2)).sum(axis=1)
    # Where points are further off the form than their noise explains, all is less certain by that (Birge 1932).
    excess = max(1.0, 2 * float(misfit.min()) / max(1, len(points.x) - COEFFICIENTS))
    misfit += (((means - means_before) / spreads) ** 2 / 2).sum(axis=1)
    scale = np.std(X[:, train, 1], axis=1)  # a flat prior on the nats that A·x^-α spans, whatever the exponent
    evidence = np.log(scale) - misfit / excess - np.linalg.slogdet(normal)[1] / 2 + np.log(np.array(prior.exponents))
    likely = np.exp(evidence - evidence.max())
    return Posterior(likely / likely.sum(), means, excess * np.linalg.inv(normal), noise, now)


def _design(points: Points, now: float) -> Array:
    """What multiplies the coefficients: (k, n, 5)."""
    shape = (len(EXPONENTS), len(points.x))
    columns = (
        np.ones(shape),
        points.x[None] ** -EXPONENTS[:, None],
        np.broadcast_to(-points.y, shape),
        np.broadcast_to(points.heldout.astype(np.float64), shape),
        np.broadcast_to(points.heldout * (points.share - now), shape),
    )
    return np.stack(columns, axis=2)


def _noise(losses: Array, counts: Array) -> float:
    """The standard deviation of one step's loss, from neighbouring bins: a trend hardly counts, outliers do not."""
    differences = np.diff(losses) / np.sqrt(1 / counts[1:] + 1 / counts[:-1])
    return max(1e-6, 1.4826 * float(np.median(np.abs(differences))))
