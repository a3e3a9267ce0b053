"""The whole of it: from observations to what is done, the same for the same input, and never at the cost of a run."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from watched import FACTS, MOE, Watch, look, replay, seen

from lumina.errors import OutOfMemory, UserError
from lumina.orchestrator import orchestrator as module
from lumina.orchestrator.finding import Detector, Finding
from lumina.orchestrator.ledger import entries, told
from lumina.orchestrator.orchestrator import Orchestrator
from lumina.orchestrator.protocol import Replay
from lumina.orchestrator.signals import Signals
from lumina.training.endings import Interrupted


def diverge(watch: Watch, first: int = 301, last: int = 450, nats: float = 1.5) -> None:
    for step in range(first, last + 1):
        if watch.door.did:
            return
        watch.step(seen(step, loss=seen(step).loss + nats))


def test_a_sound_run_is_left_alone() -> None:
    watch = Watch(points=(100,), answer=replay(1, 2.0))
    watch.run(1, 600)
    assert (watch.told, watch.door.did, watch.door.replays) == ([], [], 0)
    assert watch.orchestrator.calm


def test_divergence_is_undone_and_the_ledger_says_why() -> None:
    watch = Watch(points=(250,), answer=replay(400, 3.5, 3.4, 3.6))
    watch.run(1, 300)
    diverge(watch)
    assert watch.door.did == [("rollback", 250, "replay")]
    assert watch.door.why[0].evidence["diagnosis"]["verdict"] == "any batch"
    assert watch.orchestrator.signals.step == 250
    watch.run(251, 600)
    assert len(watch.door.did) == 1
    (held,) = watch.decisions("outcome")
    assert held["evidence"]["held"]
    why = watch.door.why[0]
    log = [{"t": "run", "attempt": 1, "step": 250, "why": why.fields()}, *watch.told]
    entry = next(one for one in entries(log) if one.rule == "divergence")
    assert "has held" in told(entry)


def test_steps_that_are_not_finite_for_good_are_replayed_once_in_a_while_not_each() -> None:
    watch = Watch("advise", points=(50,), answer=replay(62, math.nan, math.nan))
    watch.run(1, 60)
    watch.run(61, 160, loss=math.nan, skipped=True)
    assert [said["step"] for said in watch.decisions()] == [61, 62]  # the first, and that it lasts
    assert watch.door.replays == 2


def test_an_intervention_that_did_not_hold_is_told_before_the_next() -> None:
    watch = Watch(points=(250,), answer=replay(400, 3.5, 3.4, 3.6))
    watch.run(1, 300)
    diverge(watch)
    watch.door.did = []
    diverge(watch, 251)
    (failed,) = watch.decisions("outcome")
    assert not failed["evidence"]["held"]
    assert "has not held" in failed["reason"]


def test_another_invariant_is_news_while_one_is_broken() -> None:
    watch = Watch("advise", points=(250,), answer=replay(301, 2.0, 2.0))
    watch.run(1, 300)
    watch.step(seen(301, broken=("config: the optimizer has eps 0.1",)))
    watch.step(seen(302, broken=("config: the optimizer has eps 0.1",)))
    watch.step(seen(303, broken=("config: the optimizer has eps 0.1", "batch: number 6 comes after 50")))
    assert [said["step"] for said in watch.decisions()] == [301, 303]


def test_nothing_is_sound_while_the_loss_is_worse_than_guessing() -> None:
    watch = Watch("advise")
    watch.run(1, 40)  # too few for a baseline
    watch.run(41, 60, loss=6.0)
    assert watch.orchestrator.signals.level.unlearned
    assert not watch.orchestrator.calm


def test_what_comes_again_at_the_same_place_is_left_out_then_handed_over() -> None:
    watch = Watch(points=(250,), answer=replay(400, 3.5, 3.4, 3.6))
    watch.run(1, 300)
    for n in range(3):
        watch.door.did = []
        diverge(watch, 301 if n == 0 else 251)  # at once, the second time
        assert watch.door.did == [[("rollback", 250, "replay"), ("rollback", 250, "skip"), ("stop",)][n]]
    assert "a person has to look" in watch.door.why[-1].reason


def test_advise_says_what_act_would_do_and_does_nothing() -> None:
    watch = Watch("advise", points=(250,), answer=replay(400, 3.5, 3.4, 3.6))
    watch.run(1, 300)
    diverge(watch, last=480)
    assert watch.door.did == []
    (said,) = (one for one in watch.decisions() if one["rule"] == "divergence")  # once, though it lasts
    assert said["action"] == "rewind_replay"


def test_what_lasts_is_replayed_once_in_advise_for_the_way_there_grows() -> None:
    watch = Watch("advise", points=(250,), answer=replay(400, 3.5, 3.4, 3.6))
    watch.run(1, 300)
    diverge(watch, last=1200)
    assert len([one for one in watch.decisions() if one["rule"] == "divergence"]) > 3
    assert watch.door.replays == 1


def test_what_is_wrong_for_good_is_replayed_once_and_what_is_another_again() -> None:
    eps = {"broken": ("config: the optimizer has eps 0.1",)}
    watch = Watch("advise", points=(250,), answer=replay(301, 2.0, 2.0))
    watch.run(1, 300)
    watch.run(301, 1000, **eps)
    assert (len(list(watch.decisions())), watch.door.replays) == (4, 1)
    watch.run(1001, 1600)
    watch.run(1601, 1602, **eps)
    assert watch.door.replays == 2
    for step in (1700, 1710):  # each step off the plan is another
        watch.run(watch.orchestrator.signals.step + 1, step - 1)
        watch.step(seen(step, broken=(OFF,)))
        watch.step(seen(step + 1))
        assert watch.door.replays == 3 + (step == 1710)


def test_a_replay_that_is_left_is_taken_up_by_the_next_attempt() -> None:
    watch = Watch(points=(250,), answer=replay(301, 2.0, 2.0))
    watch.run(1, 300)

    def left(before: int) -> Replay | None:
        raise Interrupted

    watch.door.replay = left  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        watch.step(seen(301, broken=("config: the optimizer has eps 0.1",)))
    packed = json.loads(json.dumps(watch.orchestrator.pack(), allow_nan=False))
    again = Watch(points=(250,))
    again.packed = watch.packed
    again.orchestrator.unpack(packed)
    assert again.orchestrator.pending(301)
    again.orchestrator.between(again.door)  # type: ignore[arg-type]
    assert again.door.did == [("replan",), ("rollback", 250, "replay")]
    assert not again.orchestrator.pending(301)


def test_off_hears_nothing() -> None:
    watch = Watch("off", points=(250,))
    watch.run(1, 300)
    diverge(watch)
    assert (watch.told, watch.door.did, watch.orchestrator.signals.step) == ([], [], 0)


def test_one_gradient_that_is_nan_was_skipped_and_is_explained() -> None:
    watch = Watch(points=(50,), answer=replay(61, 2.0, 2.1, same=False, again=2.0))
    watch.run(1, 60)
    watch.step(seen(61, grad_norm=math.nan, skipped=True))
    watch.run(62, 200)
    assert watch.door.did == []
    (said,) = watch.decisions()
    assert (said["step"], said["action"], said["evidence"]["diagnosis"]["cause"]) == (61, "skip_step", "hardware")


def test_weights_that_are_not_finite_are_left_for_the_restore_point() -> None:
    watch = Watch(points=(50,), answer=replay(62, math.nan, 2.1, same=False, again=2.0))
    watch.run(1, 60)
    watch.run(61, 62, loss=math.nan, skipped=True)
    assert watch.door.did == [("rollback", 50, "replay")]


def test_a_stuck_loader_is_reseated_and_the_dive_of_the_loss_is_no_success() -> None:
    watch = Watch(points=(250,), answer=replay(304, 1.0, 2.0))
    watch.run(1, 300)
    for step in range(301, 310):
        if not watch.door.did:
            watch.step(seen(step, content=f"again {step % 4}", loss=1.5))
    assert watch.door.did == [("replan",), ("rollback", 250, "replay")]
    assert watch.door.why[0].evidence["diagnosis"]["cause"] == "data"
    watch.run(251, 500)
    assert len(watch.door.did) == 2


OFF = "schedule: the optimizer moved at lr 0.3, planned is 0.003"


def test_a_way_back_knows_what_was_known_there_and_what_was_done() -> None:
    watch = Watch(points=(250,), answer=replay(400, 3.5, 3.4, 3.6))
    watch.run(1, 250)
    there = watch.orchestrator.pack()
    watch.run(251, 300)
    diverge(watch)
    after = watch.orchestrator.pack()
    assert {name: after[name] for name in ("signals", "heard")} == {name: there[name] for name in ("signals", "heard")}
    assert after["policy"]["open"]["rule"] == "divergence"
    assert after["policy"]["places"] != there["policy"]["places"]
    done = watch.orchestrator.policy.open
    watch.orchestrator.return_to(there)
    assert watch.orchestrator.policy.open == done
    watch.orchestrator.return_to(there, by_hand=True)  # nobody may say later that it has held
    assert (watch.orchestrator.policy.open, watch.orchestrator.policy.quiet) == (None, 350)
    watch.run(251, 600)
    assert list(watch.decisions("outcome")) == []


def test_the_way_back_to_the_start_begins_anew_and_a_state_that_cannot_be_read_ends_it_there_too() -> None:
    watch = Watch()
    watch.run(1, 60)
    watch.orchestrator.return_to(None)
    assert watch.orchestrator.pack() == Watch().orchestrator.pack()
    watch.orchestrator.return_to({"signals": {"unknown": 1}})
    assert watch.orchestrator.ended


def test_a_plan_that_was_left_is_put_back_first() -> None:
    watch = Watch(points=(250,), answer=replay(301, 2.0, 2.0))
    watch.run(1, 300)
    watch.step(seen(301, broken=(OFF,)))
    assert watch.door.did == []  # it may heal by itself
    watch.step(seen(302, broken=(OFF,)))
    assert watch.door.did == [("replan",), ("rollback", 250, "replay")]
    assert watch.door.why[0].evidence["diagnosis"]["cause"] == "learning rate"


@pytest.mark.parametrize(("loss", "acts"), [(2.3, False), (5.0, True)])
def test_one_step_off_the_schedule_is_undone_if_it_costs_much_of_what_was_learned(loss: float, acts: bool) -> None:
    """The replay, in which it is on schedule, comes to 2.0; a uniform guess costs 5.56."""
    watch = Watch(points=(250,), answer=replay(302, loss, 2.0, same=False, again=2.0))
    watch.run(1, 300)
    watch.step(seen(301, broken=(OFF,)))
    assert watch.door.did == []
    watch.step(seen(302, loss=loss))
    assert watch.door.did == [("replan",), ("rollback", 250, "replay")] * acts
    watch.run(303, 340)
    assert len(watch.door.did) == 2 * acts
    why = watch.door.why[0].evidence if acts else list(watch.decisions())[-1]["evidence"]
    assert (why["finding"]["since"], why["diagnosis"]["cause"]) == (301, "learning rate")


def test_a_point_that_cannot_be_gone_back_to_gives_way_to_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(points=(30, 50), answer=replay(62, math.nan, 2.1, same=False, again=2.0))
    back = watch.door.rollback

    def rollback(why: Any, step: int, *how: Any) -> None:
        if step == 50:
            raise UserError("step 50: a weight is not finite", "go back further")
        back(why, step, *how)

    monkeypatch.setattr(watch.door, "rollback", rollback)
    watch.run(1, 60)
    watch.run(61, 62, loss=math.nan, skipped=True)
    assert watch.door.did == [("rollback", 30, "replay")]
    assert "Step 50 could not be gone back to: step 50: a weight is not finite." in watch.door.why[0].reason
    assert [place[1] for place in watch.orchestrator.policy.places] == [1]


def test_an_invariant_that_a_look_saw_goes_back_to_before_the_sound_one() -> None:
    watch = Watch(points=(30, 45), answer=replay(60, 2.0, 2.0))
    for step in range(1, 61):
        broken = ("replicas: process 1 holds other values than process 0",) if step == 60 else ()
        watch.step(seen(step), look(step, broken=broken) if step % 20 == 0 else None)
    assert watch.door.did == [("rollback", 30, "replay")]  # 45 is after the look of 40


def test_bad_data_is_left_out_with_what_follows() -> None:
    watch = Watch(points=(250,), answer=replay(330, 8.0, 2.1, 2.2, ahead=100))
    watch.run(1, 300)
    for step in range(301, 340):
        if not watch.door.did:
            watch.step(seen(step, loss=8.0))
    assert watch.door.did == [("rollback", 250, "skip", watch.door.why[0].evidence["step"] + 100)]


TRAPS: dict[str, Any] = {
    "one junk batch": lambda step: {"loss": 12.0, "grad_norm": 30.0} if step == 301 else {},
    "five junk batches": lambda step: {"loss": 9.0 * 0.85 ** max(0, step - 305)} if 301 <= step < 315 else {},
    "a gradient a thousand times": lambda step: {"grad_norm": 1000.0} if step == 301 else {},
    "a step at ten times the rate": lambda step: {"loss": 2.3} if 302 <= step < 306 else {},
    "a planned level shift": lambda step: (
        {"loss": seen(step).loss + 1, "grad_norm": 3.0, "changed": "phase" if step == 301 else ""} if step > 300 else {}
    ),
    "the decay": lambda step: {"stage": "decay", "grad_norm": 1 + (step - 300) / 50} if step > 300 else {},
    "heavy tails": lambda step: {"loss": seen(step).loss * (1.8 if step % 40 == 0 else 1)},
    "a plateau, then a drop": lambda step: {"loss": 2.0 if step < 400 else 1.2},
}


@pytest.mark.parametrize("trap", TRAPS)
def test_what_looks_bad_and_is_not_changes_nothing(trap: str) -> None:
    watch = Watch(points=(250,), answer=replay(301, 5.0, 5.0))
    for step in range(1, 700):
        watch.step(seen(step, **TRAPS[trap](step)))
    assert watch.door.did == []


def test_the_state_may_not_be_kept_while_something_is_suspected() -> None:
    watch = Watch("advise")
    watch.run(1, 300)
    assert watch.orchestrator.calm
    watch.step(seen(301, loss=6.0, grad_norm=10.0))
    assert not watch.orchestrator.calm
    watch.run(302, 340)
    assert watch.orchestrator.calm
    watch.run(341, 342, content="again")
    assert not watch.orchestrator.calm


def test_interrupted_and_resumed_is_uninterrupted_to_the_bit() -> None:
    def observations(step: int) -> dict[str, Any]:
        return {"loss": seen(step).loss + (1.5 if step > 280 else 0)}

    one, other = (Watch(points=(250,), answer=replay(400, 3.5, 3.4)) for _ in range(2))
    for step in range(1, 341):
        for watch in (one, other):
            watch.step(seen(step, **observations(step)))
    packed = json.loads(json.dumps(other.orchestrator.pack(), allow_nan=False))
    other.orchestrator = Orchestrator("act", FACTS, other._emit)
    other.orchestrator.unpack(packed)
    for step in range(341, 420):
        for watch in (one, other):
            watch.step(seen(step, **observations(step)))
    assert one.door.did
    assert (one.told, one.door.did) == (other.told, other.door.did)
    assert [why.fields() for why in one.door.why] == [why.fields() for why in other.door.why]
    assert json.dumps(one.orchestrator.pack()) == json.dumps(other.orchestrator.pack())


# -- faults of its own -----------------------------------------------------------------------------------------------


def fault(*_: object, **__: object) -> Any:
    raise ZeroDivisionError("planted")


@pytest.mark.parametrize("detector", [one.name for one in module.DETECTORS])
def test_a_fault_in_any_detector_does_not_escape(detector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = tuple(Detector(one.name, fault, True) if one.name == detector else one for one in module.DETECTORS)
    monkeypatch.setattr(module, "DETECTORS", planted)
    watch = Watch(points=(50,))
    watch.run(1, 100)
    assert watch.door.did == []
    (said,) = watch.told
    assert (said["t"], said["kind"]) == ("incident", "orchestrator failed")
    assert "planted" in said["error"]
    assert watch.orchestrator.ended


@pytest.mark.parametrize(
    ("where", "what"),
    [(Signals, "observe"), (module, "diagnose"), (module.Policy, "decide"), (module.ledger, "decision")],
)
def test_nor_does_one_anywhere_else(where: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(points=(50,), answer=replay(101, 2.0, 2.0))
    watch.run(1, 100)
    monkeypatch.setattr(where, what, fault)
    watch.run(101, 103, loss=math.nan, skipped=True)
    watch.run(104, 120)
    assert watch.door.did == []
    assert [event["kind"] for event in watch.told] == ["orchestrator failed"]


def test_a_state_that_cannot_be_read_ends_it() -> None:
    watch = Watch()
    watch.orchestrator.unpack({"signals": {"unknown": 1}})
    assert watch.orchestrator.ended
    watch.run(1, 10)
    assert len(watch.told) == 1


def test_what_cannot_be_done_is_handed_over() -> None:
    watch = Watch(points=(50,), answer=replay(102, math.nan, 2.0), refuse="the disk is full")
    watch.run(1, 100)
    watch.run(101, 102, loss=math.nan, skipped=True)
    assert watch.door.did == [("stop",)]
    assert "the disk is full" in watch.door.why[0].reason


def test_what_ends_an_attempt_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out in a replay is the session's to answer."""
    watch = Watch(points=(50,))
    watch.run(1, 100)

    def out(*_: object) -> None:
        raise OutOfMemory("none left", "less")

    monkeypatch.setattr(watch.door, "replay", out)
    with pytest.raises(OutOfMemory):
        watch.run(101, 101, loss=math.nan, skipped=True)


def test_what_is_wrong_with_routers_is_told_with_its_evidence() -> None:
    watch = Watch(facts=MOE, points=(50,))
    watch.run(1, 1000, load=((2.0, 2.0, 0.0, 0.0),))
    rules = {event["rule"]: event for event in watch.decisions()}
    assert {"collapse", "starvation"} <= rules.keys()
    assert rules["collapse"]["evidence"]["diagnosis"]["cause"] == "router"
    assert "bias_rate" in rules["collapse"]["reason"]
    assert watch.door.did == []
    assert isinstance(Finding("x", 1, 1, ""), Finding)
