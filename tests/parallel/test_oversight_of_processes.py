"""Two processes do together what the main one decides, and neither is harmed by what fails in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from several import all_well


def test_one_decides_both_act_and_a_fault_in_it_harms_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "training")
    import oversight_worker

    all_well(2, oversight_worker.main, tmp_path, folder=tmp_path / "said")
