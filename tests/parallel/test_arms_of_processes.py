"""Two processes leave a run on trial and go back together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_processes import torchrun


def test_arms_and_rollbacks_of_two_processes_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(tests / "training"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    torchrun(2, str(Path(__file__).with_name("arms_worker.py")), str(tmp_path))
