"""From run to run: trials are kept once, whatever kills a run; a new one begins with them, and knows no more later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import settings, write_text

from lumina.events import Event
from lumina.orchestrator.confidence import Confidence
from lumina.run import verdicts
from lumina.run.folder import Run
from lumina.telemetry import incidents
from lumina.training import experience, trainer
from lumina.training.session import Session
from lumina.training.trainer import Trainer

STEP = Session._step
FAULT, SLOW = "learning rate", "lr.scale 0.5"
ARM = {"name": "slow", "action": SLOW, "gain": 0.03, "low": 0.02, "noise": 0.004, "won": True}
TRIAL = {"id": "t2", "rule": "drift", "fault": FAULT, "arms": [ARM], "winner": "slow"}
FELL = {
    "kind": "outcome",
    "rule": "drift",
    "action": "lr.scale=0.5",
    "evidence": {"held": False, "probation": {"trial": "t2"}},
}


class PowerCut(BaseException):
    """Nothing is told of it."""


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    write_text(tmp_path)
    small = {"model.layers": 2, "train.batch_tokens": 256, "train.warmup": 1, "train.decay": 1}
    return settings(tmp_path, "dense") | small


def telling(monkeypatch: pytest.MonkeyPatch, undone: int = 0, cut: int = 0) -> None:
    """Every run tells of a trial behind step 2, that its winner fell behind `undone`, and ends behind step `cut`."""

    def step(session: Session) -> None:
        STEP(session)
        at = session.state.progress.step
        if at == 2:
            session.tell("trial", **TRIAL)
        if at == undone:
            session.tell("decision", **FELL)
        if at == cut:
            raise PowerCut

    monkeypatch.setattr(Session, "_step", step)


def kept(root: Path) -> list[tuple[str, int, bool]]:
    return [(one["run"], one["step"], one["won"]) for store in verdicts.stores(root).values() for one in store]


def test_a_run_teaches_the_next_and_an_undone_winner_has_lost(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    telling(monkeypatch, undone=4)
    first = Trainer("tiny", root=root, **keys).fit()
    assert kept(root) == [(first.path.name, 2, True), (first.path.name, 2, False)]
    assert verdicts.known(first) == []
    seen: list[Confidence] = []

    def recall(session: Session) -> None:
        STEP(session)
        seen.append(session.experience.recall(session.state.progress.step))

    monkeypatch.setattr(Session, "_step", recall)
    second = Trainer("tiny", root=root, fresh=True, **keys).fit()
    assert {one.mean(FAULT, SLOW) for one in seen} == {0.25}  # tried once, and lost
    with monkeypatch.context() as patch:  # what others learn meanwhile does not change it
        telling(patch)
        Trainer("tiny", root=root, fresh=True, **keys).fit()
    assert len(kept(root)) == 3
    assert len(verdicts.known(second)) == 2


@pytest.mark.parametrize("cut", [2, 3])
def test_a_kill_makes_no_verdict_twice_and_loses_none(
    cut: int, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    with monkeypatch.context() as patch:
        telling(patch, cut=cut)
        with pytest.raises(PowerCut):
            Trainer("tiny", root=root, **keys).fit()
    telling(monkeypatch)  # it goes on from before the trial or from behind it
    run = Trainer("tiny", root=root, **keys).fit()
    assert kept(root) == [(run.path.name, 2, True)]


def test_what_a_refused_store_did_not_take_is_kept_when_the_run_goes_on(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, told = tmp_path / "runs", list[Event]()
    root.mkdir()
    (root / verdicts.FOLDER).touch()
    with monkeypatch.context() as patch:
        telling(patch, cut=5)
        with pytest.raises(PowerCut):
            Trainer("tiny", root=root, listeners=[told.append], **keys).fit()
    (incident,) = [event for event in told if event["t"] == "incident"]
    assert (incident["kind"], incident["step"]) == ("verdicts not kept", 2)
    assert "later runs could learn of this one's trials is not kept" in incidents.sentence(incident)
    (root / verdicts.FOLDER).unlink()
    run = Trainer("tiny", root=root, **keys).fit()
    assert kept(root) == [(run.path.name, 2, True)]


def test_a_fault_of_ours_is_told_once_and_training_goes_on(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object) -> None:
        raise ZeroDivisionError("ours")

    telling(monkeypatch, undone=4)
    monkeypatch.setattr(experience, "verdicts_of", fault)
    run = Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    (incident,) = [event for event in run.events() if event["t"] == "incident"]
    assert run.finished
    assert incident["error"] == "ZeroDivisionError: ours"


def test_a_store_or_a_copy_that_cannot_be_read_is_no_reason_not_to_train(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    (root / verdicts.FOLDER).touch()

    def recall(session: Session) -> None:
        STEP(session)
        if session.state.progress.step == 1:
            (session.run.path / verdicts.NAME).mkdir()
            assert session.experience.recall(1).verdicts == []

    monkeypatch.setattr(Session, "_step", recall)
    run = Trainer("tiny", root=root, **keys).fit()
    (incident,) = [event for event in run.events() if event["t"] == "incident"]
    assert (incident["kind"], run.finished) == ("verdicts not known", True)
    assert "what earlier runs learned" in incidents.sentence(incident)


def test_a_run_that_cannot_be_given_what_is_known_is_not_begun(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.verdicts, "copy_into", full)
    with pytest.raises(Exception, match="the run cannot be written: No space left"):
        Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_copy_is_there_before_the_folder_is_a_run(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two, there is no run that would go on without it."""
    there: list[bool] = []

    def copy(run: Run, version: str) -> None:
        there.append(run.meta.exists())

    monkeypatch.setattr(trainer.verdicts, "copy_into", copy)
    Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    assert there == [False]
