"""Two processes leave a run on trial and go back together."""

from __future__ import annotations

from pathlib import Path

import pytest
from several import all_well


def test_arms_and_rollbacks_of_two_processes_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "training")
    import arms_worker

    all_well(2, arms_worker.main, tmp_path, folder=tmp_path / "said")
