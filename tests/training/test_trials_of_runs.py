"""A trial that nothing won is a trial that never was; what won is the run's, and can be undone; to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forks import WHY, act, crash, require_equal, trained
from trials import HEARD, MEMORY, PROBE, STEPS, keys, plant, told

from lumina.config.overlay import Overlay
from lumina.events import read_events
from lumina.orchestrator.candidates import Candidate
from lumina.orchestrator.ledger import entries
from lumina.run.folder import Run
from lumina.training.arms import Arms
from lumina.training.controls import SessionControls
from lumina.training.endings import Stopped
from lumina.training.oom import Fitting
from lumina.training.trainer import Trainer, resume

UP = "lr-2"
ID = f"lr.scale=2.0@{HEARD + 2}"


def run_of(root: Path, made: dict[str, Any]) -> Run:
    return Trainer("tiny", root=root, **made).fit()


def off(folder: Path, **more: Any) -> Run:
    """The run that nobody watched."""
    return run_of(folder / "off", keys(folder, orchestrator__mode="off", **more))


def equal(one: Run, other: Run) -> None:
    require_equal(one, other, watched=False, steps=STEPS)


@pytest.mark.parametrize("kind", ["hybrid", "dense"])
def test_a_trial_that_nothing_won_leaves_the_run_that_never_tried(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        plant(patch)
        tried = run_of(tmp_path / "tried", keys(tmp_path, kind))
    equal(off(tmp_path, kind=kind), tried)
    events = list(tried.events())
    (verdict,) = told(events, "trial", kind="verdict")
    assert verdict["winner"] is None
    assert verdict["placebo"] == [pytest.approx(verdict["control"][0], abs=1e-6)]  # to the bit, or it were void
    assert [len(arm["gains"]) for arm in verdict["arms"]] == [verdict["pairs"]] * 2
    (said,) = told(events, "decision")
    assert (said["kind"], said["action"]) == ("advise", "watch")
    assert "Nothing won" in said["reason"]
    arms = verdict["pairs"] * 3 + 1
    assert verdict["spent"] == pytest.approx(1.1 * arms * (MEMORY + PROBE))


def test_what_won_is_the_run_that_had_it_from_the_start_of_its_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        plant(patch, winner=UP)
        won = run_of(tmp_path / "won", keys(tmp_path))
    lay = {HEARD + 1: lambda controls: controls.overlay(WHY, "lr.scale", 2.0)}
    equal(trained(tmp_path / "laid", keys(tmp_path, orchestrator__mode="off"), monkeypatch, lay), won)
    acted, held = entries(won.events())[0], told(list(won.events()), "decision", kind="outcome")
    assert (acted.kind, acted.action, acted.laid, acted.state) == ("act", "lr.scale=2", [ID], "in force")
    assert acted.evidence["trial"]["winner"] == UP
    assert held[0]["evidence"]["held"]
    assert held[0]["step"] == HEARD + 1 + 2 * MEMORY
    assert "has held" in acted.outcome


def test_what_does_not_hold_on_probation_is_undone_to_the_run_that_never_acted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        plant(patch, winner=UP, loses=True)
        undone = run_of(tmp_path / "undone", keys(tmp_path))
    equal(off(tmp_path), undone)
    (back,) = (event for event in undone.events() if event["t"] == "run" and event["attempt"] == 1)
    assert back["parent_step"] == HEARD + 1
    assert back["why"]["evidence"]["probation"]["gain"] < 0
    first = entries(read_events(undone.event_log))[0]
    assert (first.state, first.undo) == ("undone", [])


def test_the_measure_of_the_probation_is_that_of_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A winner that changes nothing ends, to the bit, where the run without it does: on the same text, as far on."""
    nothing = Candidate(UP, "nothing", (("lr.scale", 1.0),))
    with monkeypatch.context() as patch:
        plant(patch, winner=UP, loses=None)
        patch.setattr("lumina.orchestrator.policy.candidates", lambda *_: [nothing])
        patch.setattr(SessionControls, "alters", lambda *_: True)
        run = run_of(tmp_path / "run", keys(tmp_path))
    equal(off(tmp_path), run)
    (back,) = (event for event in run.events() if event["t"] == "run" and event["attempt"] == 1)
    assert back["why"]["evidence"]["probation"]["gain"] == 0
    assert "ends 0.0000 nats above" in back["why"]["reason"]


