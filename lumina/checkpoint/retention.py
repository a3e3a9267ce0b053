"""Which checkpoints stay."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Set
from pathlib import Path

from lumina.checkpoint import store

LINKS = ("latest", "best")
LEFTOVER = re.compile(r"(?:step-\d+(?:\.old)?|latest|best)\.tmp-(\d+)")


def prune(root: Path, keep_last: int, protect: Set[int] = frozenset()) -> list[int]:
    """Deletes all but the newest `keep_last` complete checkpoints; returns the steps deleted, oldest first.

    Those that a link points at and the steps in `protect` stay, and so does whatever is incomplete: that is
    evidence. What dead processes left behind while writing or deleting is swept away.
    """
    _sweep(root)
    kept = {(root / name).resolve() for name in LINKS} | {
        store.folder(root, step).resolve() for step in protect
    }
    complete = [path for path in store.checkpoints(root) if (path / store.COMPLETE).is_file()]
    doomed = [path for path in complete[keep_last:] if path.resolve() not in kept]
    for path in reversed(doomed):
        store.discard(path)
    return [store.step_of(path) for path in reversed(doomed)]


def _sweep(root: Path) -> None:
    for path in root.iterdir():
        match = LEFTOVER.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, so it lives
        return True
    return True
