"""What a checkpoint says of itself, unverified: its files, its plain values, its held-out loss. No torch.

A folder may come from anybody: a file is opened if it is a plain one, and no larger than a checkpoint ever has.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumina.checkpoint.places import COMPLETE, STATE, checkpoints, step_of

LARGEST = 1 << 26  # bytes of COMPLETE, of the state or of the notes: a thousand times what a run has
RUN = "run"  # in a checkpoint's state: the id of the run that it is of
LOSS = "heldout_loss"  # in a checkpoint's state: of its own step, if that was evaluated and is comparable


def sizes(path: Path) -> dict[str, int] | None:
    """The files of a checkpoint and their bytes, if all that COMPLETE lists is there in full; else None.

    That is cheap, for nothing is read: bytes that changed are found by `store.verify` alone.
    """
    try:
        seal = read_json(path / COMPLETE)
        listed = {str(name): int(entry["size"]) for name, entry in seal["files"].items()}
        there = all(_size(path / name) == size for name, size in listed.items())
        return listed if there and seal["step"] == step_of(path) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def seal(path: Path) -> str:
    """Names the content of a checkpoint: the hash of its COMPLETE; empty if that cannot be read."""
    try:
        return hashlib.sha256(_read(path / COMPLETE)).hexdigest()
    except (OSError, ValueError):
        return ""


def state(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint; none of one whose file cannot be read."""
    try:
        values = read_json(path / STATE)
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def heldout_loss(path: Path) -> float | None:
    """The held-out loss of a checkpoint's own step in nats a token, if it was evaluated and can be compared."""
    loss = state(path).get(LOSS)
    return loss if isinstance(loss, float) and math.isfinite(loss) else None


def abandoned(root: Path, counts: Callable[[int | None, int], bool]) -> list[Path]:
    """The checkpoints whose attempt and step do not count: the run went back before them.

    One whose attempt cannot be read is not among them: it is damaged, which is another matter.
    """
    found = []
    for path in checkpoints(root):
        attempt = (values := state(path)).get("attempt")
        if values and (attempt is None or type(attempt) is int) and not counts(attempt, step_of(path)):
            found.append(path)
    return sorted(found)


def read_json(path: Path) -> Any:
    """Raises `ValueError`, `RecursionError` or `OSError` if it is no JSON, or more than a checkpoint ever has."""
    return json.loads(_read(path))


def _read(path: Path) -> bytes:
    if (size := _size(path)) > LARGEST:
        raise ValueError(f"{size} bytes")
    return path.read_bytes()


def _size(path: Path) -> int:
    facts = path.lstat()
    if not stat.S_ISREG(facts.st_mode):  # opening a pipe would wait for ever
        raise ValueError(f"not a plain file (mode {facts.st_mode:o})")
    return facts.st_size
