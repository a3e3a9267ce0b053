"""Whether the checkpoints of a run fit on its disk, said before it starts. No torch."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lumina.checkpoint import retention
from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.model.cost import state_bytes

MIB = 2**20


def checkpoint_bytes(config: Config) -> int:
    """Bytes of one checkpoint: weights and moments. Names, headers and plain values come on top, some kB."""
    whole = state_bytes(config.model, config.train.optimizer, config.precision.mode, config.train.lora.rank)
    return whole.weights + whole.moments


def at_once(config: Config) -> int:
    """How many checkpoints lie on the disk at the same time at most: those that are kept, and the one being written.

    A length or an interval that is not settled yet counts as a long one.
    """
    keep, steps, every = config.checkpoint, config.train.steps, config.checkpoint.every
    kept = keep.keep_last + keep.keep_best
    if steps is None or every == "auto":
        return kept + 1
    saves = math.ceil(steps / int(every)) if every else 1
    if keep.keep_every:  # those that are saved, and the last step
        kept += steps // math.lcm(keep.keep_every, int(every) or steps)
    return min(saves, kept + 1)


def facts(config: Config, checkpoints: Path, pinned: int = 0) -> dict[str, Any]:
    """What the run will take of the disk of its `checkpoints` (there or not), what of it is there, what is free.

    `pinned`: how many are kept besides, so that overlays can be undone.
    """
    counts = [*retention.counting(checkpoints), *retention.leftovers(checkpoints)] if checkpoints.is_dir() else []
    return {
        "every": config.checkpoint.every,
        "bytes": checkpoint_bytes(config),
        "most": at_once(config) + pinned,
        "pinned": pinned,
        "used": sum(map(size, counts)),
        "free": free(checkpoints),
    }


def size(path: Path) -> int:
    """Bytes of the files in a folder."""
    files = () if path.is_symlink() else path.rglob("*")
    return sum(file.lstat().st_size for file in files)


def free(path: Path) -> int:
    """Bytes that are free on the disk where `path` is, or will be."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(there).free


def require(config: Config, checkpoints: Path, abandoned: Collection[Path] = ()) -> None:
    """Raises `UserError` where not even two checkpoints fit: the next one is complete before the older one goes.

    What is there is one of the two; `abandoned` are those that count for nothing when the run goes on.
    """
    one, space, keep = checkpoint_bytes(config), free(checkpoints), config.checkpoint
    there, goes = {}, []
    if checkpoints.is_dir():
        there = retention.kept(checkpoints, keep.keep_last, keep.keep_best, keep.keep_every, abandoned)
        goes = [*retention.leftovers(checkpoints), *(path for path, why in there.items() if not why)]
    least = min(2, at_once(config))
    if (1 if there else least) * one <= space + sum(map(size, goes)):
        return
    where = next(parent for parent in (checkpoints.absolute(), *checkpoints.absolute().parents) if parent.is_dir())
    two = "two of them have" if least == 2 else "it has"
    raise UserError(
        f"{where}: a checkpoint of this model takes {one / MIB:,.1f} MiB, and {two} to fit; "
        f"{space / MIB:,.1f} MiB are free here",
        fix="free space there, choose another folder with --root, or a smaller model",
    )
