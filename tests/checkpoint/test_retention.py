from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lumina.checkpoint import retention, store
from lumina.checkpoint.catalogue import LOSS
from lumina.checkpoint.retention import prune
from lumina.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 to 5, in an order that is not theirs."""
    for step in (3, 1, 2, 5, 4):
        store.save(tmp_path, step, {"w": torch.full((2,), float(step))}, {}, {})
    store.point(tmp_path, "latest", 5)
    return tmp_path


def steps(root: Path) -> list[int]:
    return sorted(map(store.step_of, store.checkpoints(root)))


def folders(root: Path, *steps: int) -> list[Path]:
    return [store.folder(root, step) for step in steps]


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_the_newest_stay(root: Path) -> None:
    assert prune(root, keep_last=2) == [1, 2, 3]
    assert steps(root) == [4, 5]
    assert prune(root, keep_last=2) == []
    assert sorted(os.listdir(root)) == ["latest", "step-000004", "step-000005"]


def test_latest_and_best_stay(root: Path) -> None:
    store.point(root, "best", 2)
    store.point(root, "latest", 3)  # after going back: newer steps were damaged or rolled back
    assert prune(root, keep_last=1) == [1, 4]
    assert steps(root) == [2, 3, 5]


def test_an_incomplete_folder_is_neither_counted_nor_deleted(root: Path) -> None:
    for step in (1, 5):
        (store.folder(root, step) / "COMPLETE").unlink()
    store.point(root, "latest", 4)
    assert prune(root, keep_last=2) == [2]
    assert steps(root) == [1, 3, 4, 5]


def test_a_torn_one_is_neither_counted_nor_deleted(root: Path) -> None:
    """Its sizes tell, and nothing is read."""
    state = store.folder(root, 5) / store.STATE
    state.write_bytes(state.read_bytes()[:-1])
    assert prune(root, keep_last=2) == [1, 2]
    assert steps(root) == [3, 4, 5]


def test_one_that_was_found_damaged_counts_no_longer_until_it_is_saved_again(root: Path) -> None:
    retention.note_damaged(root, [store.folder(root, 4)])
    assert prune(root, keep_last=2) == [1, 2]
    assert steps(root) == [3, 4, 5]
    store.save(root, 4, {"w": torch.zeros(3)}, {}, {})
    assert prune(root, keep_last=2) == [3]


def evaluated(root: Path, losses: dict[int, float | None]) -> None:
    for step, loss in losses.items():
        store.save(root, step, {"w": torch.full((2,), float(step))}, {}, {LOSS: loss})


def test_the_best_stay_by_their_held_out_losses(root: Path) -> None:
    evaluated(root, {1: 2.0, 2: 1.0, 3: None, 4: math.nan, 5: 3.0})
    assert prune(root, keep_last=1, keep_best=2) == [3, 4]
    evaluated(root, {6: 0.5})
    assert prune(root, keep_last=1, keep_best=2) == [1, 5]


def test_every_kth_stays(root: Path) -> None:
    assert prune(root, keep_last=1, keep_every=2) == [1, 3]
    assert steps(root) == [2, 4, 5]


def test_a_pinned_one_stays_until_others_are_and_says_why(root: Path) -> None:
    retention.note_damaged(root, [store.folder(root, 4)])
    retention.pin(root, {2: "before decision 7", 3: "before decision 8"})
    assert prune(root, keep_last=1) == [1]
    assert retention.kept(root, keep_last=1)[store.folder(root, 2)] == ["pinned: before decision 7"]
    assert store.newest(root)[0] is not None
    retention.pin(root, {3: "before decision 8"})
    assert prune(root, keep_last=1) == [2]
    assert retention.pins(root) == {3: "before decision 8"}
    retention.pin(root, {})
    assert prune(root, keep_last=1) == [3]
    assert steps(root) == [4, 5]  # what is damaged is remembered all the same


def test_a_link_is_never_pointed_at_a_name_that_is_not_there(root: Path) -> None:
    store.folder(root, 4).rename(root / "step-000004.old")
    retention.delete(root, [store.folder(root, step) for step in (1, 2, 3, 5)])
    assert sorted(os.listdir(root)) == ["step-000004.old"]


def test_what_a_later_attempt_undid_goes_first(root: Path) -> None:
    evaluated(root, {4: 0.1, 5: 0.2})
    store.point(root, "latest", 3)  # the run went back to 3
    assert prune(root, keep_last=2, keep_every=1, abandoned=folders(root, 4, 5)) == [4, 5]
    assert steps(root) == [1, 2, 3]


def test_something_that_counts_always_stays(root: Path) -> None:
    (root / "latest").unlink()
    assert prune(root, keep_last=1, abandoned=folders(root, 1, 2, 3, 4, 5)) == [1, 2, 3, 4]
    assert prune(root, keep_last=0) == []
    (store.folder(root, 5) / store.STATE).unlink()
    assert prune(root, keep_last=1) == []
    assert steps(root) == [5]


def test_notes_that_are_damaged_stop_the_deleting(root: Path) -> None:
    for content in ("{", "[]", '{"pinned": 3}', '{"pinned": {"x": "y"}}'):
        (root / "notes.json").write_text(content)
        with pytest.raises(UserError, match=r"notes\.json: not the notes"):
            prune(root, keep_last=1)
    assert steps(root) == [1, 2, 3, 4, 5]


def test_leftovers_of_dead_processes_and_of_our_own_are_swept(root: Path) -> None:
    for pid in (dead_pid(), os.getpid()):
        (root / f"step-000006.tmp-{pid}" / "model").mkdir(parents=True)
        (root / f"best.tmp-{pid}").symlink_to("step-000001")
    (root / f"step-000006.tmp-{os.getppid()}").mkdir()  # alive: somebody is writing it
    (root / "notes.txt").touch()
    retention.sweep(root)
    assert {path.name for path in root.iterdir()} - {path.name for path in store.checkpoints(root)} == {
        "latest",
        "notes.txt",
        f"step-000006.tmp-{os.getppid()}",
    }
    assert steps(root) == [1, 2, 3, 4, 5]


def test_a_replaced_one_goes_once_its_successor_is_complete(root: Path) -> None:
    store.folder(root, 2).rename(root / "step-000002.old")  # killed before the new one was published
    retention.sweep(root)
    assert (root / "step-000002.old").is_dir()
    store.folder(root, 3).rename(root / "step-000003.old")
    store.save(root, 3, {}, {}, {})
    retention.sweep(root)
    assert not (root / "step-000003.old").exists()
    assert steps(root) == [1, 2, 3, 4, 5]


def test_what_is_being_deleted_is_no_checkpoint_from_the_first_moment(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(root, keep_last=4)
    assert steps(root) == [2, 3, 4, 5]
    retention.sweep(root)
    assert not list(root.glob("*.tmp-*"))
