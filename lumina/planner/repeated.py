"""Text that is read more than once: what another epoch is worth, and when a larger model or more text is worth more.

Muennighoff et al. 2023 (2305.16264), with the constants of its code, fitted to C4, models up to 9B parameters and
900B tokens. What is read again, and parameters beyond the optimum of the unique tokens, count less and less:

    D' = U_D + U_D·R_D*·(1 - exp(-R_D/R_D*))      R_D = D/U_D - 1      R_D* = 15.387756
    N' = U_N + U_N·R_N*·(1 - exp(-R_N/R_N*))      R_N = N/U_N - 1      R_N* = 5.309743
    L  = E + A/N'^α + B/D'^β                      U_N = min(N, the optimum for U_D)

Its losses are those of C4; for another text they say which way is better, not how good it will be.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lumina.planner.laws import FLOPS_A_PARAMETER, LAWS
from lumina.planner.search import least

LAW = LAWS["muennighoff"]
EPOCHS_DECAY = 15.387756  # R_D*
PARAMS_DECAY = 5.309743  # R_N*
NEARLY_FREE, TOO_MANY = 4, 16  # epochs
GRID = 200  # steps of the first look for the best split


class Split(NamedTuple):
    """A way to spend compute on so many unique tokens: `tokens` are all that are read, `loss` is that of C4."""

    params: float
    tokens: float
    epochs: float
    loss: float


class Next(NamedTuple):
    """The loss of C4 after twice the compute, spent on one of three things alone."""

    params: float
    data: float
    epochs: float

    def best(self, data: bool = True) -> str:
        """params, data or epochs; without `data`, which cannot be had, the better of the others."""
        names = self._fields if data else ("params", "epochs")
        return min(names, key=lambda name: float(getattr(self, name)))


def effective_tokens(unique: float, tokens: float) -> float:
    """The fresh tokens that are worth as much as `tokens` of which only `unique` differ (D')."""
    unique = min(unique, tokens)
    return unique * _worth(tokens / unique, EPOCHS_DECAY)


def effective_params(params: float, unique: float) -> float:
    """The parameters that count of `params`, on `unique` tokens (N')."""
    useful = min(params, LAW.params_for(unique))
    return useful * _worth(params / useful, PARAMS_DECAY)


def loss(params: float, unique: float, tokens: float) -> float:
    """Nats a token, on C4, of `params` (all of them) after `tokens`, of which `unique` differ."""
    unique = min(unique, tokens)
    return LAW.loss(effective_params(params, unique), effective_tokens(unique, tokens))


def epoch_value(epochs: float) -> float:
    """What a token of so many epochs is worth on average, as a share of a fresh one: 4 -> 0.93."""
    return _worth(epochs, EPOCHS_DECAY) / epochs


def next_epoch_value(epochs: float) -> float:
    """What a token of another epoch is worth, after so many, as a share of a fresh one."""
    return _worth(epochs + 1, EPOCHS_DECAY) - _worth(epochs, EPOCHS_DECAY)


def best_split(flops: float, unique: float) -> Split:
    """The parameters, and so the epochs, of the least loss for 6·N·D = `flops` on `unique` tokens."""
    pairs = flops / FLOPS_A_PARAMETER

    def at(log_params: float) -> float:
        params = math.exp(log_params)
        return loss(params, unique, pairs / params)

    middle, wide = math.log(LAW.optimum(flops).params), math.log(1e4)
    best = min((middle + wide * (i / GRID - 0.5) for i in range(GRID + 1)), key=at)
    params = math.exp(least(at, best - wide / GRID, best + wide / GRID))
    tokens = pairs / params
    return Split(params, tokens, tokens / unique, loss(params, unique, tokens))


def next_best(params: float, unique: float, tokens: float) -> Next:
    """More parameters, more data or more epochs? The loss of each with twice the compute of this run."""
    return Next(
        params=loss(2 * params, unique, tokens),
        data=loss(params, 2 * min(unique, tokens), 2 * tokens),
        epochs=loss(params, min(unique, tokens), 2 * tokens),
    )


def warnings(unique: float, tokens: float) -> list[str]:
    """A sentence beyond 4 epochs, and a sharper one beyond 16, with the law's own numbers."""
    epochs = tokens / unique
    if epochs <= NEARLY_FREE:
        return []
    values = (
        f"{epochs:.1f} epochs: a token is worth {epoch_value(epochs):.0%} of a fresh one, one of another epoch "
        f"{next_epoch_value(epochs):.0%} (Muennighoff et al. 2023)"
    )
    if epochs <= TOO_MANY:
        return [f"{values}; up to {NEARLY_FREE} epochs it is {epoch_value(NEARLY_FREE):.0%}"]
    left = next_epoch_value(TOO_MANY)
    return [f"{values}; after {TOO_MANY} epochs another is worth {left:.0%}: weigh more text or a larger model"]


def _worth(times: float, decay: float) -> float:
    """What something that is there `times` over counts, in units of one."""
    return 1 - decay * math.expm1((1 - times) / decay) if times > 1 else times
