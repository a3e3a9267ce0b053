"""A process that waits for the main one hears that it is alive: else its watchdog would take that for a hang."""

from __future__ import annotations

from pathlib import Path

import hearing
from several import all_well


def test_who_waits_for_the_main_process_hears_how_far_it_is(tmp_path: Path) -> None:
    all_well(2, hearing.main, tmp_path, folder=tmp_path)
