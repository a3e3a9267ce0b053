"""What a checkpoint says of itself, unverified: its files, its plain values, its held-out loss. No torch."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from lumina.checkpoint.places import COMPLETE, STATE, step_of

LOSS = "heldout_loss"  # in a checkpoint's state: of its own step, if that was evaluated and is comparable


def sizes(path: Path) -> dict[str, int] | None:
    """The files of a checkpoint and their bytes, if all that COMPLETE lists is there in full; else None.

    That is cheap, for nothing is read: bytes that changed are found by `store.verify` alone.
    """
    try:
        seal = json.loads((path / COMPLETE).read_bytes())
        listed = {str(name): int(entry["size"]) for name, entry in seal["files"].items()}
        there = all((path / name).stat().st_size == size for name, size in listed.items())
        return listed if there and seal["step"] == step_of(path) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def seal(path: Path) -> str:
    """Names the content of a checkpoint: the hash of its COMPLETE; empty if that cannot be read."""
    try:
        return hashlib.sha256((path / COMPLETE).read_bytes()).hexdigest()
    except OSError:
        return ""


def state(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint; none of one whose file cannot be read."""
    try:
        values = json.loads((path / STATE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def heldout_loss(path: Path) -> float | None:
    """The held-out loss of a checkpoint's own step in nats a token, if it was evaluated and can be compared."""
    loss = state(path).get(LOSS)
    return loss if isinstance(loss, float) and math.isfinite(loss) else None
