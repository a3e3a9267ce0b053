"""Two processes leave a run on trial, go back, and do what is asked by hand, together."""

from __future__ import annotations

from pathlib import Path

import pytest
from several import all_well


def test_arms_and_rollbacks_of_two_processes_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "training")
    import arms_worker

    all_well(2, arms_worker.main, tmp_path, folder=tmp_path / "said")


def test_two_processes_do_what_one_was_asked_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "training")
    import hand_worker

    all_well(2, hand_worker.main, tmp_path, folder=tmp_path / "said")
