"""What a list of checkpoints says, also of folders that somebody made to hurt whoever lists them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lumina.checkpoint import catalogue, overview, retention, store
from lumina.config.resolve import resolve

KEEP = resolve("tiny").config.checkpoint


def saved(root: Path, step: int) -> Path:
    return store.save(root, step, {"w": torch.full((2,), float(step))}, {}, {}).path


def test_the_newest_comes_first_however_long_its_number_is(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 7):
        saved(tmp_path, step)
    (tmp_path / "step-1000001.damaged").mkdir()
    (tmp_path / "step-x.damaged").mkdir()  # of nobody
    assert [row["step"] for row in overview.rows(tmp_path, KEEP)] == [1_000_001, 1_000_000, 999_999, 7]


