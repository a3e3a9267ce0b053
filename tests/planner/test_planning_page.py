"""docs/planning.md shows what the program prints, and the table that it reckons with."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lumina.cli import main
from lumina.planner.hardware import DEVICES

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")


def rows() -> list[str]:
    """The table of devices."""
    made = []
    for device in DEVICES.values():
        peaks = (f"{device.peak[name] / 1e12:g}" if name in device.peak else "-" for name in ("bf16", "fp16", "fp32"))
        rates = (f"{value / 1e9:g}" for value in (device.bandwidth, device.link, device.network))
        made.append(f"| {device.name} | {' | '.join((*peaks, str(device.memory >> 20), *rates))} |")
    return made


def test_every_device_is_in_the_table_as_it_is() -> None:
    assert all(row in PAGE for row in rows())


def test_the_page_shown_is_the_page_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUMINA_CACHE", str(tmp_path))
    command, shown = re.findall(r"```\n\$ lumina ([^\n]*)\n(.*?)```", PAGE, re.S)[0]
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == shown
