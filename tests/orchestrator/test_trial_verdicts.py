"""What a trial proves, and what it costs: sizes, intervals, winners."""

from __future__ import annotations

import math
import random

import pytest

from lumina.orchestrator import trial
from lumina.orchestrator.trial import ALPHA, LEAST, NOISE, PAIRS, Size, detectable, judge, quantile, size, winner


@pytest.mark.parametrize(
    ("p", "degrees", "t"),
    [(0.95, 1, 6.3138), (0.95, 2, 2.92), (0.975, 3, 3.1824), (0.99, 4, 3.7469), (0.975, 5, 2.5706), (0.995, 8, 3.3554)],
)
def test_quantiles_are_those_of_the_tables(p: float, degrees: int, t: float) -> None:
    assert quantile(p, degrees) == pytest.approx(t, abs=1e-3)


def test_a_candidate_wins_if_its_bound_is_above_zero_and_its_gain_above_the_noise() -> None:
    control = [2.0, 2.1, 2.05]
    won = judge("a", control, [1.9, 2.0, 1.94], 1)
    assert won.won
    assert won.mean == pytest.approx(0.1033, abs=1e-4)
    assert won.low == pytest.approx(won.mean - 2.92 * won.noise / math.sqrt(3), abs=1e-5)
    assert not judge("a", control, [1.9, 2.08, 2.04], 1).won  # a mean of 0.04, and pairs 0.05 apart
    assert not judge("a", control, [1.9, 2.08, 1.9], 8).won  # of many candidates one is lucky
    assert not judge("a", control, [end + 0.1 for end in control], 1).won


def test_a_tie_does_nothing_however_sure_it_is() -> None:
    control = [2.0, 2.1, 2.05]
    assert not judge("same", control, control, 1).won
    sure = [end - 0.9 * LEAST for end in control]
    assert judge("sure", control, sure, 1).low > 0
    assert not judge("sure", control, sure, 1).won


def test_noise_alone_wins_no_more_often_than_it_may() -> None:
    """Pairs without any difference but noise far above a tie: the share of trials that something wins."""
    draw = random.Random(1)
    won = 0
    for _ in range(2000):
        control = [draw.gauss(2, 0.1) for _ in range(4)]
        judged = [judge(str(n), control, [draw.gauss(2, 0.1) for _ in range(4)], 3) for n in range(3)]
        won += winner(judged) is not None
    assert won / 2000 <= ALPHA


def test_what_does_not_end_loses_and_what_ends_where_the_control_does_not_wins() -> None:
    nan, inf = math.nan, math.inf
    assert not judge("a", [2.0, 2.0, 2.0], [1.0, nan, 1.0], 1).won
    assert not judge("a", [nan, nan, nan], [nan, 1.0, 1.0], 1).won
    assert judge("a", [nan, inf, nan], [2.0, 2.0, 2.0], 1).won
    assert judge("a", [nan, 2.5, 2.5], [2.0, 2.1, 2.0], 1).won
    assert not judge("a", [nan, 2.0, 2.0], [2.0, 2.0, 2.1], 1).won
    assert not judge("a", [nan, 2.0, 2.0], [1.99, 1.9999999, 1.9999999], 1).won  # ties beside


def test_a_tie_of_winners_goes_to_the_first_and_a_better_one_has_to_prove_it() -> None:
    control = [2.0, 2.1, 2.05, 2.0]
    first = judge("first", control, [1.9, 2.0, 1.95, 1.9], 2)
    better = judge("better", control, [1.893, 1.993, 1.943, 1.893], 2)  # by less than a tie
    best = judge("best", control, [1.8, 1.9, 1.85, 1.8], 2)
    chosen = [winner(judged) for judged in ([first, better], [better, first], [first, best], [best, first])]
    assert [one.name if one else "" for one in chosen] == ["first", "better", "best", "best"]
    assert winner([judge("same", control, control, 1)]) is None
    between = judge("between", control, [1.893, 1.993, 1.943, 1.893], 3)
    last = judge("last", control, [1.886, 1.986, 1.936, 1.886], 3)  # beats the first, and not the one between
    chosen = winner([judge("first", control, [1.9, 2.0, 1.95, 1.9], 3), between, last])
    assert chosen == between


def test_a_trial_is_as_long_as_rest_and_budget_allow() -> None:
    long = size(1, NOISE, 20_000, 10_000)
    assert long == Size(trial.LONGEST, round(trial.PROBE * trial.LONGEST), PAIRS)
    short = size(1, NOISE, 20_000, 2000)
    assert isinstance(short, Size)
    assert short.steps == trial.SHORTEST
    assert isinstance(size(1, NOISE, 20_000, 2000, settle=300), str)  # no arm is shorter than the optimizer's memory
    slow = size(1, NOISE, 20_000, 1e6, settle=900)
    assert isinstance(slow, Size)
    assert slow.steps == 900


def test_noise_asks_for_more_pairs_until_more_would_not_see_more() -> None:
    pairs = [found.pairs for noise in (0.002, 0.005, 0.05) if isinstance(found := size(3, noise, 9000, 1e6), Size)]
    assert pairs == [3, 4, 4]
    assert detectable(3, 2, NOISE) <= LEAST  # two candidates need no more pairs than one
    assert detectable(3, 3, 0.002) <= LEAST
    assert detectable(4, 3, 0.05) == pytest.approx(0.1)


def test_what_does_not_fit_is_refused_with_the_figures() -> None:
    poor, late = size(2, NOISE, 9000, 700.4), size(2, NOISE, 200, 1e6)
    assert isinstance(poor, str)
    assert "steps' worth of compute, and 700 are left of orchestrator.trial.budget" in poor
    assert late == "a trial and its probation take 300 steps, and the run has 200 left"


def test_the_cost_is_that_of_all_arms_less_the_winner_s_steps() -> None:
    arms = 3 * 3 * 125 - 100  # pairs x arms x (steps + probe): design 5
    probation = 225 + 25  # the control goes on, and later the winner is probed
    again = 100  # of a winner that did not lead before the last pair
    tenth = [math.ceil(round(1.1 * (total + again + probation), 6)) for total in (arms, arms + 125)]  # evaluates
    assert [Size(100, 25, 3).cost(2), Size(100, 25, 3).cost(2, placebo=True)] == tenth
    assert Size(100, 100, 3).cost(1, placebo=True) == 1870  # one candidate leads from the start
