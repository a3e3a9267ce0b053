"""What a list of runs says of each: read from its folder alone, without torch, in one pass over its log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lumina.errors import UserError
from lumina.events import Event, merged
from lumina.run.folder import Run, missing
from lumina.run.lock import is_held

STEP = b'{"t":"step"'  # almost every line of a log; only the last one counts


def overview(root: Path) -> list[dict[str, Any]]:
    """Every run below `root`, newest first, as plain values; damaged ones last, with what is wrong."""
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    rows = [_row(Run(path)) for path in folders if len(missing(path)) < 2]
    return sorted(rows, key=lambda row: row.get("created", 0.0), reverse=True)


def _row(run: Run) -> dict[str, Any]:
    row: dict[str, Any] = {"run": str(run.path), "name": run.path.name, "state": "damaged"}
    if lacking := missing(run.path):
        return row | {"problem": f"no {' and no '.join(lacking)}"}
    try:
        row["created"] = run.read_meta().get("created", 0.0)
        events = merged(_notable(run.event_log))
    except UserError as error:
        return row | {"problem": error.message}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return row | {"problem": f"{type(error).__name__}: {error}"}
    of = {kind: [event for event in events if event["t"] == kind] for kind in ("run", "step", "eval", "end")}
    started, step = (of[kind][-1] if of[kind] else {} for kind in ("run", "step"))
    evaluated = [event["bpb"] for event in of["eval"] if event["comparable"]]
    return row | {
        "state": _state(run, events),
        "kind": started.get("kind"),
        "active": started.get("active"),
        "step": step.get("step", started.get("step", 0)),
        "steps": started.get("steps"),
        "tokens": step.get("tokens", 0),
        "loss": step.get("loss"),
        "best_bpb": min(evaluated, default=None),
        "age": time.time() - row["created"],
    }


def _state(run: Run, events: list[Event]) -> str:
    """training, finished, stopped (saved itself), or interrupted: unfinished, and nobody is at it."""
    if is_held(run.lock):
        return "training"
    last = events[-1] if events else {}
    if last.get("t") != "end":
        return "interrupted"
    return "finished" if last["reason"] == "done" else "stopped"


def _notable(log: Path) -> Iterator[Event]:
    """All events but the steps, of which only the last; a torn line at the end is passed over."""
    if not log.exists():
        return
    step: bytes | None = None
    waiting: list[bytes] = []
    with log.open("rb") as lines:
        for line in lines:
            if line.startswith(STEP) and line.endswith(b"\n"):
                step = line
            elif line.endswith(b"}\n"):
                waiting.append(line)
    for line in [*([step] if step else []), *waiting]:
        yield json.loads(line)
