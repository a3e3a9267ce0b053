"""What trials taught: the posterior against closed forms, the order of arms, and verdicts as a run's log tells them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.errors import UserError
from lumina.events import as_line, parse
from lumina.orchestrator.confidence import Confidence, Verdict, below, quantile, verdicts

SLOW, FAST = "lr.scale down", "lr.scale up"


def verdict(fault: str, action: str, won: bool, step: int = 100, run: str = "a", gain: float = 0.01) -> Verdict:
    return Verdict(fault, action, won, gain, gain - 0.01, 0.004, "dense", run, step)


def several(fault: str, action: str, won: int, lost: int) -> list[Verdict]:
    return [verdict(fault, action, i < won, step=i, run=f"{fault} {action}") for i in range(won + lost)]


# -- the distribution --------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.001, 0.999))
def test_with_whole_parameters_it_is_the_upper_part_of_a_binomial(alpha: int, beta: int, x: float) -> None:
    n = alpha + beta - 1
    expected = sum(math.comb(n, k) * x**k * (1 - x) ** (n - k) for k in range(alpha, n + 1))
    assert below(x, alpha, beta) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.95])
def test_quantiles_with_closed_forms(p: float) -> None:
    assert quantile(p, 1, 1) == pytest.approx(p, abs=1e-12)
    assert quantile(p, 5.5, 1) == pytest.approx(p ** (1 / 5.5), abs=1e-12)
    assert quantile(p, 1, 0.3) == pytest.approx(1 - (1 - p) ** (1 / 0.3), abs=1e-9)
    assert quantile(p, 0.5, 0.5) == pytest.approx(math.sin(math.pi * p / 2) ** 2, abs=1e-12)  # the arcsine law


@given(st.floats(0.01, 1e4), st.floats(0.01, 1e4), st.floats(0.01, 0.99))
def test_the_quantile_inverts_it_and_it_rises(alpha: float, beta: float, p: float) -> None:
    x = quantile(p, alpha, beta)
    assert below(x - 1e-9, alpha, beta) <= p + 1e-6
    assert below(x + 1e-9, alpha, beta) >= p - 1e-6


# -- the posterior and the order ---------------------------------------------------------------------------------------


def test_of_what_nobody_tried_nothing_is_known() -> None:
    known = Confidence()
    assert known.posterior("drift", SLOW) == (0.5, 0.5)
    assert known.interval("drift", SLOW) == pytest.approx((0.00616, 0.99384), abs=1e-5)


def test_its_own_verdicts_count_whole_and_those_on_other_faults_as_two_at_most() -> None:
    known = Confidence([*several("drift", SLOW, 3, 1), *several("spike", SLOW, 0, 9)])
    assert known.posterior("drift", SLOW) == pytest.approx((0.5 + 3, 0.5 + 1 + 2))
    assert known.posterior("plateau", SLOW) == pytest.approx((0.5 + 2 * 3 / 13, 0.5 + 2 * 10 / 13))
    assert known.posterior("drift", FAST) == (0.5, 0.5)  # another action
    low, high = known.interval("drift", SLOW)
    assert low < known.mean("drift", SLOW) < high


def test_what_always_won_elsewhere_is_not_certain_here() -> None:
    known = Confidence(several("spike", SLOW, 100, 0))
    assert known.mean("drift", SLOW) == pytest.approx(2.5 / 3)
    assert known.interval("drift", SLOW)[0] < 0.5
    assert Confidence(several("spike", SLOW, 0, 1)).posterior("drift", SLOW) == (0.5, 1.5)  # one is one


def test_the_best_come_first_equal_ones_as_given_and_none_is_left_out() -> None:
    known = Confidence([*several("drift", SLOW, 3, 1), *several("drift", "clip down", 0, 4)])
    arms = ["clip down", FAST, "weight_decay up", SLOW]
    assert known.order("drift", arms) == [SLOW, FAST, "weight_decay up", "clip down"]
    assert known.order("spike", arms) == [SLOW, FAST, "weight_decay up", "clip down"]  # by what they did elsewhere
    assert Confidence().order("drift", arms) == arms


@given(st.permutations(several("drift", SLOW, 2, 3) + several("spike", FAST, 1, 1)))
def test_it_does_not_matter_in_which_order_they_came(shuffled: list[Verdict]) -> None:
    arms = [FAST, SLOW, "clip down"]
    once = Confidence(several("drift", SLOW, 2, 3) + several("spike", FAST, 1, 1))
    assert Confidence(shuffled).order("drift", arms) == once.order("drift", arms)


def test_an_experiment_counts_once_and_its_last_verdict_holds() -> None:
    known = Confidence([verdict("drift", SLOW, True), verdict("drift", SLOW, False)])
    assert [one.won for one in known.verdicts] == [False]
    known.add(verdict("drift", SLOW, True, run="b"))
    known.add(verdict("drift", SLOW, True, step=200))
    assert len(known.verdicts) == 3
    renamed = [Verdict("drift", SLOW, True, 0.1, 0.0, 0.1, "dense", name, 5, "an id") for name in ("a", "b")]
    assert len(Confidence(renamed).verdicts) == 1


def test_the_table_keeps_what_lost() -> None:
    known = Confidence([
        verdict("drift", SLOW, True, gain=0.03), verdict("drift", SLOW, False, 200, gain=math.nan),
        verdict("drift", SLOW, True, 300, "b", gain=0.01), verdict("drift", FAST, False, gain=-0.2),
    ])  # fmt: skip
    best, worst = known.table()
    assert (best["action"], best["tried"], best["won"], best["gain"], best["runs"]) == (SLOW, 3, 2, 0.02, ["a", "b"])
    assert (worst["action"], worst["tried"], worst["won"], worst["gain"]) == (FAST, 1, 0, -0.2)
    assert worst["mean"] == pytest.approx(0.5 / 2)
    json.dumps(known.table(), allow_nan=False)


# -- in and out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [0.25, math.nan, -math.inf])
def test_a_verdict_survives_json(gain: float) -> None:
    one = verdict("drift", SLOW, True, gain=gain)
    again = Verdict.unpack(json.loads(json.dumps(one.pack(), allow_nan=False)))
    assert again.pack() == one.pack()


@pytest.mark.parametrize("wrong", [{"won": 1}, {"step": "3"}, {"step": True}, {"gain": "much"}, {"fault": None}])
def test_what_is_no_verdict_is_one_error_and_passed_over_among_others(wrong: dict[str, Any]) -> None:
    sound = verdict("drift", SLOW, True).pack()
    with pytest.raises(UserError, match="not a verdict"):
        Verdict.unpack(sound | wrong)
    with pytest.raises(UserError, match="not a verdict"):
        Verdict.unpack({})
    assert len(Confidence.of([sound | wrong, {}, sound]).verdicts) == 1


# -- from a log --------------------------------------------------------------------------------------------------------


def trial(step: int, winner: str | None, attempt: int = 0, **fields: Any) -> dict[str, Any]:
    arms = [
        {"name": "slow", "action": SLOW, "gain": 0.03, "low": 0.02, "noise": 0.004, "won": True},
        {"name": "fast", "action": FAST, "gain": -0.3, "low": -0.4, "noise": 0.004, "won": False},
        {"name": "none", "action": "no end", "gain": math.nan, "low": math.nan, "noise": math.nan, "won": False},
        {"name": "begun", "action": "clip down"},
    ]
    event = {"t": "trial", "v": 1, "attempt": attempt, "step": step, "id": f"t{step}", "rule": "drift"}
    return event | {"fault": "learning rate", "arms": arms, "winner": winner} | fields


def fell(step: int, of: Any, held: bool = False) -> dict[str, Any]:
    evidence = {"held": held, "probation": {"trial": of}}
    return {"t": "decision", "attempt": 0, "step": step, "kind": "outcome", "rule": "drift", "evidence": evidence}


def read(*events: dict[str, Any]) -> dict[tuple[int, str], bool]:
    through_the_log = [event for one in events if (event := parse(as_line(one).encode()))]
    return {(one.step, one.action): one.won for one in verdicts(through_the_log, "dense", "run", "id")}


def test_a_trial_is_a_verdict_on_each_arm_that_was_measured() -> None:
    slow, fast, none = verdicts([trial(100, "slow")], "dense", "run", "id")
    assert (none.action, none.won) == ("no end", False)
    assert slow == Verdict("learning rate", SLOW, True, 0.03, 0.02, 0.004, "dense", "run", 100, "id")
    assert (fast.action, fast.won, fast.gain) == (FAST, False, -0.3)
    other = read(trial(100, "fast"))  # it beat the control, though another was taken
    assert other == {(100, SLOW): True, (100, FAST): False, (100, "no end"): False}
    assert read(trial(100, "slow", void="arms do not compare")) == {}


def test_what_did_not_hold_has_not_won() -> None:
    assert read(trial(100, "slow"), fell(300, "t100"))[100, SLOW] is False
    assert read(trial(100, "slow"), fell(300, "t100", held=True))[100, SLOW] is True
    both = read(trial(100, "slow"), trial(400, "slow"), fell(500, "t100"))
    assert (both[100, SLOW], both[400, SLOW]) == (False, True)


def test_an_outcome_may_be_told_with_the_way_back_that_it_led_to() -> None:
    back = {"t": "run", "attempt": 1, "step": 99, "parent_step": 99, "why": fell(300, "t100")}
    assert read(trial(100, "slow"), back)[100, SLOW] is False


def test_a_trial_that_is_made_again_after_a_kill_is_one() -> None:
    again = trial(100, "slow", attempt=1)
    assert read(trial(100, "slow"), fell(300, "t100"), again)[100, SLOW] is True


def test_events_that_are_none_of_ours_are_passed_over() -> None:
    odd: list[dict[str, Any]] = [
        trial(1, None, arms=None), trial(2, None, arms=[None, 3, {"action": SLOW}, {"gain": 1.0}]), {"t": "trial"},
        {"t": "decision"}, {"t": "run", "why": "x"}, {"t": "run"}, fell(9, [1]), fell(9, None), {},
        {"t": "decision", "kind": "outcome", "evidence": None}, trial(3, None) | {"step": "x"},
    ]  # fmt: skip
    assert verdicts(odd, "dense", "run") == []
