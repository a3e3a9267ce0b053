"""Where checkpoints are, what they are called, and the few operations on folders that everything else is made of."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lumina.errors import DiskRefused, UserError

COMPLETE = "COMPLETE"
STATE = "state.json"
MODEL, OPTIM = "model", "optim"
OLD = ".old"  # a checkpoint too: what one of the same step replaced that is not yet known to last
DAMAGED = ".damaged"  # no checkpoint any more: what was read back from the disk was not what was written
STEP = re.compile(r"step-\d{6,}(\.old)?")


def folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return root / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint folder, by its name."""
    return int(path.name.removeprefix("step-").removesuffix(OLD))


def checkpoints(root: Path) -> list[Path]:
    """Every published checkpoint folder, newest first, unverified."""
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: a file where the folder of checkpoints belongs", fix="move it away")
    found = [path for path in root.iterdir() if STEP.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=lambda path: (step_of(path), path.suffix != OLD), reverse=True)


def aside(root: Path) -> list[Path]:
    """Every checkpoint folder that was set aside as damaged."""
    found = root.glob(f"step-*{DAMAGED}") if root.is_dir() else ()
    return [path for path in found if STEP.fullmatch(path.name.removesuffix(DAMAGED))]


def temporary(path: Path) -> Path:
    """The name under which this process writes, or deletes, what nobody may find at `path`."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def point(root: Path, name: str, step: int) -> None:
    """Makes `<root>/<name>` a link to the checkpoint of `step`, replacing an older link as a whole.

    Raises `UserError` if the disk refuses.
    """
    aside = temporary(root / name)
    with disk(f"{root / name}: link not written"):
        remove(aside)
        aside.symlink_to(folder(root, step).name)
        aside.replace(root / name)
        sync(root)


def discard(path: Path) -> None:
    """Deletes a checkpoint. It stops being one at once, however long its files take.

    Raises `UserError` if the disk refuses.
    """
    aside = temporary(path.with_name(f"{path.name}.gone"))  # at `temporary(path)` one of its step may be written
    with disk(f"{path}: not deleted"):
        remove(aside)
        path.rename(aside)
        remove(aside)


def replaced(path: Path) -> Path:
    """Where the checkpoint is, if there is one, that the one at `path` replaced."""
    return path.with_name(path.name + OLD)


def put_back(root: Path) -> None:
    """What was replaced has its name again, where nothing has it: a save was killed, or its own was damaged.

    Raises `UserError` if the disk refuses.
    """
    for old in (path for path in checkpoints(root) if path.suffix == OLD):
        if not os.path.lexists(final := old.with_suffix("")):
            with disk(f"{old}: not renamed"):
                old.rename(final)
                sync(root)


def settle(path: Path) -> None:
    """What a checkpoint replaced goes: this one lasts. Raises `UserError` if the disk refuses."""
    if os.path.lexists(old := replaced(path)):
        discard(old)


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint so that nobody takes it for one; returns where it is.

    Raises `UserError` if the disk refuses.
    """
    aside = path.with_name(path.name + DAMAGED)
    with disk(f"{path}: damaged, and not set aside"):
        remove(aside)
        path.rename(aside)
        sync(path.parent)
    return aside


def point_latest(root: Path) -> None:
    """`latest` points at the newest that is there, or is gone. Raises `UserError` if the disk refuses."""
    if there := [path for path in checkpoints(root) if path.suffix != OLD]:
        point(root, "latest", step_of(there[0]))
    else:
        with disk(f"{root / 'latest'}: not deleted"):
            remove(root / "latest")


def remove(path: Path) -> None:
    """Deletes a link, a file, or a folder with all that is in it, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk(failed: str) -> Iterator[None]:
    """Turns what the disk refuses into a `DiskRefused`."""
    try:
        yield
    except OSError as error:
        raise DiskRefused(
            f"{failed}: {error.strerror or error}",
            fix="make the disk writable or free space on it; what was saved before is untouched",
        ) from error
