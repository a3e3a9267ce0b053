"""The door to a run: whatever goes through it is journalled before it is done, shows, and can be undone to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import STEPS, WHY, Act, act, crash, history, request, require_equal, tensors, trained
from support import full

from lumina.checkpoint import retention, store
from lumina.config.overlay import DECAY, KEYS, SKIP, Value
from lumina.errors import DiskRefused, UserError
from lumina.events import EventWriter
from lumina.model.transformer import Block, Transformer
from lumina.orchestrator.protocol import Controls, Decision
from lumina.run.folder import Run
from lumina.training import controls as module
from lumina.training.controls import SessionControls
from lumina.training.endings import Stopped
from lumina.training.session import Session
from lumina.training.trainer import Trainer, resume

Keys = dict[str, Any]
VALUES: list[tuple[str, Value]] = [
    ("lr.scale", 0.5), ("lr.decay", 3), ("lr.warmup", 3), ("clip", 0.1), ("weight_decay", 1.0), ("z_loss", 1e-2),
    ("bias_rate", 1e-2), (SKIP, [5, 2]), ("skip", 1), ("balance", 0.1), ("temperature", 2.0), ("capacity_factor", 0.5),
    ("expert_dropout", 0.5), ("mod_capacity", 1.0), ("predictor", 0.0), ("optimizer.reset", 1), ("qk_clip", 1.0),
    ("router.reset", [0, 1]), ("expert.reseed", [1, 2]), ("decay", 3),
]  # fmt: skip
HOW: list[tuple[str, Value]] = [("micro_batch", 1), ("recompute", 2)]  # change how a step is computed, not what it is


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return request(tmp_path_factory.mktemp("text"), "hybrid", train__decay=3, train__warmup=2, train__steps=STEPS)


@pytest.fixture(scope="module")
def plain(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Trainer("tiny", root=tmp_path_factory.mktemp("plain"), **keys).fit()


def decisions(run: Run) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.event_log.read_text().splitlines()]
    return [event for event in lines if event["t"] == "decision"]


def pins(controls: SessionControls) -> dict[int, str]:
    return retention.pins(controls.session.run.checkpoints)


def test_every_key_is_tried_below() -> None:
    assert {key for key, _ in VALUES + HOW} == {name for name, key in KEYS.items() if not key.forks_only} | {SKIP}


@pytest.mark.parametrize(("key", "value"), VALUES, ids=lambda v: str(v))
def test_an_overlay_shows_and_its_undo_is_the_run_that_never_had_it(
    key: str, value: Value, keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []

    def lay(controls: SessionControls) -> None:
        laid = controls.overlay(WHY, key, value)
        assert pins(controls) == {4: f"before {laid.id}"}
        act(monkeypatch, {7 if key == DECAY else 8: lambda controls: undo(controls, laid.id)})

    def undo(controls: SessionControls, id: str) -> None:
        seen.extend(history(controls.session.run))
        controls.undo(WHY, id)
        assert controls.step == 4
        assert controls.overlays == ()
        assert pins(controls) == {}

    run = trained(tmp_path, keys, monkeypatch, {4: lay})
    steps = [event for event in seen if event[0] == "step"]
    assert steps
    usual = [event for event in history(plain) if event[0] == "step"]
    assert steps[:4] == usual[:4]
    assert steps != usual[: len(steps)]
    require_equal(plain, run)
    (laid,) = decisions(run)
    assert (laid["step"], laid["rule"], laid["reason"], laid["evidence"]) == (4, "test", "because", {"loss": 1.0})
    assert [one["id"] for one in laid["overlays"]] == [laid["overlay"]]


@pytest.mark.parametrize("mode", ["full", "off"])
def test_how_a_step_is_computed_changes_at_once_and_back(
    mode: str, keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller pieces: more of them, and the same but for rounding. Recomputation: blocks are computed twice."""
    calls: list[int] = []
    forward, computed = Transformer.forward, Block._compute

    def counted(how: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any, **more: Any) -> Any:
            calls.append(0)
            return how(*given, **more)

        return counting

    def lay(controls: SessionControls) -> None:
        count(controls)
        laid = controls.overlay(WHY, "recompute", 2) if mode == "full" else controls.overlay(WHY, "micro_batch", 1)
        act(monkeypatch, {4: count, 5: count, 6: lambda c: undo(c, laid.id)})

    def undo(controls: SessionControls, id: str) -> None:
        count(controls)
        controls.undo(WHY, id)

    def count(controls: SessionControls) -> None:
        counts.append(len(calls))
        calls.clear()

    counts: list[int] = []
    monkeypatch.setattr(Transformer, "forward", counted(forward) if mode == "off" else forward)
    monkeypatch.setattr(Block, "_compute", counted(computed) if mode == "full" else computed)
    run = trained(tmp_path, keys, monkeypatch, {3: lay})
    assert counts == [8 if mode == "full" else 4, 4, 4, 4]  # the first are of a rehearsal and three steps
    require_equal(plain, run)


