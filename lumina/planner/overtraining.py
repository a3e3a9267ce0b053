"""Models smaller than the optimum of their training, trained for longer: what that costs, and when use pays it back.

Sardana et al. 2023 (2401.00448): training costs 6·N·D, reading or writing a token later 2·N. Of all models that reach
the same loss the one that costs least in both together is the smaller, the more it is used.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lumina.planner.laws import DEFAULT, FLOPS_A_PARAMETER, LAWS, Interval, Law
from lumina.planner.search import least

FLOPS_IN_USE = 2  # of a parameter and token


class Alternative(NamedTuple):
    """A smaller model of the same loss. FLOPs of its training and its use; it is cheaper from `pays_from` tokens on."""

    params: float
    tokens: float
    training: float
    use: float
    pays_from: float


def at_ratio(flops: float, ratio: float) -> tuple[float, float]:
    """Parameters and tokens of 6·N·D = `flops` at `ratio` tokens a parameter."""
    params = math.sqrt(flops / (FLOPS_A_PARAMETER * ratio))
    return params, ratio * params


def penalty(law: Law, flops: float, ratio: float) -> Interval:
    """Nats a token above the optimum of `flops`, for `ratio` tokens a parameter; covers 80 % of the law's draws."""

    def above(law: Law) -> float:
        return law.loss(*at_ratio(flops, ratio)) - law.loss(*law.optimum(flops))

    return law.interval(above)


def wasted(law: Law, flops: float, ratio: float) -> Interval:
    """The share of `flops` that the optimum would not have needed for the same loss; covers 80 % of the draws."""
    return law.interval(lambda law: 1 - law.flops_to(law.loss(*at_ratio(flops, ratio))) / flops)


def break_even(params: float, tokens: float, inference_tokens: float, law: Law | None = None) -> Alternative | None:
    """The smaller model, trained longer to the same loss, with the least 6·N·D + 2·N·`inference_tokens`.

    None if no smaller one is cheaper. That the text for it exists is not checked: see `planner.repeated`.
    """
    law = law or LAWS[DEFAULT]
    loss = law.loss(params, tokens)

    def training(smaller: float) -> float:
        return FLOPS_A_PARAMETER * smaller * law.tokens_to(smaller, loss)

    def whole(log_params: float) -> float:
        smaller = math.exp(log_params)
        return training(smaller) + FLOPS_IN_USE * smaller * inference_tokens

    too_small = math.pow(law.A / (loss - law.E), 1 / law.alpha)  # reaches the loss after endless tokens only
    chosen = math.exp(least(whole, math.log(too_small), math.log(params)))
    cost = FLOPS_A_PARAMETER * params * tokens + FLOPS_IN_USE * params * inference_tokens
    if chosen > 0.999 * params or whole(math.log(chosen)) >= cost:
        return None
    more = training(chosen) - FLOPS_A_PARAMETER * params * tokens
    return Alternative(
        params=chosen,
        tokens=law.tokens_to(chosen, loss),
        training=training(chosen),
        use=FLOPS_IN_USE * chosen * inference_tokens,
        pays_from=max(0.0, more / (FLOPS_IN_USE * (params - chosen))),
    )
