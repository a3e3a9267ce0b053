"""What is taken for the cause, and that a person is told why."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from watched import MOE, look, replay, seen, watched

from lumina.orchestrator.detectors.table import DETECTORS
from lumina.orchestrator.diagnosis import Diagnosis, diagnose
from lumina.orchestrator.finding import Finding
from lumina.orchestrator.protocol import Replay
from lumina.orchestrator.signals import Signals


def diverged(steps: int = 120, **changes: Any) -> tuple[Finding, Signals]:
    """A run that is 1.5 nats off from step 301 on, where its first step has these values besides."""
    signals = watched(300)
    for step in range(301, 301 + steps):
        signals.observe(seen(step, loss=seen(step).loss + 1.5, **(changes if step == 301 else {})))
    return heard(signals, "divergence"), signals


def heard(signals: Signals, rule: str) -> Finding:
    found = next(one for one in DETECTORS if one.name == rule)(signals)
    assert found is not None
    return found


def test_another_result_is_the_hardware() -> None:
    finding, signals = diverged()
    found = diagnose(finding, replay(420, 3.5, 3.4, 3.6, same=False, again=2.0), signals)
    assert (found.cause, found.verdict) == ("hardware", "differs")
    assert "came to 2 instead of 3.5" in found.text


def test_the_same_result_on_batches_that_others_are_better_than_is_the_data() -> None:
    finding, signals = diverged()
    found = diagnose(finding, replay(420, 5.5, 2.3, 2.2, 2.4), signals)
    assert (found.cause, found.verdict) == ("data", "data")


def test_data_that_spoiled_the_weights_for_all_data_is_still_the_data() -> None:
    """The figures of 23 batches of junk, dense, after which other batches cost twice what they had."""
    finding, signals = diverged()
    late = replay(420, 5.599, 4.25, 4.16, 3.46)
    assert diagnose(finding, late, signals).verdict == "any batch"
    found = diagnose(finding, replace(late, before=7.8, others_before=(2.1, 2.0, 2.2)), signals)
    assert (found.cause, found.verdict) == ("data", "data")
    assert "On the restore point's weights this batch comes to 7.8, others to 2.1, 2, 2.2." in found.text
    assert "they have spoiled the weights" in found.text


def test_the_same_result_on_any_batch_is_the_state() -> None:
    finding, signals = diverged()
    found = diagnose(finding, replay(420, 3.5, 3.4, 3.6), signals)
    assert (found.cause, found.verdict) == ("optimizer state", "any batch")


def test_values_that_are_not_finite_on_any_batch_are_the_numerics() -> None:
    signals = watched(100)
    for step in (101, 102):
        signals.observe(seen(step, loss=math.nan, skipped=True))
    found = diagnose(heard(signals, "non_finite"), replay(102, math.nan, math.nan, math.nan), signals)
    assert (found.cause, found.verdict) == ("numerics", "damaged")
    sound = replace(replay(102, math.nan, math.nan, math.nan), before=2.0, others_before=(2.0, 2.1))
    later = diagnose(heard(signals, "non_finite"), sound, signals)
    assert (later.cause, later.verdict) == ("numerics", "any batch")  # the restore point is not damaged
    poison = diagnose(heard(signals, "non_finite"), replace(sound, before=math.inf), signals)
    assert (poison.cause, poison.verdict) == ("data", "data")
    good = diagnose(heard(signals, "non_finite"), replay(102, math.nan, 2.0, 2.1), signals)
    assert (good.cause, good.verdict) == ("data", "data")


def test_a_learning_rate_that_jumped_is_the_cause_even_if_it_is_back() -> None:
    """lr x100 for one step: what comes after is at the planned rate."""
    finding, signals = diverged(lr=0.3, update_ratio=0.1)
    found = diagnose(finding, replay(420, 3.5, 3.4, 3.6), signals)
    assert found.cause == "learning rate"
    assert "100 times" in found.text


def test_a_planned_change_of_the_learning_rate_is_no_jump() -> None:
    _, signals = diverged()
    for step in range(421, 580):
        changed = "phase" if step == 421 else ""
        signals.observe(seen(step, lr=3e-2, changed=changed, loss=seen(step).loss + (3.0 if step > 460 else 0)))
    assert diagnose(heard(signals, "divergence"), None, signals).cause != "learning rate"


def test_weights_that_moved_far_at_the_same_rate_are_the_optimizer_state() -> None:
    finding, signals = diverged(update_ratio=0.1)
    found = diagnose(finding, replay(420, 3.5, 3.4, 3.6), signals)
    assert found.cause == "optimizer state"
    assert "100 times" in found.text


@pytest.mark.parametrize(
    ("sentence", "cause"),
    [
        ("schedule: the optimizer moved at lr 0.3, planned is 0.003", "learning rate"),
        ("optimizer step: the optimizer counts 7 steps after step 9", "optimizer state"),
        ("weights: head.weight moved, though frozen", "optimizer state"),
        ("batch: number 7 comes after 9", "data"),
        ("config: the optimizer has eps 0.01", "config"),
        ("router bias: the mean of x moved by 3", "router"),
        ("replicas: process 1 holds other values than process 0", "hardware"),
    ],
)
def test_a_broken_invariant_is_the_cause_whatever_the_replay_says(sentence: str, cause: str) -> None:
    signals = watched(100, first=1)
    signals.observe(seen(101, broken=(sentence,)))
    found = diagnose(heard(signals, "invariant"), replay(101, 2.0, 2.0, 2.1), signals)
    assert found.cause == cause
    assert sentence in found.text


def test_an_invariant_that_broke_where_divergence_began_is_its_cause() -> None:
    finding, signals = diverged(broken=("schedule: the optimizer moved at lr 0.3, planned is 0.003",))
    assert diagnose(finding, replay(420, 3.5, 3.4, 3.6), signals).cause == "learning rate"


def test_the_golden_batch_points_to_the_way_of_data() -> None:
    """F5: targets shifted by one, gradients normal; the state is as bad on any batch that is read so."""
    finding, signals = diverged()
    for n, golden in enumerate((2.1, 2.1, 2.1, 2.1, 3.6)):
        signals.looked(look(20 * n + 340, golden=golden))
    assert diagnose(finding, replay(420, 3.5, 3.4, 3.6), signals).cause == "data"
    assert diagnose(heard(signals, "golden"), None, signals).cause == "data"


@pytest.mark.parametrize(
    ("rule", "cause"),
    [
        ("loader", "data"),
        ("starvation", "router"),
        ("collapse", "router"),
        ("router_gradient", "router"),
        ("pace", "learning rate"),
        ("mod_capacity", "depth"),
        ("spike", "none"),
    ],
)
def test_what_needs_no_replay(rule: str, cause: str) -> None:
    finding = Finding(rule, 300, 290, "something is the matter")
    assert diagnose(finding, None, watched(300)).cause == cause


def test_it_reads_as_one_paragraph() -> None:
    finding, signals = diverged()
    found: Diagnosis = diagnose(finding, replay(420, 5.5, 2.3, 2.2), signals)
    assert "\n" not in found.text
    assert found.text.startswith("Step 420: for ")
    assert found.text.endswith(".")
    assert found.values["replay"]["others"] == [2.3, 2.2]
    without = diagnose(finding, None, signals)
    assert "no restore point" in without.text
    assert isinstance(replay(1, 2.0), Replay)


def test_what_routers_do_at_the_time_is_told_of_findings_that_are_of_anything() -> None:
    fair, few = ((1.1, 0.9, 1.05, 0.95),), ((2.0, 1.9, 0.1, 0.0),)
    sound = watched(230, MOE, load=fair, grad_router=0.05)
    for step in range(231, 271):
        sound.observe(seen(step, load=few, grad_router=0.05))
    assert diagnose(Finding("drift", 270, 240, "above the forecast"), None, sound).cause == "router"
    pushed = watched(230, MOE, load=fair, grad_router=0.05)
    for step in range(231, 234):
        pushed.observe(seen(step, load=fair, grad_router=5.0, grad_norm=20.0))
    assert diagnose(heard(pushed, "explosion"), None, pushed).cause == "router"


def test_a_predictor_that_rests_is_depth_and_not_the_optimizer() -> None:
    signals = watched(150)
    signals.looked(look(150, broken=("predictor: no step since the last look moved blocks.1.router.predictor.w_in",)))
    found = heard(signals, "looked")
    assert (found.hard, diagnose(found, None, signals).cause) == (False, "depth")
