"""What is done, when, and what is never done."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from watched import FACTS, MOE, seen, watched

from lumina.orchestrator.candidates import candidates
from lumina.orchestrator.confidence import Confidence
from lumina.orchestrator.confidence import Verdict as Taught
from lumina.orchestrator.detectors.table import DETECTORS
from lumina.orchestrator.diagnosis import Cause, Diagnosis, Verdict, diagnose
from lumina.orchestrator.finding import Finding
from lumina.orchestrator.policy import (
    FROM_OUTSIDE,
    HARD,
    MOST,
    NEAR,
    REWINDS,
    TRIED,
    WITHIN,
    Choice,
    Mode,
    Policy,
    follow,
)
from lumina.orchestrator.signals import Signals

CALM = watched(300)


def policy(mode: Mode = "act") -> Policy:
    return Policy(mode, FACTS)


def finding(rule: str = "divergence", since: int = 290, hard: bool = True, step: int = 300, **values: Any) -> Finding:
    return Finding(rule, step, since, "something", hard, values)


def because(cause: Cause = "none", verdict: Verdict = "any batch") -> Diagnosis:
    return Diagnosis(cause, "because", verdict)


def test_a_hard_fault_goes_back_to_before_it_began_in_act_alone() -> None:
    for mode, acts in (("act", True), ("advise", False)):
        choice = policy(mode).decide(finding(), because(), CALM, (100, 250, 295))
        assert choice[:2] == ("rewind_replay", acts)
        assert choice.to == 250  # 295 is after it began


def test_a_single_step_that_is_not_finite_was_skipped_and_nothing_more_is_done() -> None:
    choice = policy().decide(finding("non_finite", lasting=False), because("hardware", "differs"), CALM, (100,))
    assert choice[:2] == ("skip_step", False)
    choice = policy().decide(finding("non_finite", lasting=True), because("numerics"), CALM, (100,))
    assert choice[:3] == ("rewind_replay", True, choice.reason)


def test_bad_data_is_left_out_and_a_stuck_loader_reads_again() -> None:
    assert policy().decide(finding(), because("data", "data"), CALM, (100,)).action == "rewind_skip"
    assert policy().decide(finding("loader"), because("data", "any batch"), CALM, (100,)).action == "rewind_replay"


def test_bad_data_that_goes_on_is_left_out_as_far_as_it_goes() -> None:
    """150 batches of junk are heard after 20: those read are quarantined, and the 130 that the replay found."""
    why = replace(because("data", "data"), ahead=130)
    choice = policy().decide(finding(since=281), why, CALM, (100,))
    assert (choice.action, choice.to, choice.until) == ("rewind_skip", 100, 300 + 130)


def test_a_loader_that_misreads_is_built_anew_and_its_batches_are_read_again() -> None:
    for rule, broken in (("loader", []), ("invariant", ["batch"]), ("looked", ["data"])):
        choice = policy().decide(finding(rule, broken=broken), because("data", "data"), CALM, (100,))
        assert (choice.action, choice.replan) == ("rewind_replay", True)
    assert not policy().decide(finding("invariant", broken=["replicas"]), because("hardware"), CALM, (100,)).replan


def test_each_way_back_from_a_place_goes_further() -> None:
    one = policy()
    first = one.decide(finding(), because(), CALM, (50, 100, 250))
    one.done(finding(), first, 300)
    assert (first.to, one.decide(finding(), because(), CALM, (50, 100, 250)).to) == (250, 100)


def test_a_restore_point_of_after_the_damage_is_none() -> None:
    """The loss of step 290 is of the weights that 289 left; if no batch is finite from 250 on, neither is 250 sound."""
    lasting = finding("non_finite", lasting=True)
    assert policy().decide(lasting, because("hardware", "differs"), CALM, (100, 250, 289)).to == 250
    assert policy().decide(lasting, because("numerics", "damaged"), CALM, (100, 250, 289)).to == 100


@pytest.mark.parametrize("cause", ["learning rate", "config"])
def test_a_plan_that_was_left_is_put_back_before_the_way_back(cause: Cause) -> None:
    choice = policy().decide(finding("invariant"), because(cause), CALM, (100,))
    assert (choice.action, choice.replan, choice.to) == ("rewind_replay", True, 100)


def test_hard_faults_are_acted_on_in_warm_up_planned_changes_and_decay() -> None:
    for stage in ("warmup", "decay"):
        signals = watched(300, stage=stage)
        assert policy().decide(finding(), because(), signals, (100,)).act
    signals = watched(300)
    signals.observe(seen(301, changed="phase"))
    assert policy().decide(finding(), because(), signals, (100,)).act


REST = sorted({one.name for one in DETECTORS} - HARD - TRIED)


@pytest.mark.parametrize("rule", REST)
def test_what_may_be_chance_or_is_the_data_s_is_advised(rule: str) -> None:
    assert set(REST) == {"golden", "spike", "explosion"}
    for hard in (False, True):  # even a detector that calls itself hard
        choice = policy().decide(finding(rule, hard=hard), because("router"), CALM, (100,))
        assert choice[:2] == ("watch", False)
        assert "bias_rate" in choice.reason


@pytest.mark.parametrize("rule", sorted(TRIED))
def test_what_lasts_is_tried_in_act_and_told_in_advise(rule: str) -> None:
    assert rule not in HARD - FROM_OUTSIDE
    for hard in (False, True):
        for mode in ("advise", "act"):
            choice = policy(mode).decide(finding(rule, hard=hard), because("router"), CALM, (100,))
            assert choice[:2] == ("trial", mode == "act")
            first = "qk_clip" if rule == "attention" else "b"  # of bias_rate and balance
            assert choice.reason.startswith(f"to be tried: {first}")


def test_logits_that_jumped_are_undone_if_that_came_from_outside_and_tried_for_if_they_grew() -> None:
    jumped = finding("attention")
    undone = policy().decide(jumped, because("hardware", "differs"), CALM, (100,))
    assert (undone.action, undone.act, undone.to) == ("rewind_replay", True, 100)
    grown = policy().decide(jumped, because("optimizer state", "any batch"), CALM, (100,))
    assert (grown.action, [one.text for one in grown.tries]) == ("trial", ["qk_clip=100"])


def test_a_cause_for_which_nothing_is_known_is_advised() -> None:
    for cause in ("data", "hardware", "config", "numerics"):
        assert policy().decide(finding("plateau", hard=False), because(cause), CALM, ()).action == "watch"


def test_what_trials_did_not_mend_is_tried_otherwise_then_handed_over() -> None:
    one, rates = policy(), finding("plateau", hard=False)
    asked = []
    for _ in range(3):
        one.quiet = 0
        choice = one.decide(rates, because("learning rate"), CALM, ())
        asked.append([candidate.text for candidate in choice.tries])
        one.held_trial("learning rate", 100, [], [tried.action for tried in choice.tries], None, 300)
    assert asked == [
        ["lr.scale=0.5", "lr.scale=2"],
        ["lr.scale=0.1", "lr.scale=0.25", "optimizer.reset=1 + lr.warmup=20"],
        [],
    ]
    assert "optimizer.reset did not mend it, and nothing else is known: a person has to look" in choice.reason
    assert one.spent == 300


def test_what_won_before_comes_first_and_nothing_is_left_out() -> None:
    rates = finding("plateau", hard=False)
    taught = [Taught("learning rate", "lr.scale 2", True, 0.1, 0.05, 0.01, "dense", f"run {n}", n) for n in range(3)]
    one = Policy("act", FACTS, taught=Confidence(taught))
    choice = one.decide(rates, because("learning rate"), CALM, ())
    assert [candidate.text for candidate in choice.tries] == ["lr.scale=2", "lr.scale=0.5"]


def test_trials_stay_within_the_budget_with_fewer_candidates_where_needed() -> None:
    one = Policy("act", FACTS._replace(steps=20_000, budget=0.2))
    tries = one.decide(finding("plateau", hard=False), because("learning rate"), CALM, ()).tries
    fits = one.fit(tries, 15_000)
    assert not isinstance(fits, str)
    assert (fits[0], fits[1].steps) == (tries, 100)
    one.held_trial("x", 1900, [], [], None, 300)
    fits = one.fit(tries, 15_000)
    assert not isinstance(fits, str)
    assert (fits[0], fits[1].steps) == (tries[:1], 100)
    one.held_trial("x", 600, [], [], None, 300)
    assert "1500 are left of orchestrator.trial.budget" in str(one.fit(tries, 15_000))


def test_a_divergence_that_the_same_steps_bring_back_is_tried_behind_the_way_back() -> None:
    one = policy()
    why = because("learning rate")
    one.done(finding(), one.decide(finding(), why, CALM, (100,)), 300)
    after = follow("divergence", "learning rate", 100, 290, {})
    assert after is not None
    choice = one.decide(after, diagnose(after, None, CALM), CALM, ())
    assert (choice.action, choice.fault) == ("trial", "learning rate")
    assert follow("divergence", "data", 100, 290, {}) is None
    assert follow("invariant", "learning rate", 100, 290, {}) is None


def test_a_broken_invariant_that_is_not_hard_is_advised() -> None:
    assert not policy().decide(finding("invariant", hard=False), because("router"), CALM, (100,)).act


def test_two_ways_back_at_a_place_then_a_person_has_to_look() -> None:
    one = policy()
    actions = []
    for _ in range(REWINDS + 1):
        choice = one.decide(finding(), because(), CALM, (100,))
        actions.append(choice.action)
        one.done(finding(), choice, 300)
    assert actions == ["rewind_replay", "rewind_skip", "stop"]
    assert not one.decide(finding(), because(), CALM, (100,)).act  # it was handed over
    far = policy()
    far.done(finding(), far.decide(finding(), because(), CALM, (100,)), 300)
    elsewhere = finding(since=290 + far.cooldown + 1)
    assert far.decide(elsewhere, because(), CALM, (100,)).action == "rewind_replay"


def test_what_comes_again_on_the_way_back_is_of_the_same_place() -> None:
    """Batches left out move what follows to earlier steps."""
    one = policy()
    first = one.decide(finding(), because(), CALM, (50, 100))
    one.done(finding(), first, 300)
    assert one._place(120)
    assert not one._place(99)
    assert not one._place(300 + one.cooldown + 1)


def test_ways_back_are_few_wherever_they_begin() -> None:
    one, step = policy(), 1000
    for _ in range(MOST):
        assert one.decide(finding(since=step, step=step), because(), CALM, (step - 50,)).action == "rewind_replay"
        one.done(finding(since=step, step=step), Choice("rewind_replay", True, "", step - 50), step)
        step += 500
    assert one.decide(finding(since=step, step=step), because(), CALM, (step - 50,)).action == "stop"
    later = step + WITHIN
    assert one.decide(finding(since=later, step=later), because(), CALM, (later - 50,)).action == "rewind_replay"


def test_a_step_off_the_schedule_whose_cost_is_not_known_is_undone() -> None:
    for lost, action in ((None, "rewind_replay"), (0.1, "watch"), (0.5, "rewind_replay")):
        why = replace(because("learning rate", "differs"), lost=lost)
        assert policy().decide(finding("off_plan"), why, CALM, (100,)).action == action


def test_a_place_is_no_wider_for_moments_that_remember_long() -> None:
    one = Policy("act", FACTS._replace(beta2=0.999))
    one.done(finding(since=1990, step=2000), Choice("rewind_skip", True, "", 1900), 2000)
    assert one._place(1990 + NEAR)
    assert not one._place(1990 + NEAR + 1)


def test_nothing_is_tried_where_memory_holds_no_copies() -> None:
    one = Policy("act", FACTS._replace(steps=10**6, budget=1.0, copies=False))
    tries = candidates("learning rate", finding("plateau", hard=False), CALM)
    refused = one.fit(tries, 10**5)
    assert isinstance(refused, str)
    assert "snapshot_every=0" in refused


def test_without_a_way_back_the_run_stops() -> None:
    choice = policy().decide(finding(), because(), CALM, (295,))
    assert choice[:2] == ("stop", True)
    assert "no restore point" in choice.reason


def test_one_intervention_is_open_and_the_next_has_to_wait() -> None:
    one = policy()
    assert one.cooldown == 100  # 5 / (1 - 0.95)
    assert Policy("act", FACTS._replace(beta2=0.999)).cooldown == 5000
    assert one.may(CALM) == ""
    one.done(finding(), one.decide(finding(), because(), CALM, (100,)), 300)
    assert "on trial" in one.may(CALM)
    assert one.passed(399) is None
    held = one.passed(400)
    assert held is not None
    assert (held.rule, held.step) == ("divergence", 300)
    assert one.passed(500) is None  # it is told once
    one.quiet = 310
    assert "settle" in one.may(CALM)


@pytest.mark.parametrize(
    ("signals", "why"),
    [
        (watched(300, stage="warmup"), "warms up"),
        (watched(300, stage="decay"), "decays"),
        (watched(30, first=271, changed="phase"), "planned change"),
    ],
)
def test_nothing_soft_is_done_in_warm_up_planned_changes_and_decay(signals: Signals, why: str) -> None:
    assert why in policy().may(signals)
    assert why in policy().decide(finding("spike", hard=False), because(), signals, ()).reason


def test_a_checkpoint_keeps_what_was_done() -> None:
    one = policy()
    one.done(finding(), one.decide(finding(), because(), CALM, (100,)), 300)
    other = policy()
    other.unpack(json.loads(json.dumps(one.pack())))
    assert other == one
    assert MOE != FACTS
