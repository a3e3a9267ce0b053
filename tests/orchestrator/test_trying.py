"""What is tried, what of it is kept, and what is told: the orchestrator and a door that answers as a test wants."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from watched import FACTS, MOD, MOE, Watch, seen, watched

from lumina.config.overlay import KEYS, Overlay, check, require_kind
from lumina.errors import DiskRefused, UserError
from lumina.orchestrator import orchestrator as module
from lumina.orchestrator.candidates import _LADDERS, candidates
from lumina.orchestrator.finding import Detector, Finding
from lumina.orchestrator.ledger import entries, told
from lumina.orchestrator.protocol import Outcome
from lumina.orchestrator.signals import Facts, Signals
from lumina.orchestrator.trying import CONTROL, PLACEBO

RICH = {"steps": 100_000, "budget": 0.3}
UP = "lr-2"


def watch(monkeypatch: pytest.MonkeyPatch, *at: int, rule: str = "plateau", **values: Any) -> Watch:
    """It hears something that lasts behind these steps."""

    def heard(signals: Signals) -> Finding | None:
        return Finding(rule, signals.step, signals.step - 20, "planted", False, values) if signals.step in at else None

    monkeypatch.setattr(module, "DETECTORS", (Detector(rule, heard),))
    return Watch(facts=FACTS._replace(**RICH), points=tuple(range(0, 5000, 50)))


def better(by: float, name: str = UP, noise: float = 0.001) -> Any:
    """Arms of this name end better; each pair is a little off."""

    def end(arm: str, laid: list[str], pair: int) -> float:
        return 2.0 + noise * math.sin(7 * pair) * (CONTROL in arm) - by * (name in arm)

    return end


def trials(watch: Watch, kind: str = "verdict") -> list[dict[str, Any]]:
    return [event for event in watch.told if event["t"] == "trial" and event["kind"] == kind]


def test_what_wins_is_committed_and_what_it_showed_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    one = watch(monkeypatch, 300)
    one.door.end = better(0.1)
    one.run(1, 300)
    assert one.door.did == [("commit", "lr.scale=2.0@302")]
    (verdict,) = trials(one)
    assert verdict["winner"] == UP
    size = verdict["steps"]
    assert one.orchestrator.signals.step == 300 + size  # what the arm's steps showed, too
    assert json.loads(json.dumps(one.orchestrator.pack())) == one.orchestrator.pack()
    names = [arm.name for arm in one.door.arms]
    assert names[-2:] == [f"301-plateau-{PLACEBO}-0", f"301-plateau-{CONTROL}-on-0"]
    assert {arm.steps for arm in one.door.arms[:-1]} == {size}
    assert one.door.arms[-1].steps == 2 * size
    why = one.door.why[0]
    assert why.links == ["trials/301-plateau-*.jsonl"]
    assert why.evidence["trial"]["arms"][1]["gain"] == pytest.approx(0.1, abs=0.002)
    assert "lr.scale=2 won" in why.reason


def test_nothing_is_done_for_a_tie_and_the_budget_is_that_much_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    one = watch(monkeypatch, 300)
    one.door.end = better(0.009)
    before = one.orchestrator.policy.left
    one.run(1, 300)
    assert one.door.did == []
    assert one.orchestrator.policy.left == pytest.approx(before - trials(one)[0]["spent"])
    (said,) = one.decisions()
    assert "Nothing won" in said["reason"]
    assert said["evidence"]["trial"]["winner"] is None


def test_the_placebo_is_of_the_first_trial_alone_and_has_to_equal_its_control(monkeypatch: pytest.MonkeyPatch) -> None:
    one = watch(monkeypatch, 300, 800)
    one.run(1, 800)
    assert [PLACEBO in arm.name for arm in one.door.arms].count(True) == 1
    other = watch(monkeypatch, 300)
    other.door.end = lambda name, laid, pair: 1.0 if UP in name else 2.0 + 1e-9 * (PLACEBO in name)
    other.run(1, 300)
    assert other.door.did == []
    assert "arms cannot be compared" in trials(other)[0]["void"]


def test_on_a_device_that_is_not_exact_a_placebo_may_be_off_by_less_than_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    for off, won in ((0.005, True), (0.02, False)):
        one = watch(monkeypatch, 300)
        one.orchestrator.policy.facts = one.orchestrator.policy.facts._replace(exact=False)
        one.door.end = lambda name, laid, pair, off=off: 1.0 if UP in name else 2.0 + off * (PLACEBO in name)
        one.run(1, 300)
        assert bool(one.door.did) == won


def probation(monkeypatch: pytest.MonkeyPatch, end: float) -> Watch:
    """Something won behind step 300; a run without comes to 2.0, and this one to `end`."""
    one = watch(monkeypatch, 300)
    wins = better(0.1)
    one.door.end = lambda name, laid, pair: end if "probation" in name else wins(name, laid, pair)
    one.run(1, 300)
    step = one.orchestrator.signals.step
    one.run(step + 1, 300 + 2 * trials(one)[0]["steps"] + 10)
    return one


def test_what_holds_over_twice_the_steps_is_kept_and_counts_as_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    one = probation(monkeypatch, 1.9)
    (held,) = one.decisions("outcome")
    assert held["evidence"]["held"]
    assert held["step"] == 301 + 2 * trials(one)[0]["steps"]
    assert held["evidence"]["probation"]["gain"] == pytest.approx(0.1)
    assert one.orchestrator.policy.open is None
    assert [v.won for v in one.orchestrator.policy.learned] == [False, True]
    assert [arm.probe for arm in one.door.arms if "probation" in arm.name] == [trials(one)[0]["probe"]]


def test_what_does_not_hold_is_undone_and_something_else_is_tried_next(monkeypatch: pytest.MonkeyPatch) -> None:
    one = probation(monkeypatch, 2.01)
    assert one.door.did[1] == ("undo", "lr.scale=2.0@302")
    assert "has not held, and is undone" in one.door.why[1].reason
    assert [v.won for v in one.orchestrator.policy.learned] == [False, False]
    assert one.orchestrator.policy.tried == {"learning rate": ["lr.scale 0.5", "lr.scale 2"]}
    assert one.door.worth[0] == one.door.worth[1]  # the same text


def test_what_a_person_undid_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    one = watch(monkeypatch, 300)
    one.door.end = better(0.1)
    one.run(1, 300)
    one.door.overlays = ()
    one.run(one.orchestrator.signals.step + 1, 2000)
    assert not list(one.decisions("outcome"))
    assert one.orchestrator.policy.open is None


@pytest.mark.parametrize("what", ["another overlay", "lifted", "advise", "too near the end", "memory"])
def test_what_cannot_be_compared_any_more_is_not_judged_and_stays(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = watch(monkeypatch, 300)
    one.door.end = better(0.1)
    one.run(1, 300)
    until = 301 + 2 * trials(one)[0]["steps"]
    if what == "another overlay":
        one.door.overlays += (Overlay("by hand", "clip", 0.5, 800),)
    elif what == "lifted":
        one.door.overlays = tuple(replace(overlay, end=800) for overlay in one.door.overlays)
    elif what == "advise":
        one.orchestrator.mode = "advise"
    elif what == "memory":
        run = one.door.run
        one.door.run = lambda *given, **more: replace(run(*given, **more), heldout=math.nan, void="memory ran out")  # type: ignore[method-assign]
    else:
        one.door.last = until + 3
    one.run(one.orchestrator.signals.step + 1, until + 2)
    (said,) = one.decisions("outcome")
    assert "stays, but was not judged" in said["reason"]
    assert len(one.door.did) == 1
    assert one.orchestrator.policy.open is None


@pytest.mark.parametrize(("cause", "does"), [("optimizer state", "undo"), ("data", "rollback")])
def test_what_cannot_wait_undoes_what_is_on_probation_unless_the_data_did_it(
    cause: str, does: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = watch(monkeypatch, 300)
    one.door.end = better(0.1)
    one.run(1, 300)
    one.door.known = tuple(range(0, 301, 50))
    step = one.orchestrator.signals.step + 5
    found = Finding("divergence", step, step - 3, "planted", True, {})
    detector = Detector("divergence", lambda signals: found if signals.step == step else None, hard=True)
    monkeypatch.setattr(module, "DETECTORS", (detector,))
    monkeypatch.setattr("lumina.orchestrator.diagnosis._cause", lambda *_: (cause, "planted"))
    one.run(step - 4, step)
    assert one.door.did[1][0] == does


def test_a_trial_that_cannot_be_kept_is_told_and_nothing_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    one = watch(monkeypatch, 300)
    one.door.end, one.door.refuse = better(0.1), "the disk is full"
    one.run(1, 300)
    (said,) = one.decisions()
    assert "It could not be kept: the disk is full" in said["reason"]
    assert one.orchestrator.policy.open is None
    assert one.orchestrator.waiting is None


def test_a_candidate_that_the_run_cannot_have_is_out_and_the_others_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    one = watch(monkeypatch, 300)
    run = one.door.run

    def refusing(name: str, overlays: Sequence[Overlay], *more: Any, **given: Any) -> Outcome:
        if "lr-0.5" in name:
            raise UserError("lr.scale=0.5: others in force make it 0.005 of the plan", "end one")
        return run(name, overlays, *more, **given)

    one.door.run, one.door.end = refusing, better(0.1)  # type: ignore[method-assign]
    one.run(1, 300)
    refused, won = trials(one)[0]["arms"]
    assert ("0.005 of the plan" in refused["refused"], "gains" in refused, won["won"]) == (True, False, True)
    assert one.door.did == [("commit", "lr.scale=2.0@302")]
    assert one.orchestrator.policy.tried == {"learning rate": ["lr.scale 0.5", "lr.scale 2"]}


def test_what_the_run_has_already_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    one = watch(monkeypatch, 300)
    one.door.same = ["lr.scale=0.5@302"]
    one.door.end = better(0.1)
    one.run(1, 300)
    assert [arm["name"] for arm in trials(one)[0]["arms"]] == [UP]


def test_the_disk_s_refusal_is_the_run_s_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    one = watch(monkeypatch, 300)
    one.door.end = better(0.1)

    def full(*_: Any) -> list[Any]:
        raise DiskRefused("no space left", "free some")

    one.door.commit = full  # type: ignore[method-assign]
    with pytest.raises(DiskRefused):
        one.run(1, 300)


def test_arms_of_more_work_take_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    one = watch(monkeypatch, 300)
    one.door.work = lambda laid: 2.0 if laid[0].value == 2.0 else 1.0  # type: ignore[method-assign]
    one.run(1, 300)
    steps = {arm.name.split("-", 2)[2].rsplit("-", 1)[0]: arm.steps for arm in one.door.arms}
    assert steps[UP] * 2 == steps["lr-0.5"] == steps[CONTROL]
    rows = {row["name"]: row.get("work") for row in trials(one)[0]["arms"]}
    assert rows == {UP: 2.0, "lr-0.5": None}


def test_the_ledger_tells_a_trial_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    one = watch(monkeypatch, 300)
    one.door.end = better(0.009)
    one.run(1, 300)
    (entry,) = entries(one.told)
    said = told(entry)
    assert "tried     lr.scale=2: +0.00" in said, said
    assert "cost      8800 steps' worth of compute" in said


FINDINGS = {
    "pace": {"times": 10.0}, "plateau": {}, "drift": {}, "over_balance": {}, "starvation": {}, "collapse": {},
    "mod_agreement": {},
}  # fmt: skip


@pytest.mark.parametrize("fault", sorted(_LADDERS))
@pytest.mark.parametrize("load", [[2.0, 2.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], [1.9, 0.7, 0.7, 0.7], []])
def test_whatever_is_tried_is_within_bounds_and_of_the_kind(fault: str, load: list[float]) -> None:
    facts: Facts = MOE if fault in ("router", "over_balance") else MOD if fault == "depth" else FACTS
    kind = {id(MOE): "moe", id(MOD): "mod"}.get(id(facts), "dense")
    signals = Signals(facts)
    signals.loads.last = signals.loads.recent = [load, load] if load and facts is MOE else []
    for rule, values in FINDINGS.items():
        tried: list[str] = []
        while made := candidates(fault, Finding(rule, 300, 290, "x", False, values), signals, tried):
            assert len({one.name for one in made}) == len({one.action for one in made}) == len(made)
            tried += [one.action for one in made]
            for one in made:
                assert all(c.isalnum() or c in "-." for c in one.name)
                for overlay in one.overlays(301, decay=800):
                    check(overlay)
                    require_kind(overlay.key, kind)
                    assert (overlay.end == 301) == KEYS[overlay.key].once
                    assert (overlay.end == 799) == (overlay.key == "bias_rate")  # biases rest in the decay
        assert tried


def test_rows_that_take_all_now_are_drawn_anew_though_the_window_is_of_before() -> None:
    signals = watched(300, MOE, load=((1.1, 0.9, 1.05, 0.95),))
    for step in range(301, 331):
        signals.observe(seen(step, load=((2.0, 0.7, 0.7, 0.6),)))
    assert max(signals.loads.last[0]) < 1.5
    first = candidates("router", Finding("collapse", 330, 301, "x", False, {}), signals)[0]
    assert (first.name, first.laid[0]) == ("hot-reset", ("router.reset", [0, 0]))


def test_a_pace_that_jumped_goes_back_to_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    signals = Signals(FACTS)
    for times, value in ((10.0, 0.1), (0.02, 50.0), (1e-4, 100.0)):
        finding = Finding("pace", 300, 290, "x", False, {"times": times})
        assert [one.laid for one in candidates("learning rate", finding, signals)] == [(("lr.scale", value),)]


def test_a_pace_that_jumped_is_tried_from_before_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: where nothing won, the same steps are taken, and what is heard then is tried where it is heard."""
    for by, did in ((0.1, "commit"), (0.0, "")):
        one = watch(monkeypatch, 330, rule="pace", times=10.0)
        one.door.end = better(by, "lr-0.1")
        one.run(1, 330)
        assert one.door.did[0] == ("rollback", 300, "replay")
        assert "Back to step 300, before it began, and there to be tried: lr.scale=0.1" in one.door.why[0].reason
        (verdict,) = trials(one)
        assert (verdict["step"], verdict["rule"]) == (300, "pace")
        if did:
            assert one.door.did[1:] == [("commit", "lr.scale=0.1@310")]  # from where it jumps, not before
        else:
            assert one.door.did[1:] == []
            one.run(301, 330)
            assert one.door.did[1:] == []
            assert "is still on trial" in list(one.decisions())[-1]["reason"]