def test_what_won_is_undone_by_hand_to_the_run_that_never_acted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for behind in (HEARD + 1 + MEMORY, STEPS - 4):  # on probation, and when that has passed
        with monkeypatch.context() as patch:
            plant(patch, winner=UP)
            act(patch, {behind: lambda controls: controls.undo(WHY, ID)})
            undone = run_of(tmp_path / f"undone {behind}", keys(tmp_path))
        equal(off(tmp_path), undone)
        judged = [e for e in read_events(undone.event_log) if "probation" in e.get("evidence", {})]
        assert len(judged) == (behind > HEARD + 1 + 2 * MEMORY)


def test_a_stop_in_a_trial_is_resumed_and_holds_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        plant(patch, winner=UP)
        whole = run_of(tmp_path / "whole", keys(tmp_path))
        run, arms = Arms.run, iter(range(99))

        def stopping(*given: Any, **more: Any) -> Any:
            if next(arms) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return run(*given, **more)

        patch.setattr(Arms, "run", stopping)
        with pytest.raises(Stopped) as stopped:
            run_of(tmp_path / "stopped", keys(tmp_path))
        assert stopped.value.step == HEARD + 1
        patch.setattr(Arms, "run", run)
        again = resume(stopped.value.run)
    equal(whole, again)
    first, second = (told(list(one.events()), "trial", kind="verdict")[0] for one in (whole, again))
    assert [name for name in first if first[name] != second[name]] == ["attempt", "seconds"]


KILLED = """
import os, signal, sys
sys.path[:0] = {paths}
from pathlib import Path
from pytest import MonkeyPatch
from lumina.training.arms import Arms
from lumina.training.controls import SessionControls
from lumina.training.trainer import Trainer
from trials import keys, plant

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

patch = MonkeyPatch()
plant(patch, winner="lr-2")
if {where!r} == "arm":
    run, arms = Arms.run, iter(range(99))
    patch.setattr(Arms, "run", lambda *a, **k: die() if next(arms) == 4 else run(*a, **k))
elif {where!r} == "secured":
    patch.setattr("lumina.training.controls.SessionControls._lay", die)
elif {where!r} == "commit":
    patch.setattr(Arms, "keep", die)
else:
    keep = Arms.keep
    patch.setattr(Arms, "keep", lambda *a: (keep(*a), die()))
Trainer("tiny", root=Path({root!r}), **keys(Path({folder!r}))).fit()
"""


