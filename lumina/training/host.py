"""What this machine and this checkout call themselves. Works where torch does not."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import lumina


def commit() -> str | None:
    """The commit of the checkout this runs from, with a + if files differ from it."""
    folder = Path(lumina.__file__).parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        say = ["git", "-C", str(folder), "describe", "--always", "--dirty=+"]
        return subprocess.run(say, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    """The model of the CPU, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