def test_a_trial_that_does_not_fit_is_no_reason_to_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    one = watch(monkeypatch, 330, rule="pace", times=10.0)
    one.orchestrator.policy.facts = one.orchestrator.policy.facts._replace(budget=0.001)
    one.run(1, 330)
    assert one.door.did == []
    assert len(trials(one, "refused")) == 1


def test_an_attempt_that_ended_in_a_trial_begins_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    one = watch(monkeypatch, 300)

    def stop(*_: Any) -> float:
        raise KeyboardInterrupt

    one.door.end = stop
    with pytest.raises(KeyboardInterrupt):
        one.run(1, 300)
    packed = json.loads(json.dumps(one.orchestrator.pack()))
    again = watch(monkeypatch)
    again.orchestrator.unpack(packed)
    assert again.orchestrator.waiting is not None
    again.door.end, again.door.step = better(0.1), 301
    again.orchestrator.between(again.door)  # type: ignore[arg-type]
    assert again.door.did == [("commit", "lr.scale=2.0@302")]
    assert again.orchestrator.waiting is None


def test_what_a_way_back_undid_was_tried_and_paid_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed behind a rollback that undid a trial: it knows what it knew; the trial that still counts is held again."""
    one = watch(monkeypatch, 300, 900)
    one.door.end = better(0.009)
    one.run(1, 900)
    first, second = trials(one)
    because: dict[str, Any] = {"rule": "divergence", "action": "rewind_replay"}
    because["evidence"] = {"step": 500, "finding": {"since": 490}, "diagnosis": {"cause": "data"}}
    back = {"t": "run", "reason": "rollback", "attempt": 1, "step": 250, "parent_step": 250, "why": because}
    again = watch(monkeypatch).orchestrator
    again.recall([json.loads(json.dumps(event)) for event in (first, back, second)])
    known = one.orchestrator.policy
    assert again.policy.spent == pytest.approx(first["spent"], abs=0.1)
    assert (again.policy.trials, again.policy.tried) == (1, {"learning rate": known.tried["learning rate"][:2]})
    assert [v.action for v in again.policy.learned] == [v.action for v in known.learned[:2]]
    assert again.policy.went == [500]
    assert not again.ended
