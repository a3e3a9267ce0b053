"""A law of one's own: L = E + A/N^α + B/D^β through measured points, with intervals.

Approach 3 of Hoffmann et al. 2022 as Besiroglu et al. 2024 mended it: the Huber loss (δ = 1e-3) of the logarithm of
the loss, summed and not averaged (an average is so small that optimizers stop early), from many initial values.

    log L = log(e^e + e^(a - α·log N) + e^(b - β·log D))        p = (e, a, b, α, β)

log N and log D are taken from their means, which makes a and α, b and β nearly independent. Minimised by damped
Gauss-Newton steps on reweighted squares: a residual r counts min(1, δ/|r|), which majorises the Huber loss, so that no
step raises it. All initial values, and all resampled sets, are one batch. No scipy.

Shapes: P points, R fits at once, 5 constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.errors import UserError
from lumina.planner.laws import OWN, Counts, Draw, Law, Span
from lumina.planner.points import Point, count_duplicates, runs_to_make, sizes_of

DELTA = 1e-3  # of log L: Hoffmann et al. 2022, appendix D.3
LEAST = 3  # sizes, and numbers of tokens of each
SPREAD = 3.0  # factor from the smallest to the largest of both: over less a power is as good as any other
EXPONENTS = (0.02, 2.0)  # published ones lie within 0.076 (Kaplan et al. 2020) and 0.37 (Besiroglu et al. 2024)
ABOVE_NOISE = 3.0  # standard deviations of the residuals by which each term has to change the loss
STEEP = 20.0  # the largest exponent of a draw: some reach far where points tell little, and powers have to be finite
LOST = 0.2  # share of draws that may follow no law: with more of them an 80 % interval covers nothing
RESAMPLED = 50  # points from which on whole points are drawn again
STEPS = 300
CONVERGED = 1e-12  # relative gain of a step
FLOOR = 1e-3  # of the least loss: a smaller E is none
OFF = 0.01  # of log L, in the median; the 240 points of Besiroglu et al. are off by 0.3 %
GRID = np.linspace(0.1, 1.0, 8)  # initial exponents; E, A and B follow from each pair by least squares

Array = NDArray[np.float64]


class Data(NamedTuple):
    """Logarithms of parameters and tokens, from their means, and those means."""

    n_P: Array
    d_P: Array
    mean_n: float
    mean_d: float


def fit(
    points: Sequence[Point],
    bootstrap: int = 1000,
    seed: int = 0,
    source: str = "points of the user",
    counts: Counts = "active",
    traits: Mapping[str, str] | None = None,
) -> Law:
    """The law through `points`, with `bootstrap` draws of its constants and the range it was fitted to.

    `traits` are what its runs have in common.

    From 50 points on, a draw is a fit to points drawn again with repetition, as Besiroglu et al. did. Fewer points do
    not survive that (of nine, a third is missing each time): there a draw is a fit to the law plus normal noise as
    large as the residuals, whose size is drawn as well (s²·(P-5)/χ²), as it is not known better.

    Raises `UserError` if the points do not determine five constants, with runs that would, or follow no such law.
    """
    _require(points)
    params_P, tokens_P, loss_P = np.array(points, dtype=np.float64).T
    n_P, d_P, y_P = np.log(params_P), np.log(tokens_P), np.log(loss_P)
    data = Data(n_P - n_P.mean(), d_P - d_P.mean(), float(n_P.mean()), float(d_P.mean()))
    every_RP = np.ones((1, len(points)))
    found_R5, huber_R = descend(_starts(data, y_P), y_P, every_RP, data)
    best_5 = found_R5[np.argmin(huber_R)]
    (constants,) = _constants(best_5[None], data)
    _require_law(constants)
    log_P, shares_3P = (found[..., 0, :] for found in _predict(best_5[None], data))
    residuals_P = y_P - log_P
    _require_terms(shares_3P * np.exp(log_P), loss_P, residuals_P)
    draws = _draws(best_5, y_P, residuals_P, data, bootstrap, np.random.default_rng(seed))
    if len(draws) < (1 - LOST) * bootstrap:
        raise UserError(
            f"the points do not determine a law: {bootstrap - len(draws)} of {bootstrap} refits to others as noisy "
            "follow none",
            "train larger models, and all of them for longer, so that their losses differ by more than noise",
        )
    horizons = len({round(float(d), 2) for d in d_P})
    facts = [
        f"{len(points)} points of {len(sizes_of(points))} sizes and {horizons} numbers of tokens",
        f"off the law by {np.median(np.abs(residuals_P)):.2%} (median) and {np.abs(residuals_P).max():.2%} (most)",
    ]
    E, A, B, alpha, beta = constants
    if FLOOR * loss_P.min() > E:
        facts.append(
            "doubtful: E falls to nothing, for the points do not show where the loss ends, as larger, longer ones would"
        )
    if np.median(np.abs(residuals_P)) > OFF:
        facts.append(f"doubtful: most points are off by more than {OFF:.0%}, where a law that holds was off by 0.3%")
    if len(draws) < bootstrap:
        facts.append(f"{bootstrap - len(draws)} of {bootstrap} draws followed no law and are left out")
    span = Span((float(params_P.min()), float(params_P.max())), (float(tokens_P.min()), float(tokens_P.max())))
    shared = tuple((traits or {}).items())
    return Law(OWN, source, counts, E, A, B, alpha, beta, tuple(draws), span, "; ".join(facts), shared)


def descend(p_R5: Array, y_RP: Array, weights_RP: Array, data: Data) -> tuple[Array, Array]:
    """Minimises the weighted sum of Huber losses of `y_RP` (log L) from each row of `p_R5`.

    Returns the constants and what is left of the sum, R each. `y_RP` and `weights_RP` may be one row for all.
    """
    R, P = len(p_R5), len(data.n_P)
    y_RP, weights_RP = np.broadcast_to(y_RP, (R, P)), np.broadcast_to(weights_RP, (R, P))
    p_R5, damping_R, going_R = p_R5.copy(), np.full(R, 1e-3), np.ones(R, dtype=bool)
    huber_R = _huber(_predict(p_R5, data)[0] - y_RP, weights_RP)
    for _ in range(STEPS):
        rows = np.flatnonzero(going_R)
        if not len(rows):
            break
        y, weights, damping = y_RP[rows], weights_RP[rows], damping_R[rows]
        tried = p_R5[rows] + _step(p_R5[rows], y, weights, damping, data)
        left = _huber(_predict(tried, data)[0] - y, weights)
        better = left < huber_R[rows]
        gain = 1 - left / np.maximum(huber_R[rows], np.finfo(np.float64).tiny)
        p_R5[rows[better]], huber_R[rows[better]] = tried[better], left[better]
        damping_R[rows] = np.where(better, damping / 5, damping * 5)
        going_R[rows] = np.where(better, gain > CONVERGED, damping < 1e8)
    return p_R5, huber_R


def _step(p_R5: Array, y_RP: Array, weights_RP: Array, damping_R: Array, data: Data) -> Array:
    """The damped Gauss-Newton step of the reweighted squares."""
    log_RP, shares = _predict(p_R5, data)
    residual_RP = log_RP - y_RP
    J_RP5 = np.stack([shares[0], shares[1], shares[2], -shares[1] * data.n_P, -shares[2] * data.d_P], axis=-1)
    counted_RP = weights_RP * np.minimum(1, DELTA / np.maximum(np.abs(residual_RP), DELTA))
    turned_R5P = J_RP5.swapaxes(1, 2)
    H_R55 = turned_R5P @ (J_RP5 * counted_RP[..., None])
    slope_R5 = (turned_R5P @ (counted_RP * residual_RP)[..., None])[..., 0]
    diagonal_R5 = np.einsum("rii->ri", H_R55)
    H_R55 = H_R55 + np.eye(5) * (damping_R[:, None] * diagonal_R5 + 1e-15)[:, :, None]
    return np.linalg.solve(H_R55, -slope_R5[..., None])[..., 0]


def _predict(p_R5: Array, data: Data) -> tuple[Array, Array]:
    """log L of each point, RP, and the shares of E, A/N^α and B/D^β in L, 3RP."""
    e, a, b, alpha, beta = p_R5.T[:, :, None]
    terms = np.stack([np.broadcast_to(e, (len(p_R5), len(data.n_P))), a - alpha * data.n_P, b - beta * data.d_P])
    with np.errstate(over="ignore", invalid="ignore"):  # of a step far off, which is not taken
        largest = terms.max(axis=0)
        shares = np.exp(terms - largest)
        total = shares.sum(axis=0)
        return largest + np.log(total), shares / total


def _huber(residual_RP: Array, weights_RP: Array) -> Array:
    size = np.abs(residual_RP)
    with np.errstate(over="ignore", invalid="ignore"):
        each = np.where(size <= DELTA, residual_RP**2 / 2, DELTA * (size - DELTA / 2))
        left: Array = (weights_RP * each).sum(axis=-1)
    return left


def _starts(data: Data, y_P: Array) -> Array:
    """For each pair of exponents the E, A, B of the least relative squares, kept above nothing."""
    loss_P, starts = np.exp(y_P), []
    for alpha in GRID:
        for beta in GRID:
            terms = np.stack([np.ones_like(y_P), np.exp(-alpha * data.n_P), np.exp(-beta * data.d_P)], axis=1)
            found, *_ = np.linalg.lstsq(terms / loss_P[:, None], np.ones_like(y_P), rcond=None)
            starts.append([*np.log(np.maximum(found, 1e-3 * loss_P.min())), alpha, beta])
    return np.array(starts)


def _constants(p_R5: Array, data: Data) -> list[Draw]:
    """E, A, B, α, β of each row."""
    e, a, b, alpha, beta = p_R5.T
    with np.errstate(over="ignore"):
        A, B = np.exp(a + alpha * data.mean_n), np.exp(b + beta * data.mean_d)
        rows = np.stack([np.exp(e), A, B, alpha, beta], axis=1)
    return [(float(E), float(A), float(B), float(x), float(y)) for E, A, B, x, y in rows]


def _draws(
    best_5: Array, y_P: Array, residuals_P: Array, data: Data, count: int, random: np.random.Generator
) -> list[Draw]:
    """Refits from the best constants; those that are no law are left out."""
    P = len(y_P)
    if P >= RESAMPLED:
        y_RP = np.broadcast_to(y_P, (count, P))
        weights_RP = random.multinomial(P, np.full(P, 1 / P), size=count).astype(np.float64)
    else:
        free = P - 5
        size_R1 = np.sqrt((residuals_P**2).sum() / random.chisquare(free, size=(count, 1)))
        y_RP = y_P - residuals_P + size_R1 * random.standard_normal((count, P))
        weights_RP = np.ones((count, P))
    start_5 = best_5.copy()
    start_5[0] = max(start_5[0], y_P.min() + np.log(0.1))  # from an E of nothing no step leads away
    found_R5, _ = descend(np.repeat(start_5[None], count, axis=0), y_RP, weights_RP, data)
    return [draw for draw in _constants(found_R5, data) if _is_law(draw, STEEP)]


# -- what is refused --------------------------------------------------------------------------------------------------


def _is_law(constants: Draw, steepest: float = EXPONENTS[1]) -> bool:
    """E may be nothing."""
    E, A, B, alpha, beta = constants
    powers = EXPONENTS[0] <= min(alpha, beta) and max(alpha, beta) <= steepest
    return 0 <= E < np.inf and 0 < A < np.inf and 0 < B < np.inf and powers


def _require_law(constants: Draw) -> None:
    E, A, B, alpha, beta = constants
    if not _is_law(constants):
        raise UserError(
            f"the points follow no law L = E + A/N^α + B/D^β: E {E:.3g}, A {A:.3g}, B {B:.3g}, α {alpha:.3g}, "
            f"β {beta:.3g}; exponents of a law lie within {EXPONENTS[0]:g} and {EXPONENTS[1]:g}",
            "check that the losses are held out, in nats a token, at the end of a decay, and fall with both",
        )


def _require_terms(terms_3P: Array, loss_P: Array, residuals_P: Array) -> None:
    """Raises `UserError` where parameters, or tokens, change the loss by less than the points are off the law."""
    noise = float(np.sqrt((residuals_P**2).sum() / max(1, len(residuals_P) - 5)))
    for what, term_P in (("parameters", terms_3P[1]), ("tokens", terms_3P[2])):
        change = float((term_P.max() - term_P.min()) / loss_P.mean())
        if change < ABOVE_NOISE * noise:
            raise UserError(
                f"{what} change the loss by {change:.2%} in all, and the points are off any law by {noise:.2%}: "
                "they do not show how it depends on them",
                f"add runs that differ more in {what}, and look for what else differs between the runs",
            )


def _require(points: Sequence[Point]) -> None:
    """Raises `UserError` unless the points determine five constants."""
    if wrong := [point for point in points if not all(np.isfinite(x) and x > 0 for x in point)]:
        raise UserError(
            f"{len(wrong)} points are not finite and positive, the first {tuple(wrong[0])}",
            "leave out runs that diverged",
        )
    if twice := count_duplicates(points):
        raise UserError(f"{twice} points are there twice: each would count double", "give each run once")
    sizes = sizes_of(points)
    enough = [size for size, horizons in sizes.items() if len(horizons) >= LEAST]
    if len(enough) < LEAST:
        raise UserError(
            f"{len(points)} points of {len(sizes)} sizes, {len(enough)} of them at {LEAST} or more numbers of tokens: "
            f"five constants need {LEAST} sizes at {LEAST} each",
            "run these as well, from small to large:\n    " + "\n    ".join(runs_to_make(sizes)),
        )
    _require_spread(enough, sizes)


def _require_spread(enough: Sequence[float], sizes: Mapping[float, Sequence[float]]) -> None:
    """Both have to differ, tokens at equal size: where both only grow together, either may be why the loss falls."""
    if (times := max(enough) / min(enough)) < SPREAD:
        raise UserError(
            f"the sizes differ by a factor of {times:.3g}, from {min(enough):.3g} to {max(enough):.3g} parameters",
            f"add {LEAST} runs of {SPREAD * min(enough):.2g} parameters or more: a law needs a factor of {SPREAD:g}",
        )
    widest = sorted((max(sizes[size]) / min(sizes[size]) for size in enough), reverse=True)
    if widest[LEAST - 1] < SPREAD:
        raise UserError(
            f"tokens differ by a factor of {widest[LEAST - 1]:.3g} at equal size",
            f"train {LEAST} sizes for numbers of tokens that differ by a factor of {SPREAD:g} or more",
        )
