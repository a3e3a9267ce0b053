"""Going back, to read again or to leave out; the run is one history afterwards, and a crash at any point loses none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import STEPS, WHY, Act, act, crash, history, request, require_equal, tensors, trained

from lumina.checkpoint import store
from lumina.checkpoint.catalogue import abandoned
from lumina.cli import main
from lumina.errors import UserError
from lumina.inference import engine
from lumina.run import lineage
from lumina.run.folder import Run
from lumina.training.controls import SessionControls
from lumina.training.oom import Fitting
from lumina.training.trainer import Trainer, resume
from lumina.training.ways_back import Back, WaysBack

Keys = dict[str, Any]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return request(tmp_path_factory.mktemp("text"), "dense")


@pytest.fixture(scope="module")
def plain(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Trainer("tiny", root=tmp_path_factory.mktemp("plain"), **keys).fit()


def back(step: int, data: Any = "replay") -> Act:
    return lambda controls: controls.rollback(WHY, step, data)


def snapshot(controls: SessionControls) -> None:
    assert controls.snapshot() == sum(tensor.nbytes for tensor in controls.state.tensors().values())


def quarantined(block: list[int]) -> Act:
    return lambda controls: controls.overlay(WHY, "data.skip", block)


def starts(run: Run) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.event_log.read_text().splitlines()]
    return [event for event in lines if event["t"] == "run"]


def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sample ids of every batch read for a step from now on."""
    seen: list[tuple[int, ...]] = []
    step = Fitting.step

    def watching(self: Fitting, batch: Any, *rest: Any) -> Any:
        seen.append(tuple(batch.sample_ids_B.tolist()))
        return step(self, batch, *rest)

    monkeypatch.setattr(Fitting, "step", watching)
    return seen


