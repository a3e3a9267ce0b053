"""By hand: what is asked of a run is done before its next step, shows in its numbers, and is undone to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import WHY, Act, crash, history, request, require_equal, trained

import lumina
from lumina.byhand import OpenRun
from lumina.config.overlay import KEYS, Overlay
from lumina.errors import DiskRefused, UserError
from lumina.model.router import HIDDEN, Router
from lumina.model.transformer import Transformer
from lumina.orchestrator import ledger
from lumina.orchestrator.actions import ACTIONS, NAMED
from lumina.run import lineage
from lumina.run.folder import Run
from lumina.run.inbox import Inbox
from lumina.training import edits
from lumina.training.controls import SessionControls
from lumina.training.course import Course
from lumina.training.endings import LeftHalfway, Stopped
from lumina.training.hand import Hand
from lumina.training.trainer import Trainer, resume
from lumina.training.ways_back import WaysBack

Keys = dict[str, Any]
Ask = Callable[[OpenRun], object]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return request(tmp_path_factory.mktemp("text"), "hybrid", telemetry__log_every=1, train__warmup=2, train__decay=3)


@pytest.fixture(scope="module")
def plain(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Trainer("tiny", root=tmp_path_factory.mktemp("plain"), **keys).fit()


def asking(ask: Ask) -> Act:
    """As another process would, while the run trains."""
    return lambda controls: ask(lumina.open_run(controls.session.run))


class Killed(BaseException):
    """Nothing survives it."""


def killed(*_: object, **__: object) -> None:
    raise Killed


def planted(*_: object, **__: object) -> None:
    raise ZeroDivisionError("planted")


def refused(run: Run) -> list[str]:
    return [event["error"] for event in log(run) if event["t"] == "incident" and event["kind"] == "act refused"]


def log(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.event_log.read_text().splitlines()]


def figures(events: list[dict[str, Any]], type: str, name: str) -> dict[int, Any]:
    """By step, of the first attempt."""
    return {e["step"]: e[name] for e in events if e["t"] == type and e["attempt"] == 0}


def ratio(name: str, type: str = "step") -> Callable[[Any, Any], float]:
    return lambda now, usual: figures(now, type, name)[6] / figures(usual, type, name)[6]


def first(name: str, type: str) -> Callable[[Any, Any], float]:
    return lambda now, usual: figures(now, type, name)[5][0]


def more(name: str) -> Callable[[Any, Any], bool]:
    return lambda now, usual: all(
        a > b for a, b in zip(figures(now, "moe", name)[5], figures(usual, "moe", name)[5], strict=True)
    )


BY_NAME: list[tuple[str, Ask, Callable[[Any, Any], Any], Any]] = [
    ("adjust_learning_rate", lambda r: r.adjust_learning_rate(0.5), ratio("lr"), 0.5),
    ("emergency_lr_reduction", lambda r: r.emergency_lr_reduction(10), ratio("lr"), pytest.approx(0.1)),
    ("adjust_capacity_factor", lambda r: r.adjust_capacity_factor(0.5), more("dropped"), True),
    ("adjust_routing_temperature", lambda r: r.adjust_routing_temperature(2.0), more("entropy"), True),
    ("adjust_mod_capacity", lambda r: r.adjust_mod_capacity(0.5), first("capacity", "mod"), 0.5),
    # Which way these two act, tests of their own say.
    ("adjust_weight_decay", lambda r: r.adjust_weight_decay(1.0), lambda n, u: ratio("loss")(n, u) != 1, True),
    ("enable_expert_dropout", lambda r: r.enable_expert_dropout(0.5), lambda n, u: ratio("loss")(n, u) != 1, True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ask", "effect", "expected"), BY_NAME, ids=[row[0] for row in BY_NAME])
def test_each_acts_and_its_undo_is_the_run_that_never_had_it(
    name: str, ask: Ask, effect: Any, expected: Any, keys: Keys, plain: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def undo(controls: SessionControls) -> None:
        (laid,) = controls.overlays
        assert laid.begin == 5
        lumina.open_run(controls.session.run).undo(laid.key)

    run = trained(tmp_path, keys, monkeypatch, {4: asking(ask), 8: undo})
    assert effect(log(run), log(plain)) == expected
    usual, seen = figures(log(plain), "step", "loss"), figures(log(run), "step", "loss")
    assert all(seen[step] == usual[step] for step in range(1, 5))
    require_equal(plain, run)
    decision, back = lumina.open_run(run).decisions()
    assert (decision["step"], decision["rule"], decision["state"], decision["undo"]) == (4, "hand", "undone", [])
    assert (back["step"], back["evidence"]["step"], back["action"][:5]) == (8, 8, "undo=")
    assert not Inbox(run).waiting()


def test_a_larger_weight_decay_makes_weights_smaller(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps of it, and each weight it acts on has a smaller norm than without."""
    norms: list[dict[str, float]] = []

    def weigh(controls: SessionControls) -> None:
        groups = controls.course.parts.optimizer.groups
        norms.append({name: weight.norm().item() for name, weight in (groups.matrices | groups.decayed).items()})

    for name, at in (("plain", {}), ("more", {4: asking(lambda run: run.adjust_weight_decay(1.0))})):
        trained(tmp_path / name, keys, monkeypatch, {**at, 8: weigh})
    usual, decayed = norms
    assert usual
    assert [name for name in usual if not decayed[name] < usual[name]] == []


