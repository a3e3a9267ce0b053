"""The other side of the supervisor: what a process that trains tells it, and hears from it.

They speak through a folder that the supervisor made, named with its process id in the environment. Without a
supervisor nothing is told and nothing heard.

Whoever was started by a supervisor or by torchrun does not outlive it. On Linux the system tells a process that its
parent is gone, in whatever it does; and where it trains, the watchdog looks: at the supervisor too, above torchrun.

folder/
  run              the path of the run, once it has begun
  restart.json     why this attempt was begun, until it is taken
  exit-0  exit-1 … how each process ended, as far as it knew
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

VARIABLE, TORCHRUN = "LUMINA_SUPERVISOR", "TORCHELASTIC_RUN_ID"
LEFT_ALONE = signal.SIGUSR2  # saves and stops, ends who does not train, and does not count as "once more"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


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


def end_with_parent() -> None:
    """From now on the process hears `LEFT_ALONE` when its parent dies, if that is a supervisor or torchrun.

    Only Linux does that: elsewhere it is as if nobody had asked.
    """
    if VARIABLE in os.environ or TORCHRUN in os.environ:
        with suppress(AttributeError, OSError):  # another system
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, LEFT_ALONE)


def abandoned(parent: int) -> bool:
    """Whether the `parent` that this process had is gone, if it was torchrun, or the supervisor, if there was one."""
    if TORCHRUN in os.environ and os.getppid() != parent:
        return True
    value = os.environ.get(VARIABLE)
    if not value:
        return False
    try:
        return psutil.Process(int(value.partition(":")[0])).status() == psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # gone, or another user's process has its number now
        return True