def test_a_decay_that_is_started_is_the_run_that_was_planned_so_long(
    keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; and undone after its end, the run that was planned longer."""
    short = Trainer("tiny", root=tmp_path / "short", **keys | {"train.steps": 7}).fit()
    run = trained(tmp_path / "run", keys, monkeypatch, {4: lambda c: c.overlay(WHY, DECAY, 3)})
    assert tensors(run, 7).keys() == tensors(short, 7).keys()
    assert all(torch.equal(tensor, tensors(short, 7)[name]) for name, tensor in tensors(run, 7).items())
    assert history(run) == history(short)
    assert run.finished
    assert decisions(run)[0]["ends"] == 7


def test_a_decay_where_it_makes_no_shorter_run_is_refused(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(says: str, steps: int = 3) -> Act:
        def attempt(controls: SessionControls) -> None:
            with pytest.raises(UserError, match=says):
                controls.overlay(WHY, DECAY, steps)

        return attempt

    at = {1: refused("not between warm-up"), 5: refused("has 5 steps left", 6), 7: refused("not between warm-up")}
    trained(tmp_path, keys, monkeypatch, at)
    cosine = keys | {"train.schedule": "cosine"}
    trained(tmp_path, cosine, monkeypatch, {5: refused("a cosine decays all along")})


def test_an_overlay_that_ends_by_itself_and_one_that_is_lifted_are_one(
    keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lay(controls: SessionControls) -> None:
        laid = controls.overlay(WHY, "lr.scale", 2.0)
        act(monkeypatch, {6: lambda controls: controls.lift(WHY, laid.id)})

    short = trained(tmp_path / "short", keys, monkeypatch, {4: lambda c: c.overlay(WHY, "lr.scale", 2.0, steps=2)})
    lifted = trained(tmp_path / "lifted", keys, monkeypatch, {4: lay})
    require_equal(short, lifted)
    rates, usual = ([float(e[5]) for e in history(run) if e[0] == "step"] for run in (lifted, plain))
    assert [a / b for a, b in zip(rates, usual, strict=True)] == [1, 1, 1, 1, 2, 2, 1, 1, 1, 1]


EDITS = [(key, value) for key, value in VALUES if key in KEYS and KEYS[key].once]


@pytest.mark.parametrize("after", [4, 7])
@pytest.mark.parametrize(("key", "value"), EDITS, ids=lambda v: str(v))
def test_a_crash_forgets_no_edit(
    key: str, value: Value, after: int, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the journal and the edit, and after it with the checkpoint of before: it is made, once."""

    def lay(controls: SessionControls) -> None:
        controls.overlay(WHY, key, value)
        if after == 4:
            crash()

    made = trained(tmp_path / "made", keys, monkeypatch, {4: lambda c: c.overlay(WHY, key, value)})
    with monkeypatch.context() as patch:
        act(patch, {7: crash, 4: lay})
        patch.setattr(Session, "_save", lambda session: None if session.state.progress.step > 4 else save(session))
        with pytest.raises(RuntimeError, match="power cut"):
            Trainer("tiny", root=tmp_path / "crashed", **keys).fit()
    require_equal(made, resume(Run(next((tmp_path / "crashed").iterdir()))))


@pytest.mark.parametrize("after", [5, 8])
def test_a_crash_forgets_no_overlay(after: int, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid down after a checkpoint that is gone on from, and lifted since: the steps taken again see it as before."""

    def lay(controls: SessionControls) -> None:
        laid = controls.overlay(WHY, "lr.scale", 2.0)
        act(monkeypatch, {5: lambda controls: controls.lift(WHY, laid.id)})

    laid = trained(tmp_path / "laid", keys, monkeypatch, {4: lay})
    with monkeypatch.context() as patch:
        act(patch, {4: lay, after: crash})
        patch.setattr(Session, "_save", lambda session: None if session.state.progress.step > 3 else save(session))
        with pytest.raises(RuntimeError, match="power cut"):
            Trainer("tiny", root=tmp_path / "crashed", **keys).fit()
        run = Run(next((tmp_path / "crashed").iterdir()))
        assert [store.step_of(path) for path in store.checkpoints(run.checkpoints)] == [3]
    if after == 5:  # it was to be lifted just then
        with monkeypatch.context() as patch:
            act(patch, {5: lambda controls: controls.lift(WHY, controls.overlays[0].id)})
            resume(run)
    require_equal(laid, resume(run))


save = Session._save


def test_what_is_done_was_journalled_on_the_disk_before(
    keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails when the journal is to be safe: nothing is done, and the caller hears of it."""

    def refused(controls: SessionControls) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(EventWriter, "record", crash)
            for attempt in (
                lambda: controls.overlay(WHY, "lr.scale", 0.5),
                lambda: controls.stop(WHY),
            ):
                with pytest.raises(RuntimeError, match="power cut"):
                    attempt()
        assert controls.overlays == ()

    require_equal(plain, trained(tmp_path, keys, monkeypatch, {5: refused}))


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_news_that_the_disk_refuses_are_heard_by_nobody_and_nothing_is_done(
    on_error: str, keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(controls: SessionControls) -> None:
        session = controls.session
        session.secure()
        session.course.observe()
        actions: list[Callable[[], object]] = [
            lambda: controls.overlay(WHY, "lr.scale", 0.5),
            lambda: controls.rollback(WHY, 3, "skip"),
            lambda: controls.stop(WHY),
        ]
        for action in actions:
            with full(session.events), pytest.raises(DiskRefused, match="No space left"):
                action()
            stands = controls.step, controls.overlays, session.state.attempt, session.events.attempt
            assert (*stands, session.ending) == (5, (), 0, 0, "")
        assert pins(controls) == {}

    run = trained(tmp_path, keys | {"checkpoint.on_error": on_error}, monkeypatch, {5: refused})
    require_equal(plain, run)
    lines = [json.loads(line) for line in run.event_log.read_text().splitlines()]
    assert [event["t"] for event in lines if event["t"] in ("run", "decision")] == ["run"]
    assert {event["attempt"] for event in lines} == {0}


def test_a_way_back_stays_for_as_long_as_an_overlay_and_no_longer(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after it was lifted: what it did is part of the run until it is undone."""
    few = keys | {"checkpoint.every": 1, "checkpoint.keep_last": 1}

    def lay(controls: SessionControls) -> None:
        for key, value in (("lr.scale", 0.5), ("clip", 0.1)):
            controls.overlay(WHY, key, value)
        assert pins(controls) == {4: "before lr.scale=0.5@5, clip=0.1@5"}

    def lift(controls: SessionControls) -> None:
        controls.lift(WHY, "lr.scale=0.5@5")
        assert pins(controls) == {4: "before lr.scale=0.5@5, clip=0.1@5"}

    def undo(controls: SessionControls) -> None:
        assert 4 in controls.session.saver.saved()
        controls.undo(WHY, "clip=0.1@5")
        assert (controls.step, pins(controls)) == (4, {4: "before lr.scale=0.5@5"})
        act(monkeypatch, {9: undo_all})

    def undo_all(controls: SessionControls) -> None:
        controls.undo(WHY, "lr.scale=0.5@5")
        assert (controls.step, pins(controls)) == (4, {})

    run = trained(tmp_path / "undone", few, monkeypatch, {4: lay, 7: lift, 8: undo})
    require_equal(trained(tmp_path / "plain", few, monkeypatch), run)
    assert {4} & {store.step_of(path) for path in store.checkpoints(run.checkpoints)} == set()


def test_an_overlay_can_be_undone_after_the_run_went_back_before_it(
    keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays in force, and where it begins again the way back is another checkpoint."""

    def back(controls: SessionControls) -> None:
        controls.rollback(WHY, 3)
        assert pins(controls) == {}
        act(monkeypatch, {8: undo})

    def undo(controls: SessionControls) -> None:
        assert pins(controls) == {4: "before lr.scale=0.5@5"}
        controls.undo(WHY, "lr.scale=0.5@5")
        assert controls.step == 4

    few = keys | {"checkpoint.keep_last": 1}
    at = {3: lambda c: c.snapshot(), 4: lambda c: c.overlay(WHY, "lr.scale", 0.5), 7: back}
    require_equal(plain, trained(tmp_path, few, monkeypatch, at))


def test_save_and_stop(keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stopped) as stopped:
        trained(tmp_path, keys, monkeypatch, {4: lambda c: c.save(), 5: lambda c: c.stop(Decision("drift", "stop"))})
    run = stopped.value.run
    assert stopped.value.step == 5
    assert [store.step_of(path) for path in store.checkpoints(run.checkpoints)] == [5, 4, 3]
    assert run.events()[-1]["signal"] == "drift"
    assert decisions(run)[-1]["action"] == "stop"
    again = resume(run)
    assert [entry for entry in history(again) if "drift" not in entry] == history(plain)


def test_what_cannot_be_done_is_refused_and_nothing_is_done(
    plain: Run, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(controls: SessionControls) -> None:
        for key, value, says in (
            ("lr.scale", 300.0, "out of bounds"), ("data.order", 1, "nothing that a run can"),
            (SKIP, [4, 1], "still to come"), (SKIP, [10, 1], "still to come"), ("lr.scale", 0.0, "out of bounds"),
        ):  # fmt: skip
            with pytest.raises(UserError, match=says):
                controls.overlay(WHY, key, value)
        for act_on in (controls.lift, controls.undo):
            with pytest.raises(UserError, match="no such overlay"):
                act_on(WHY, "nobody")
        assert controls.overlays == ()

    run = trained(tmp_path, keys, monkeypatch, {5: refused})
    assert decisions(run) == []
    require_equal(plain, run)


def test_a_dense_model_has_no_bias_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="has no experts"):
        trained(tmp_path, request(tmp_path, "dense"), monkeypatch, {2: lambda c: c.overlay(WHY, "bias_rate", 0.0)})


def test_it_is_what_the_orchestrator_knows() -> None:
    promised = {name for name in vars(Controls) if not name.startswith("_")}
    assert promised <= set(dir(module.SessionControls))
    assert {name for name in vars(SessionControls) if not name.startswith("_")} == promised
