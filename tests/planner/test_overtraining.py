"""Smaller models trained for longer."""

from __future__ import annotations

import numpy as np
import pytest

from lumina.planner import overtraining
from lumina.planner.laws import LAWS

LAW = LAWS["besiroglu"]
N, D = LAW.optimum(1e21)


def test_the_optimum_has_no_penalty_and_every_other_ratio_has() -> None:
    assert overtraining.penalty(LAW, 1e21, D / N).mid == pytest.approx(0, abs=1e-9)
    for ratio in (1, 200, 1900):
        low, mid, high = overtraining.penalty(LAW, 1e21, ratio)
        assert 0 < low < mid < high
        params, tokens = overtraining.at_ratio(1e21, ratio)
        assert (6 * params * tokens, tokens / params) == pytest.approx((1e21, ratio))
        assert mid == pytest.approx(LAW.loss(params, tokens) - LAW.loss(N, D))
        share = overtraining.wasted(LAW, 1e21, ratio).mid
        assert LAW.loss(*LAW.optimum((1 - share) * 1e21)) == pytest.approx(LAW.loss(params, tokens))


@pytest.mark.parametrize("use", [1e11, 1e12, 1e14])
def test_the_alternative_is_the_cheapest_of_the_same_loss(use: float) -> None:
    found = overtraining.break_even(N, D, use)
    assert found is not None
    assert LAW.loss(found.params, found.tokens) == pytest.approx(LAW.loss(N, D))
    assert (found.training, found.use) == pytest.approx((6 * found.params * found.tokens, 2 * found.params * use))

    def cost(params: float) -> float:
        return 6 * params * LAW.tokens_to(params, LAW.loss(N, D)) + 2 * params * use

    assert found.training + found.use <= min(map(cost, N * np.geomspace(0.05, 1, 2000))) * (1 + 1e-9)
    assert found.training + found.use < 6 * N * D + 2 * N * use
    # used for just so many tokens, both cost the same
    even = found.pays_from
    assert found.training + 2 * found.params * even == pytest.approx(6 * N * D + 2 * N * even)
    assert even < use


def test_the_more_it_is_used_the_smaller_it_is() -> None:
    sizes = [found.params for use in (1e10, 1e12, 1e14) if (found := overtraining.break_even(N, D, use))]
    assert len(sizes) == 3
    assert N > sizes[0] > sizes[1] > sizes[2]


def test_what_is_never_used_is_best_as_it_is() -> None:
    assert overtraining.break_even(N, D, 0) is None
    small = overtraining.break_even(8 * N, D / 8, 0)  # far from the optimum: half the size is cheaper without any use
    assert small is not None
    assert small.pays_from == 0
