"""Baselines: what a value is judged by is not moved by what it judges."""

from __future__ import annotations

import math
import random

import pytest

from lumina.orchestrator.robust import DELAY, LEAST, OUTLIER, RESTART, WINDOW, Baseline, line, median, scale


def fed(values: list[float]) -> Baseline:
    baseline = Baseline()
    for value in values:
        baseline.take(value, baseline.z(value))
    return baseline


def noisy(n: int, level: float = 3.0, spread: float = 0.02) -> list[float]:
    draw = random.Random(0)
    return [level * math.exp(draw.gauss(0, spread)) for _ in range(n)]


def test_the_line_and_the_scale_are_those_of_the_data_and_no_outlier_moves_them() -> None:
    draw = random.Random(1)
    values = [1 + 0.01 * place + draw.gauss(0, 0.1) for place in range(300)]
    slope, start = line(values)
    assert slope == pytest.approx(0.01, abs=5e-4)
    assert start == pytest.approx(1, abs=0.05)
    assert scale(values, slope, start) == pytest.approx(0.1, rel=0.15)
    for place in range(0, 300, 10):
        values[place] = 1e6
    assert line(values)[0] == pytest.approx(0.01, abs=2e-3)
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5


def test_nothing_is_judged_before_enough_is_known() -> None:
    assert fed(noisy(LEAST + DELAY - 1)).z(30.0) is None
    assert fed(noisy(LEAST + DELAY)).z(30.0) is not None


def test_a_spike_is_no_part_of_what_judges_the_next() -> None:
    """OLMo-core's rule lets 56 of a jump's 60 steps pass, for the first four raise its own deviation."""
    baseline = fed(noisy(200))
    before = list(baseline.accepted)
    for _ in range(RESTART - 1):
        z = baseline.z(6.0)
        assert z is not None
        assert z > OUTLIER
        baseline.take(6.0, z)
    assert baseline.accepted == before


def test_another_level_that_stays_becomes_the_baseline() -> None:
    baseline = fed(noisy(200) + noisy(RESTART + LEAST, level=6.0))
    z = baseline.z(6.0)
    assert z is not None
    assert abs(z) < 3


def test_what_is_not_finite_never_enters() -> None:
    """One NaN made OLMo-core's rule skip 129 steps."""
    baseline = fed(noisy(100))
    for value in (math.nan, math.inf, -math.inf, 0.0):
        baseline.take(value, baseline.z(value))
    assert baseline == fed(noisy(100))
    assert baseline.z(math.nan) == math.inf


def test_a_slow_rise_is_judged_by_what_was_before_it() -> None:
    """The delay: 5 steps of a rise are no part of the line that judges the sixth."""
    values = noisy(WINDOW + DELAY)
    risen = values[:-DELAY] + [4.0] * DELAY
    assert Baseline([*map(math.log, risen)]).expected() == Baseline([*map(math.log, values)]).expected()


def test_memory_is_bounded() -> None:
    baseline = fed(noisy(2000))
    assert len(baseline.accepted) == WINDOW + DELAY
    assert 0.05 < baseline.spread < 0.07  # 2 % of 3
