"""After a way back, by hand or by decision, the orchestrator knows what it knew there, and what was done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forks import WHY, Act, history, last, request, require_equal, tensors, trained
from torch import Tensor

import lumina
from lumina.events import read_events
from lumina.orchestrator import orchestrator
from lumina.orchestrator.diagnosis import Diagnosis
from lumina.run.folder import Run
from lumina.training.controls import SessionControls
from lumina.training.course import Course
from lumina.training.endings import Stopped
from lumina.training.optim import Optimizer
from lumina.training.session import Session
from lumina.training.trainer import Trainer, resume

STEP = Optimizer.step

Keys = dict[str, Any]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("text")
    return request(folder, orchestrator__mode="act", orchestrator__snapshot_every=2, train__warmup=2, train__decay=2)


@pytest.fixture(scope="module")
def plain(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Trainer("tiny", root=tmp_path_factory.mktemp("plain"), **keys).fit()


def known(run: Run) -> dict[str, Any]:
    """The orchestrator's state that was saved last."""
    state: dict[str, Any] = last(run).state["orchestrator"]
    return state


def begun(run: Run) -> list[int | None]:
    """The steps that attempts went on from, also of those that were undone."""
    return [event["parent_step"] for event in read_events(run.event_log) if event["t"] == "run"]


def decided(run: Run) -> list[dict[str, Any]]:
    """What the orchestrator did: what it made of it, and from what."""
    events = [event for event in read_events(run.event_log) if event.get("action") != "rewind_replay"]  # told twice
    whys = [event if event["t"] == "decision" else event.get("why") for event in events]
    names = ("rule", "action", "evidence", "reason")
    return [{name: why[name] for name in names} for why in whys if why and why["kind"] == "act"]


def back_to(step: int) -> Act:
    """As a person asks, in another process."""
    return lambda controls: lumina.open_run(controls.session.run).act("rewind", step)


@pytest.mark.parametrize(("after", "to"), [(5, 4), (8, 3), (9, 6)], ids=["memory", "disk", "either"])
def test_by_hand_it_knows_what_it_knew_there(
    after: int, to: int, keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path, keys, monkeypatch, {after: back_to(to)})
    assert begun(run) == [None, to]
    require_equal(plain, run)
    assert known(run) == known(plain)
    assert lumina.open_run(run).decisions()[0]["action"] == f"rewind={to}"