@pytest.mark.parametrize("from_memory", [True, False])
def test_back_and_the_same_again_is_the_run_that_never_went_back(
    from_memory: bool, keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at: dict[int, Act] = {5: snapshot, 7: back(5)} if from_memory else {7: back(3)}
    run = trained(tmp_path, keys, monkeypatch, at)
    require_equal(plain, run)
    first, second = starts(run)
    assert (first["attempt"], first["parent_step"], first["reason"]) == (0, None, "start")
    assert (second["attempt"], second["parent_step"], second["reason"]) == (1, 5 if from_memory else 3, "rollback")
    assert second["why"]["reason"] == "because"
    assert run.finished


@pytest.mark.parametrize("from_memory", [True, False])
def test_back_and_on_without_the_batches_is_the_run_that_never_had_them(
    from_memory: bool, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with `data.skip` laid down where the other went back to."""
    to = 5 if from_memory else 3
    seen = batches(monkeypatch)
    at: dict[int, Act] = {5: snapshot, 8: back(to, "skip")} if from_memory else {8: back(to, "skip")}
    run = trained(tmp_path / "back", keys, monkeypatch, at)
    read = seen[:to] + seen[8:]
    assert len(set(read)) == STEPS
    assert not set(read) & set(seen[to:8])
    fresh = trained(tmp_path / "fresh", keys, monkeypatch, {to: quarantined([to, 8 - to])})
    assert seen[-STEPS:] == read
    require_equal(fresh, run)
    (block,) = starts(run)[1]["overlays"]
    assert (block["key"], block["value"], block["begin"]) == ("data.skip", [to, 8 - to], to + 1)


def test_a_crash_right_after_going_back_keeps_to_it(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint of the new attempt is there yet, but a newer one that does not count any more."""
    went = trained(tmp_path / "went", keys, monkeypatch, {8: back(3, "skip")})
    with monkeypatch.context() as patch:
        act(patch, {8: back(3, "skip")})
        patch.setattr(WaysBack, "went_back", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            Trainer("tiny", root=tmp_path / "cut", **keys).fit()
    (run,) = (Run(path) for path in (tmp_path / "cut").iterdir())
    assert [path.name for path in abandoned(run.checkpoints, lineage.lineage(run).counts)] == ["step-000006"]
    assert engine.load(run).step == 3
    assert os.readlink(run.checkpoints / "latest") == "step-000006"  # nobody came to point it elsewhere
    with pytest.raises(RuntimeError, match="power cut"):
        resume(run, [crash])
    assert os.readlink(run.checkpoints / "latest") == "step-000003"
    again = resume(run)
    assert [event["parent_step"] for event in starts(again)] == [None, 3, 3, 3]
    require_equal(went, again)


def test_a_lost_log_forgets_no_overlay_on_the_way_back(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        act(patch, {4: lambda controls: controls.overlay(WHY, "lr.scale", 0.5), 8: crash})
        with pytest.raises(RuntimeError, match="power cut"):
            Trainer("tiny", root=tmp_path / "lost", **keys).fit()
    (run,) = (Run(path) for path in (tmp_path / "lost").iterdir())
    run.event_log.unlink()
    resume(run, back=Back(3))
    (begun,) = starts(run)
    assert [one["id"] for one in begun["overlays"]] == ["lr.scale=0.5@5"]
    laid = trained(tmp_path / "laid", keys, monkeypatch, {4: lambda c: c.overlay(WHY, "lr.scale", 0.5)})
    wanted, found = tensors(laid), tensors(run)
    assert [name for name, tensor in wanted.items() if not torch.equal(tensor, found[name])] == []


def test_a_crash_later_on_keeps_the_quarantine(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def go(controls: SessionControls) -> None:
        back(4, "skip")(controls)
        act(monkeypatch, {crashing[0]: crash})

    went = trained(tmp_path / "went", keys, monkeypatch, {4: snapshot, 8: back(4, "skip")})
    crashing = [0]
    for crashing[0], parent in ((5, 4), (8, 6)):  # 4 was in memory only, until a quarantine began there
        with monkeypatch.context() as patch:
            act(patch, {4: snapshot, 8: go})
            with pytest.raises(RuntimeError, match="power cut"):
                Trainer("tiny", root=tmp_path / str(parent), **keys).fit()
            (run,) = (Run(path) for path in (tmp_path / str(parent)).iterdir())
            again = resume(run)
        assert starts(again)[-1]["parent_step"] == parent
        require_equal(went, again)


def test_twice_to_one_place_and_once_further(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = batches(monkeypatch)

    def twice(controls: SessionControls) -> None:
        back(6, "skip")(controls)
        act(monkeypatch, {7: thrice})

    def thrice(controls: SessionControls) -> None:
        back(6, "skip")(controls)
        act(monkeypatch, {9: back(3)})

    run = trained(tmp_path, keys, monkeypatch, {8: twice})
    assert [event["parent_step"] for event in starts(run)] == [None, 6, 6, 3]
    blocks = [(one["value"], one["begin"]) for one in starts(run)[-1]["overlays"]]
    assert blocks == [([6, 2], 7), ([8, 1], 7)]  # no quarantine is lost on the way back
    assert seen[-7:-4] == seen[3:6]
    assert len(set(seen[:3] + seen[-7:])) == STEPS
    assert not set(seen[6:9]) & set(seen[-7:])
    steps = [event["step"] for event in run.events() if event["t"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    assert {event["attempt"] for event in run.events() if event["t"] == "step" and event["step"] > 3} == {3}


def test_links_and_deleting_follow_what_counts(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = keys | {"checkpoint.keep_last": 3, "checkpoint.every": 2, "train.eval_every": 2}
    links: list[tuple[str, ...]] = []

    def look(controls: SessionControls) -> None:
        controls.session.saver.finish()
        root = controls.session.run.checkpoints
        links.append(tuple(os.readlink(root / name) for name in ("latest", "best")))

    def go(controls: SessionControls) -> None:
        controls.session.saver.finish()
        assert there(controls) == [8, 6, 4]
        back(4)(controls)
        look(controls)
        act(monkeypatch, {5: save, 6: look})

    def save(controls: SessionControls) -> None:
        controls.save()
        controls.session.saver.finish()
        assert there(controls) == [5, 4]  # what counts is kept, and what does not is gone

    def there(controls: SessionControls) -> list[int]:
        return [store.step_of(path) for path in store.checkpoints(controls.session.run.checkpoints)]

    run = trained(tmp_path, few, monkeypatch, {9: go})
    assert links == [("step-000004", "step-000004"), ("step-000006", "step-000006")]
    assert abandoned(run.checkpoints, lineage.lineage(run).counts) == []
    assert engine.load(run).step == STEPS


def test_by_hand_also_behind_a_finished_run(keys: Keys, plain: Run, tmp_path: Path) -> None:
    run = Trainer("tiny", root=tmp_path, **keys).fit()
    for where in (6, 0):
        assert main(["resume", str(run.path), "--from", str(where), "--quiet"]) == 0
        assert starts(run)[-1]["parent_step"] == where
        require_equal(plain, run)
    words = set[str]()

    def told(what: str, done: int, total: int) -> None:
        words.add(what)

    with pytest.raises(RuntimeError, match="power cut"):
        resume(run, [lambda event: event["t"] == "step" and crash()], told, back=Back(3))  # type: ignore[func-returns-value]
    assert {"verifying step-000003", "reading step 3"} <= words  # which may take long: signs of life
    assert not run.finished
    assert Trainer("tiny", root=tmp_path, **keys).fit() == run  # the same command goes on with it
    require_equal(plain, run)


def test_by_hand_without_some_batches(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(root: Path) -> Run:
        with monkeypatch.context() as patch:
            act(patch, {8: crash})
            with pytest.raises(RuntimeError, match="power cut"):
                Trainer("tiny", root=root, **keys).fit()
        return Run(next(root.iterdir()))

    run = stopped(tmp_path / "all")
    assert main(["resume", str(run.path), "--from", "3", "--skip", "--quiet"]) == 0
    require_equal(trained(tmp_path / "went", keys, monkeypatch, {3: quarantined([3, 5])}), run)
    run = stopped(tmp_path / "some")
    assert main(["resume", str(run.path), "--from", "3", "--skip-steps", "5:6", "--quiet"]) == 0
    require_equal(trained(tmp_path / "laid", keys, monkeypatch, {3: quarantined([4, 2])}), run)


def test_phases_are_not_moved_by_a_quarantine_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = request(tmp_path, "dense", data__mode="hybrid_sequential", data__base_ratio=0.5)
    seen = batches(monkeypatch)
    run = trained(tmp_path / "runs", keys, monkeypatch, {7: back(3, "skip")})
    assert [one["value"] for one in starts(run)[-1]["overlays"]] == [[3, 2], [5, 2]]
    read = seen[:3] + seen[7:]
    assert not set(read) & set(seen[3:7])
    assert len(set(read)) == STEPS
    assert history(run)  # and it came to its end
    assert tensors(run)


@pytest.mark.parametrize(
    ("after", "ahead", "blocks"), [(4, 9, [[3, 2]]), (7, 2, [[3, 2], [5, 4]]), (7, 0, [[3, 2], [5, 2]])]
)
def test_what_is_left_out_ahead_is_of_the_phase_that_was_read(
    after: int, ahead: int, blocks: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = request(tmp_path, "dense", data__mode="hybrid_sequential", data__base_ratio=0.5)
    at: dict[int, Act] = {after: lambda controls: controls.rollback(WHY, 3, "skip", after + ahead)}
    run = trained(tmp_path / "runs", keys, monkeypatch, at)
    assert [one["value"] for one in starts(run)[-1]["overlays"]] == blocks


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (Back(5), "no checkpoint of step 5 to go back to(.|\n)*there are those of 3, 6, 9, 10"),
        (Back(10), "stands at step 10, not behind 10"),
        (Back(3, (3, 4)), "not after step 3"),
        (Back(3, (6, 5)), "not after step 3"),
    ],
)
def test_where_it_cannot_go(where: Back, says: str, plain: Run) -> None:
    before = plain.event_log.read_bytes()
    with pytest.raises(UserError, match=says):
        resume(plain, back=where)
    assert plain.event_log.read_bytes() == before


def test_a_damaged_restore_point_changes_nothing(
    keys: Keys, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go(controls: SessionControls) -> None:
        state = store.folder(controls.session.run.checkpoints, 3) / store.STATE
        sound = state.read_bytes()
        state.write_bytes(sound + b" ")
        for there, says in ((3, "damaged checkpoint"), (4, "no checkpoint of step 4"), (7, "is at step 7")):
            with pytest.raises(UserError, match=says):
                controls.rollback(WHY, there, "skip")
        state.write_bytes(sound)

    run = trained(tmp_path, keys, monkeypatch, {7: go})
    assert len(starts(run)) == 1
    require_equal(plain, run)
