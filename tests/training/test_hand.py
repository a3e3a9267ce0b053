"""By hand: what is asked of a run is done before its next step, shows in its numbers, and is undone to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import Act, crash, history, request, require_equal, trained

import lumina
from lumina.byhand import OpenRun
from lumina.errors import UserError
from lumina.model.transformer import Transformer
from lumina.run.folder import Run
from lumina.run.inbox import Inbox
from lumina.training.controls import SessionControls
from lumina.training.hand import Hand
from lumina.training.session import Stopped
from lumina.training.trainer import Trainer, resume

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
    assert (decision["step"], decision["rule"], decision["state"], decision["undo"]) == (4, "hand", "undone", "")
    assert back["action"].startswith("undo=")
    assert not Inbox(run).waiting()


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
    at: dict[int, Act] = {5: asking(lambda run: run.rollback_steps(2, skip))}
    if skip:
        at[8] = asking(lambda run: run.undo("data.skip"))
    run = trained(tmp_path, keys, monkeypatch, at)
    assert [event["parent_step"] for event in log(run) if event["t"] == "run"] == [None, 3, *[3] * skip]
    if skip:
        read = {event["step"]: event["loss"] for event in log(run) if event["t"] == "step" and event["attempt"] == 1}
        usual = figures(log(plain), "step", "loss")
        assert read[4] != usual[4]  # batches 3 and 4 were left out: another batch is read then
    require_equal(plain, run)


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
        patch.setattr(Hand, "_aside" if moment == "moved" else "_do", crash)
        with pytest.raises(RuntimeError, match="power cut"):
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
        inbox.put({"name": "lr.scale", "value": 9.0})
        inbox.put({"name": "rewind", "value": 1})
        inbox.put({"whatever": 1})
        (inbox.folder / "broken.json").write_text("{")

    run = trained(tmp_path, keys, monkeypatch, {4: ask})
    told = [event for event in log(run) if event["t"] == "incident"]
    assert [event["kind"] for event in told] == ["act refused"] * 4
    for event, says in zip(
        told, ("out of bounds", "no restore point", "no part of a request", "not JSON"), strict=True
    ):
        assert says in event["error"]
    assert len(list((run.path / "inbox" / "refused").iterdir())) == 4
    assert history(run) == history(plain)
    require_equal(plain, run)


def test_bounds_and_kinds_are_refused_before_anything_is_written(plain: Run, tmp_path: Path) -> None:
    stopped = OpenRun(plain)
    dense = OpenRun(Trainer("tiny", root=tmp_path, **request(tmp_path, "dense", train__steps=2)).fit())
    asks: list[tuple[Callable[[], object], str]] = [
        (lambda: stopped.adjust_learning_rate(3.0), "out of bounds"),
        (lambda: stopped.emergency_lr_reduction(0.1), "no reduction"),
        (lambda: stopped.emergency_lr_reduction(100), "out of bounds"),
        (lambda: stopped.rollback_steps(0), "not back"),
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