def test_what_is_heard_before_the_first_observation_after_it_is_kept(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forecast is heard at once, the step it is of one step later."""
    found = {"nats": 0.2, "z": 6.0, "points": 10, "against": "itself"}

    def forecast(controls: SessionControls) -> None:
        controls.rollback(WHY, 4)
        assert [point.state["progress"].step for point in controls.session.ways.points] == [2, 4]
        assert controls.session.oversight.calm()
        controls.session.tell("forecast", deviation=found)

    run = trained(tmp_path, keys, monkeypatch, {5: forecast})
    assert [one[:3] for one in known(run)["signals"]["deviations"]] == [[4, 0.2, 6.0]]


def test_what_a_look_finds_after_it_is_held_against_the_look_before(
    keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would have begun with the run, and no restore point would be sound."""
    whole = Course._broken

    def broken(course: Course, golden: Any) -> tuple[str, ...]:
        found = whole(course, golden)
        progress, attempt = course.state.progress, course.state.attempt
        return ("replicas: planted",) if (progress.step, attempt) == (8, 1) else found

    monkeypatch.setattr(Course, "_broken", broken)
    run = trained(tmp_path, keys, monkeypatch, {9: back_to(6)})
    _, decided = lumina.open_run(run).decisions()
    assert (decided["rule"], decided["step"], decided["evidence"]["finding"]["since"]) == ("looked", 7, 7)
    assert begun(run) == [None, 6, 6]
    require_equal(plain, run)


def moved_too_far(optimizer: Optimizer, lr: float, skip: Tensor) -> None:
    """A fault that comes whenever steps 7 and 8 are taken."""
    STEP(optimizer, lr * (3 if optimizer.steps_taken in (6, 7) else 1), skip)


def handed_over(root: Path, keys: Keys, kills: list[tuple[int, int]]) -> Run:
    """A run whose fault comes again until a person has to look, killed after these steps of these attempts."""
    step = Session._step

    def killed(session: Session) -> None:
        step(session)
        if (session.state.attempt, session.state.progress.step) in kills:
            raise RuntimeError("power cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", moved_too_far)
        patch.setattr(Session, "_step", killed)
        for number in range(len(kills) + 1):
            ends = (RuntimeError, "power cut") if number < len(kills) else (Stopped, "by invariant at step 9")
            with pytest.raises(ends[0], match=ends[1]):
                resume(Run(next(root.iterdir()))) if number else Trainer("tiny", root=root, **keys).fit()
    return Run(next(root.iterdir()))


def test_one_that_was_killed_after_its_ways_back_decides_and_trains_as_one_that_was_not(
    keys: Keys, tmp_path: Path
) -> None:
    """What was done is in the log before it is in a checkpoint: it goes back no third time."""
    keys = keys | {
        "orchestrator.snapshot_every": 3
    }  # points in memory end with the process: those on disk are the same
    one, other = handed_over(tmp_path / "one", keys, []), handed_over(tmp_path / "other", keys, [(1, 7), (3, 5)])
    assert begun(one) == [None, 6, 3]
    assert begun(other) == [None, 6, 6, 3, 3]
    assert [why["action"] for why in decided(one)] == ["rewind_replay", "rewind_replay", "stop"]
    assert decided(one) == decided(other)
    acted = [entry.action for entry in lumina.open_run(one).entries() if entry.kind == "act"]
    assert acted == [why["action"] for why in decided(one)]
    assert last(one, 9).state["orchestrator"] == last(other, 9).state["orchestrator"]
    require_equal(resume(one), resume(other))


def fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 7 and 8 are three times too long, the first time that they are taken."""
    faults = [3.0, 3.0]

    def once(optimizer: Optimizer, lr: float, skip: Tensor) -> None:
        STEP(optimizer, lr * (faults.pop() if faults and optimizer.steps_taken >= 6 else 1), skip)

    monkeypatch.setattr(Optimizer, "step", once)


def test_undo_of_what_a_decision_left_out_is_the_run_that_never_left_it_out(
    keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches read since the restore point, and more ahead, are one name that the ledger gives."""

    def undo(controls: SessionControls) -> None:
        run = lumina.open_run(controls.session.run)
        first, entry = run.entries()
        assert (first.kind, first.step) == ("advise", 7)
        assert entry.action == "rewind_skip"
        (laid,) = controls.overlays
        assert (laid.value, laid.begin, entry.undo) == ([6, 3], 7, [laid.id])  # 6 to 8 were read or are as bad
        run.undo(entry.undo[0])

    fault(monkeypatch)
    monkeypatch.setattr(orchestrator, "diagnose", lambda *_: Diagnosis("data", "Planted.", "data", ahead=1))
    run = trained(tmp_path, keys, monkeypatch, {9: undo})
    assert begun(run) == [None, 6, 6]
    assert [entry["state"] for entry in lumina.open_run(run).decisions()] == ["", "undone", ""]
    require_equal(plain, run)
    assert known(run)["signals"] == known(plain)["signals"]


def test_a_way_back_that_fails_on_its_way_leaves_the_run_where_it_stood(
    keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The orchestrator ends with it; that it was tried is nowhere in the log but as its incident."""

    fault(monkeypatch)
    unwatched = trained(tmp_path / "off", keys | {"orchestrator.mode": "off"}, monkeypatch)
    fault(monkeypatch)
    announce = Session.announce

    def announced(session: Session, reason: str, *how: Any, **more: Any) -> None:
        if reason == "rollback":
            raise ZeroDivisionError("planted")
        announce(session, reason, *how, **more)

    monkeypatch.setattr(Session, "announce", announced)
    run = trained(tmp_path / "act", keys, monkeypatch)
    assert begun(run) == [None]
    assert [e["error"][:28] for e in run.events() if e["t"] == "incident"] == ["ZeroDivisionError: planted (i"[:28]]
    there, here = tensors(unwatched), tensors(run)
    assert [name for name in there if not torch.equal(there[name], here[name])] == []
    assert history(unwatched) == [event for event in history(run) if event[0] != "decision"]