def test_expert_dropout_hides_each_expert_from_that_share_of_tokens(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden: dict[int, list[float]] = {}
    steps, choose, step = [0], Router._choose, Course.step

    def stepping(course: Course) -> None:
        steps.append(course.state.progress.step + 1)
        step(course)

    def watched(router: Router, score: Any, key: Any) -> Any:
        choice = choose(router, score, key)
        if key is not None:
            share = (choice < score + router.bias_E - HIDDEN / 2).float().mean((0, 1))
            hidden.setdefault(steps[-1], []).extend(share.tolist())
        return choice

    monkeypatch.setattr(Course, "step", stepping)
    monkeypatch.setattr(Router, "_choose", watched)
    trained(tmp_path, keys, monkeypatch, {3: asking(lambda run: run.enable_expert_dropout(0.5, steps=2))})
    assert [step for step, shares in hidden.items() if any(shares)] == [4, 5]
    for shares in (hidden[4], hidden[5]):
        assert shares == pytest.approx([0.5] * len(shares), abs=0.2)
        assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.03)


def test_the_micro_batch_is_what_is_computed_at_once(
    keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = Transformer.forward

    def counting(model: Transformer, ids: Any, *given: Any) -> Any:
        seen.append(len(ids))
        return forward(model, ids, *given)

    monkeypatch.setattr(Transformer, "forward", counting)
    ask = asking(lambda run: run.adjust_batch_size(2, steps=2))
    run = trained(tmp_path, keys, monkeypatch, {4: ask, 8: asking(lambda run: run.undo("micro"))})
    assert seen[1:10] == [4, 4, 4, 4, 2, 2, 2, 2, 4]  # the first was the rehearsal
    require_equal(plain, run)


@pytest.mark.parametrize("skip", [False, True])
def test_rollback_goes_back_that_far_and_its_quarantine_is_undone(
    skip: bool, keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def back(controls: SessionControls) -> None:
        run = lumina.open_run(controls.session.run)
        for step in (5, -6):  # it stands at 5
            with pytest.raises(UserError, match="possible are steps 0 to 4"):
                run.act("rewind", step)
        run.rollback_steps(2, skip)

    at: dict[int, Act] = {5: back}
    if skip:
        at[8] = asking(lambda run: run.undo("data.skip"))
    run = trained(tmp_path, keys, monkeypatch, at)
    assert [event["parent_step"] for event in log(run) if event["t"] == "run"] == [None, 3, *[3] * skip]
    if skip:
        read = {event["step"]: event["loss"] for event in log(run) if event["t"] == "step" and event["attempt"] == 1}
        usual = figures(log(plain), "step", "loss")
        assert read[4] != usual[4]  # batches 3 and 4 were left out: another batch is read then
    require_equal(plain, run)
    assert [entry.step for entry in OpenRun(run).entries()] == [5, *[8] * skip]  # where it was asked, not where it led
    assert ledger.told(OpenRun(run).entries()[0]).startswith("step 5, attempt 1: hand -> rewind=-2")


def test_what_is_ended_did_what_it_did_until_then(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = {4: asking(lambda run: run.adjust_learning_rate(0.5)), 6: asking(lambda run: run.act("lift", "lr"))}
    run = trained(tmp_path, keys, monkeypatch, at)
    laid, ended = OpenRun(run).decisions()
    assert (laid["step"], laid["state"], ended["step"], ended["evidence"]) == (4, "until step 6", 6, {"step": 6})


def test_looking_while_it_trains(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing before the first step, then what the step before did, also when a way back undid later ones."""
    looks: list[tuple[int, ...]] = []
    waiting = Hand.waiting

    def look(hand: Hand) -> bool:
        run = OpenRun(hand.session.run)
        step, experts = run.get_current_metrics(), run.get_expert_statistics()
        if step:
            assert math.isfinite(step["loss"])
            assert len(experts["load"]) == 2
            looks.append((hand.controls.step, step["step"], experts["step"], step["attempt"]))
        else:
            assert (step, experts) == ({}, {})
            looks.append((hand.controls.step,))
        return waiting(hand)

    monkeypatch.setattr(Hand, "waiting", look)
    trained(tmp_path, keys | {"train.steps": 7}, monkeypatch, {5: asking(lambda run: run.rollback_steps(2))})
    told = [(step, step - 1, step - 1, 0) for step in range(2, 6)]
    again = [(step, step - 1, step - 1, 1) for step in range(4, 8)]  # of step 3 too, of which it was not told then
    assert looks == [(0,), (1,), *told, *again]


def test_looking(plain: Run, keys: Keys, tmp_path: Path) -> None:
    run = lumina.open_run(str(plain.path))
    assert run.get_current_metrics()["step"] == 10
    assert math.isfinite(run.get_current_metrics()["loss"])
    assert len(run.get_expert_statistics()["load"]) == 2
    assert run.get_mod_statistics()["step"] == 10
    assert run.decisions() == []
    dense = Trainer("tiny", root=tmp_path, **request(tmp_path, "dense", train__steps=2)).fit()
    for look in (OpenRun(dense).get_expert_statistics, OpenRun(dense).get_mod_statistics):
        with pytest.raises(UserError, match="a dense model has no"):
            look()
    assert OpenRun(dense).get_current_metrics()["step"] == 2


def test_a_started_decay_is_undone_after_the_run_ended(
    keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path, keys, monkeypatch, {4: asking(lambda run: run.act("decay"))})
    assert log(run)[-1]["step"] == 7
    opened = lumina.open_run(run)
    with pytest.raises(UserError, match="is finished, so that lr"):
        opened.adjust_learning_rate(0.5)
    opened.undo("decay")
    require_equal(plain, resume(run))


def test_what_is_asked_of_a_stopped_run_is_done_when_it_goes_on(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = trained(tmp_path / "one", keys, monkeypatch, {5: asking(lambda run: run.adjust_learning_rate(0.5))})
    with pytest.raises(Stopped, match="stopped by hand at step 5") as stopped:
        trained(tmp_path / "two", keys, monkeypatch, {5: asking(lambda run: run.act("stop"))})
    opened = lumina.open_run(stopped.value.run)
    assert not opened.running
    with pytest.raises(UserError, match="is not running"):
        opened.act("stop")
    opened.adjust_learning_rate(0.5)
    require_equal(done, resume(stopped.value.run))


@pytest.mark.parametrize("moment", ["journal", "moved"])
def test_a_kill_loses_no_request_and_repeats_none(
    moment: str, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the journal knows it, and between that and when the file is moved."""
    ask = asking(lambda run: run.act("qk_clip", 1.0))
    done = trained(tmp_path / "one", keys, monkeypatch, {4: ask})
    with monkeypatch.context() as patch:
        patch.setattr(Hand, "_aside" if moment == "moved" else "_do", killed)
        with pytest.raises(Killed):
            trained(tmp_path / "two", keys, patch, {4: ask})
    run = Run(next((tmp_path / "two").iterdir()))
    assert Inbox(run).waiting()
    again = resume(run)
    by_hand = [event for event in log(again) if event["t"] == "decision" and event["rule"] == "hand"]
    if moment == "moved":
        assert [event["step"] for event in by_hand] == [4]
        require_equal(done, again)
    else:
        assert [event["step"] for event in by_hand] == [3]  # of the checkpoint from which it went on
    assert not Inbox(again).waiting()


def test_what_cannot_be_done_is_told_set_aside_and_training_goes_on(
    keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(controls: SessionControls) -> None:
        inbox = Inbox(controls.session.run)
        inbox.put({"name": "lr.scale", "value": 900.0})
        inbox.put({"name": "rewind", "value": -9})
        inbox.put({"whatever": 1})
        (inbox.folder / "broken.json").write_text("{")

    run = trained(tmp_path, keys, monkeypatch, {4: ask})
    told = [event for event in log(run) if event["t"] == "incident"]
    assert [event["kind"] for event in told] == ["act refused"] * 4
    for event, says in zip(told, ("out of bounds", "come to step 4", "no part of a request", "not JSON"), strict=True):
        assert says in event["error"]
    assert len(list((run.path / "inbox" / "refused").iterdir())) == 4
    assert history(run) == history(plain)
    require_equal(plain, run)


VALUES: dict[str, Any] = {
    "rewind": -1, "data.skip": [6, 1], "lr.scale": 0.5, "lr.warmup": 2, "clip": 0.5, "weight_decay": 0.5,
    "z_loss": 1e-3, "bias_rate": 1e-3, "balance": 0.05, "temperature": 2.0, "capacity_factor": 0.5,
    "expert_dropout": 0.5, "router.reset": [0, 1], "expert.reseed": [1, 2], "mod_capacity": 0.5, "predictor": 0.0,
    "micro_batch": 2, "recompute": "full", "lift": "lr", "undo": "lr",
}  # fmt: skip


def test_a_request_that_cannot_be_moved_aside_is_done_once_and_training_goes_on(
    keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(controls: SessionControls) -> None:
        run = lumina.open_run(controls.session.run)
        run.act("save")
        (controls.session.run.path / "inbox" / "done").write_text("a file where a folder should be")

    run = trained(tmp_path, keys, monkeypatch, {4: ask})
    assert len([e for e in run.events() if e["t"] == "incident" and e["kind"] == "inbox"]) == 1
    require_equal(plain, run)


@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_that_raises_is_told_and_set_aside_and_training_is_as_without(
    name: str, keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lays something over the plan raises when the journal has it and it is in force, the others at once."""
    lay = SessionControls._lay

    def too_late(controls: SessionControls, *given: Any, **more: Any) -> None:
        lay(controls, *given, **more)
        planted()

    def ask(controls: SessionControls) -> None:
        monkeypatch.setattr(SessionControls, "_lay", too_late)
        monkeypatch.setattr(WaysBack, "rollback", planted)
        for method in ("save", "stop"):
            monkeypatch.setattr(SessionControls, method, planted)
        lumina.open_run(controls.session.run).act(name, VALUES.get(name))

    there = {2: lambda controls: controls.overlay(WHY, "lr.scale", 1.0)} if name in NAMED else {}
    run = trained(tmp_path, keys, monkeypatch, {**there, 4: ask})
    (error,) = refused(run)
    assert "ZeroDivisionError: planted" in error
    assert [path.parent.name for path in (run.path / "inbox").glob("*/*.json")] == ["refused"]
    assert [(one["id"], one["end"]) for one in lineage.overlays(run) or []] == [("lr.scale=1.0@3", None)] * len(there)
    require_equal(plain, run)


EDITS = [name for name, action in ACTIONS.items() if action.key in KEYS and KEYS[action.key].once]


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_raises_is_taken_back_and_no_resume_makes_it_again(
    name: str, keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises when all of it is done; the resume comes by with the edit as it should be."""
    make = edits.make

    def too_late(edit: Overlay, parts: Any, probe: Any) -> None:
        make(edit, parts, probe)
        planted()

    ask = asking(lambda run: run.act(name, 1.0 if name == "qk_clip" else VALUES.get(name)))
    with monkeypatch.context() as patch:
        patch.setattr(edits, "make", too_late)
        require_equal(plain, trained(tmp_path / "one", keys, patch, {4: ask}))
        with pytest.raises(RuntimeError, match="power cut"):
            trained(tmp_path / "two", keys, patch, {4: ask, 5: crash})
    run = Run(next((tmp_path / "two").iterdir()))
    assert "ZeroDivisionError: planted" in refused(run)[0]
    assert lineage.overlays(run) == []
    assert OpenRun(run).decisions()[0]["state"] == "undone"
    require_equal(plain, resume(run))


def test_a_way_back_that_fails_half_way_ends_the_attempt_and_the_next_begins_there(
    keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory holds no restore point it has none to stay at, either."""
    keys = keys | {"orchestrator.mode": "off"}
    with monkeypatch.context() as patch:
        patch.setattr(WaysBack, "_go_to", planted)
        with pytest.raises(LeftHalfway, match="planted"):
            trained(tmp_path, keys, patch, {5: asking(lambda run: run.rollback_steps(2))})
    run = resume(Run(next(tmp_path.iterdir())))
    assert [event["parent_step"] for event in log(run) if event["t"] == "run"] == [None, 3, 3]
    assert not Inbox(run).waiting()
    require_equal(plain, run, watched=False)


@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_a_disk_that_refuses_ends_the_attempt_if_that_is_wanted(
    on_error: str, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise DiskRefused("the disk is full")

    monkeypatch.setattr(SessionControls, "_lay", full)
    at = {4: asking(lambda run: run.adjust_learning_rate(0.5))}
    wanted = keys | {"checkpoint.on_error": on_error}
    if on_error == "continue":
        assert refused(trained(tmp_path, wanted, monkeypatch, at)) == ["the disk is full"]
    else:
        with pytest.raises(DiskRefused):
            trained(tmp_path, wanted, monkeypatch, at)
        assert Inbox(Run(next(tmp_path.iterdir()))).waiting()  # another try may succeed


def test_bounds_and_kinds_are_refused_before_anything_is_written(plain: Run, tmp_path: Path) -> None:
    stopped = OpenRun(plain)
    dense = OpenRun(Trainer("tiny", root=tmp_path, **request(tmp_path, "dense", train__steps=2)).fit())
    asks: list[tuple[Callable[[], object], str]] = [
        (lambda: stopped.adjust_learning_rate(300.0), "out of bounds"),
        (lambda: stopped.emergency_lr_reduction(0.1), "no reduction"),
        (lambda: stopped.emergency_lr_reduction(1000), "out of bounds"),
        (lambda: stopped.rollback_steps(0), "not back"),
        (lambda: stopped.rollback_steps(11), "has come to step 10"),
        (lambda: stopped.adjust_weight_decay(2.0), "out of bounds"),
        (lambda: stopped.adjust_mod_capacity(0.0), "out of bounds"),
        (lambda: stopped.undo("nothing"), "no such overlay"),
        (lambda: dense.adjust_capacity_factor(1.0), "has no experts"),
        (lambda: dense.adjust_mod_capacity(0.5), "has no depth routing"),
    ]
    for ask, says in asks:
        with pytest.raises(UserError, match=says):
            ask()
    assert not (plain.path / "inbox").exists()
    assert not (dense.run.path / "inbox").exists()
