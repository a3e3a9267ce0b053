"""The other side of the supervisor: what a process that trains tells it, and hears from it.

They speak through a folder that the supervisor made, named with its process id in the environment. Without a
supervisor nothing is told and nothing heard.

folder/
  run              the path of the run, once it has begun
  restart.json     why this attempt was begun, until it is taken
  exit-0  exit-1 … how each process ended, as far as it knew
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil

VARIABLE = "LUMINA_SUPERVISOR"


def environment(folder: Path) -> dict[str, str]:
    """What a process finds its supervisor by, which is the one that calls this."""
    return {VARIABLE: f"{os.getpid()}:{folder}"}


def _folder() -> Path | None:
    value = os.environ.get(VARIABLE)
    return Path(value.partition(":")[2]) if value else None


def tell_run(path: Path) -> None:
    """Which run is trained."""
    if folder := _folder():
        aside = folder / "run.tmp"
        aside.write_text(str(path.resolve()))
        aside.replace(folder / "run")


def tell_exit(code: int) -> None:
    """With which code this process is about to end: a launcher between us and the supervisor has a code of its own."""
    if folder := _folder():
        (folder / f"exit-{os.environ.get('RANK', '0')}").write_text(str(code))


def restart() -> dict[str, Any] | None:
    """Why this process was started again, the first time it asks."""
    if (folder := _folder()) is None or not (path := folder / "restart.json").exists():
        return None
    facts: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    return facts


def abandoned() -> bool:
    """Whether there was a supervisor and there is none any more."""
    value = os.environ.get(VARIABLE)
    if not value:
        return False
    try:
        return psutil.Process(int(value.partition(":")[0])).status() == psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # gone, or another user's process has its number now
        return True
