"""What a list of checkpoints says, also of folders that somebody made to hurt whoever lists them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lumina.checkpoint import catalogue, overview, retention, store
from lumina.config.resolve import resolve
from lumina.errors import UserError

Harm = Callable[[Path], None]
KEEP = resolve("tiny").config.checkpoint


def saved(root: Path, step: int) -> Path:
    return store.save(root, step, {"w": torch.full((2,), float(step))}, {}, {}).path


def test_the_newest_comes_first_however_long_its_number_is(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 7):
        saved(tmp_path, step)
    (tmp_path / "step-1000001.damaged").mkdir()
    (tmp_path / "step-x.damaged").mkdir()  # of nobody
    assert [row["step"] for row in overview.rows(tmp_path, KEEP)] == [1_000_001, 1_000_000, 999_999, 7]


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def giant(path: Path) -> None:
    os.truncate(path, catalogue.LARGEST + 1)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("harm", [pipe, giant, link])
@pytest.mark.parametrize("name", [store.COMPLETE, store.STATE])
def test_only_plain_files_of_a_sane_size_are_opened(harm: Harm, name: str, tmp_path: Path) -> None:
    """A pipe would be waited for, without end."""
    path, sound = saved(tmp_path, 2), saved(tmp_path, 1)
    harm(path / name)
    assert [row["state"] for row in overview.rows(tmp_path, KEEP)] == ["incomplete", "complete"]
    assert catalogue.state(path) == {} if name == store.STATE else catalogue.seal(path) == ""
    assert retention.counting(tmp_path) == [sound]
    harm_notes = tmp_path / retention.NOTES
    harm_notes.write_text("{}")
    harm(harm_notes)
    with pytest.raises(UserError, match=r"notes\.json: not the notes"):
        retention.pins(tmp_path)
