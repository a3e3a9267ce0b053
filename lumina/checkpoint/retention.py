"""Which checkpoints stay on disk."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection
from pathlib import Path

from lumina.checkpoint import store
from lumina.errors import UserError

LINKS = ("latest", "best")
LEFTOVER = re.compile(r".+\.tmp-(\d+)")  # what a process was writing or deleting


def prune(root: Path, keep_last: int, abandoned: Collection[int] = ()) -> list[int]:
    """Deletes all but the newest `keep_last` complete checkpoints; returns the deleted steps, oldest first.

    What `latest` and `best` point at stays, and so does a folder without COMPLETE: it is evidence. `abandoned` are the
    steps that a later attempt went back before: they do not count. Leftovers of dead processes are swept away, and this
    one's: no save may be under way in it.
    """
    _sweep(root)
    links = [root / name for name in LINKS if (root / name).is_symlink()]
    kept = {store.step_of(Path(os.readlink(link))) for link in links}
    complete = [path for path in store.checkpoints(root) if _complete(path)]
    kept |= {store.step_of(path) for path in [p for p in complete if store.step_of(p) not in abandoned][:keep_last]}
    doomed = [path for path in reversed(complete) if store.step_of(path) not in kept]
    for path in doomed:
        store.discard(path)
    return [store.step_of(path) for path in doomed]


def check_links(root: Path) -> None:
    """Raises `UserError` where a link has become a folder: copies that follow links (scp -r, zip) make one."""
    for path in (root / name for name in LINKS):
        if path.is_dir() and not path.is_symlink():
            fix = f"delete it: it repeats one of the step-… folders beside it (rm -r {shlex.quote(str(path))})"
            raise UserError(f"{path}: a folder, which has to be a link", fix)


def _sweep(root: Path) -> None:
    """Removes the leftovers of killed writers, and of killed deleters."""
    for path in list(root.iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if match and not _another_lives(int(match[1])):
            store.remove(path)
        elif path.suffix == store.OLD and _complete(path.with_suffix("")):
            store.discard(path)


def _complete(path: Path) -> bool:
    return (path / store.COMPLETE).is_file()


def _another_lives(pid: int) -> bool:
    """Whether a process other than this one has this id. In containers an earlier one often had our own."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to somebody else
        return True
    return True