@pytest.mark.parametrize("where", ["arm", "secured", "commit", "kept"])
def test_a_kill_in_a_trial_is_resumed_to_the_bit(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an arm; when the disk knows that it is over and the journal does not; when the journal has the
    winner and the run has not; and just behind it."""
    here, root = Path(__file__).parent, tmp_path / "killed"
    code = KILLED.format(paths=[str(here), str(here.parent)], root=str(root), folder=str(tmp_path), where=where)
    died = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert died.returncode == -signal.SIGKILL
    plant(monkeypatch, winner=UP)
    again = resume(Run(next(root.glob("tiny-*"))))
    equal(run_of(tmp_path / "whole", keys(tmp_path)), again)
    assert told(list(again.events()), "decision", kind="outcome")[0]["evidence"]["held"]


def test_a_stop_in_the_trial_that_an_attempt_begins_with_stops_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preempted twice, and killed once the third has committed: as if nothing had happened."""
    plant(monkeypatch, winner=UP)
    whole = run_of(tmp_path / "whole", keys(tmp_path))
    run, arms = Arms.run, iter(range(99))

    def stopping(*given: Any, **more: Any) -> Any:
        if next(arms) in (2, 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return run(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Arms, "run", stopping)
        with pytest.raises(Stopped) as first:
            run_of(tmp_path / "stopped", keys(tmp_path))
        with pytest.raises(Stopped) as second:
            resume(first.value.run)
    stopped = second.value.run
    assert (first.value.step, second.value.step) == (HEARD + 1, HEARD + 1)
    assert stopped.events()[-1]["reason"] == "stopped"
    with monkeypatch.context() as patch:
        keep = Arms.keep
        patch.setattr(Arms, "keep", lambda *given: (keep(*given), crash()))
        patch.setattr("lumina.training.failing.ends", lambda *_: True)
        with pytest.raises(RuntimeError, match="power cut"):
            resume(stopped)
    equal(whole, resume(stopped))


@pytest.mark.parametrize("where", ["lumina.orchestrator.trying.judge", "lumina.orchestrator.trying.Trial.goes_on"])
def test_a_fault_of_its_own_in_a_trial_leaves_the_run_alone(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        plant(patch, winner=UP)
        patch.setattr(where, crash)
        crashed = run_of(tmp_path / "crashed", keys(tmp_path))
    equal(off(tmp_path), crashed)
    assert [event["error"] for event in told(list(crashed.events()), "incident", kind="orchestrator failed")]


def test_arms_that_do_not_compare_prove_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The placebo ends off its control: whatever seems to have won is not taken."""
    run = Arms.run

    def noisy(arms: Arms, name: str, *given: Any, **more: Any) -> Any:
        outcome = run(arms, name, *given, **more)
        object.__setattr__(outcome, "heldout", outcome.heldout + 1e-9 * ("placebo" in name))
        return outcome

    with monkeypatch.context() as patch:
        plant(patch, winner=UP)
        patch.setattr(Arms, "run", noisy)
        tried = run_of(tmp_path / "tried", keys(tmp_path))
    equal(off(tmp_path), tried)
    (verdict,) = told(list(tried.events()), "trial", kind="verdict")
    assert "arms cannot be compared" in verdict["void"]


def test_a_trial_that_does_not_fit_is_refused_and_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        plant(patch, winner=UP)
        poor = run_of(tmp_path / "poor", keys(tmp_path, orchestrator__trial__budget=0.5))
    equal(off(tmp_path), poor)
    (refused,) = told(list(poor.events()), "trial")
    assert refused["kind"] == "refused"
    assert "30 are left of orchestrator.trial.budget" in refused["reason"]
    (said,) = told(list(poor.events()), "decision")
    assert "Not tried" in said["reason"]


def test_advise_says_what_would_be_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        plant(patch, winner=UP)
        advised = run_of(tmp_path / "advised", keys(tmp_path, orchestrator__mode="advise"))
    equal(off(tmp_path), advised)
    (said,) = told(list(advised.events()), "decision")
    assert "To be tried: lr.scale=0.5, lr.scale=2" in said["reason"]


def test_an_arm_is_held_to_the_depth_that_it_is_trained_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float | None] = []
    evaluate = Fitting.evaluate

    def hear(fitting: Fitting, kind: Any, capacity: float | None, *more: Any) -> Any:
        asked.append(capacity)
        return evaluate(fitting, kind, capacity, *more)

    def fork(controls: SessionControls) -> None:
        with monkeypatch.context() as patch, controls.fork(1.0) as fork:
            patch.setattr(Fitting, "evaluate", hear)
            fork.run("control", [], 1, 1)
            fork.run("deeper", [Overlay("x", "mod_capacity", 0.5, controls.step + 1)], 1, 1)

    trained(tmp_path, keys(tmp_path, train__steps=8, orchestrator__mode="off"), monkeypatch, {4: fork})
    assert asked == [0.25, 0.5]


def test_steps_that_cost_more_are_fewer_in_equal_counted_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []

    def weigh(controls: SessionControls) -> None:
        for key, value in (("mod_capacity", 0.5), ("lr.scale", 0.5), ("mod_capacity", 0.25)):
            found.append(controls.work([Overlay("x", key, value, controls.step + 1)]))

    trained(tmp_path / "weighed", keys(tmp_path, orchestrator__mode="off"), monkeypatch, {4: weigh})
    assert found[0] > 1.05
    assert found[1:] == [1.0, 1.0]
