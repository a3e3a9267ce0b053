"""What a list of a run's checkpoints says of each, and what pruning by hand would delete. No torch; nothing is changed.

Works while the run trains: what disappears meanwhile is listed as incomplete, or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lumina.checkpoint import catalogue, places, retention
from lumina.config.schema.config import CheckpointConfig
from lumina.errors import UserError

Problems = Mapping[Path, Sequence[str]]  # by folder: what verifying found


def rows(
    root: Path, keep: CheckpointConfig, abandoned: Collection[Path] = (), found: Problems | None = None
) -> list[dict[str, Any]]:
    """Every checkpoint below `root`, newest first, as plain values. `found`: what reading every byte showed, if done.

    `state` is complete (it is all there), verified (and what was written), incomplete, damaged or undone (by a later
    attempt that began before it); `age` is in seconds, `kept_by` why it stays when the run saves again.
    """
    damaged = [path for path, problems in (found or {}).items() if problems]
    reasons = retention.kept(root, keep.keep_last, keep.keep_best, keep.keep_every, abandoned, damaged)
    listed = []
    for path in every(root):
        problems = (found or {}).get(path)
        row = _facts(path) | {"state": _state(path, reasons, problems, abandoned), "kept_by": reasons.get(path)}
        listed.append(row | {"problems": None if problems is None else [*problems]})
    return listed


def every(root: Path) -> list[Path]:
    """All checkpoint folders, those included that were set aside as damaged, newest first."""
    return sorted([*places.checkpoints(root), *places.aside(root)], key=lambda path: (_step(path), path.name))[::-1]


def find(root: Path, name: str) -> Path:
    """The checkpoint called `name`: a step, a folder, `latest` or `best`. Raises `UserError` if there is none."""
    wanted = places.folder(root, int(name)).name if name.isascii() and name.isdigit() else name
    path = (root / wanted).resolve()
    if path.parent != root.resolve() or path not in [other.resolve() for other in places.checkpoints(root)]:
        there = ", ".join(str(places.step_of(path)) for path in reversed(places.checkpoints(root)))
        raise UserError(f"{root}: no checkpoint {name!r}", f"there are those of steps {there}" if there else "")
    return root / path.name


def doomed(root: Path, keep: CheckpointConfig, abandoned: Collection[Path], found: Problems) -> dict[Path, str]:
    """What pruning by hand deletes, after every byte was read, and why: what nothing keeps, and what is damaged."""
    damaged = [path for path, problems in found.items() if problems]
    reasons = retention.kept(root, keep.keep_last, keep.keep_best, keep.keep_every, abandoned, damaged)
    useless = {path: "nothing keeps it" for path, why in reasons.items() if not why}
    return useless | {path: f"damaged: {found[path][0]}" for path in damaged}


def _step(path: Path) -> int:
    return places.step_of(path.with_name(path.name.removesuffix(places.DAMAGED)))


def _facts(path: Path) -> dict[str, Any]:
    sizes, state = catalogue.sizes(path), catalogue.state(path)
    try:
        written = path.joinpath(places.COMPLETE if sizes else "").stat().st_mtime
    except FileNotFoundError:  # pruned meanwhile
        written = time.time()
    return {
        "name": path.name,
        "step": _step(path),
        "attempt": state.get("attempt"),
        "age": max(0.0, time.time() - written),  # of a folder from a machine whose clock is ahead
        "bytes": sum(sizes.values()) if sizes else None,
        "heldout_loss": catalogue.heldout_loss(path),
    }


def _state(
    path: Path, reasons: Mapping[Path, object], problems: Sequence[str] | None, abandoned: Collection[Path]
) -> str:
    if problems or path.suffix == places.DAMAGED:
        return "damaged"
    if catalogue.sizes(path) is None:
        return "incomplete"
    if path not in reasons:
        return "damaged"  # so the notes say
    if path in abandoned:
        return "undone"
    return "complete" if problems is None else "verified"
