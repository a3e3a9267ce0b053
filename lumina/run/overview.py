"""What a list of runs says of each: read from its folder alone, without torch; of its steps only the last is parsed."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from lumina.errors import UserError
from lumina.events import Event, merged, parse, undone
from lumina.run.folder import Run, missing
from lumina.run.lock import is_held

STEP = b'{"t":"step"'  # almost every line of a log; only the last one counts


def overview(root: Path) -> list[dict[str, Any]]:
    """Every run below `root`, newest first, as plain values; damaged ones last, with what is wrong.

    Raises `UserError` if `root` is a file.
    """
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: not a folder", fix="name the folder that holds the runs with --root")
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    rows = [_row(Run(path)) for path in folders if _was_a_run(Run(path))]
    return sorted(rows, key=lambda row: row.get("created", 0.0), reverse=True)


def _was_a_run(run: Run) -> bool:
    """Whether anything of a run is left in this folder."""
    return len(missing(run.path)) < 2 or run.event_log.exists() or run.checkpoints.exists()


def _row(run: Run) -> dict[str, Any]:
    """What is listed of a run. Whatever is wrong with its folder is its own matter: the others are listed too."""
    row = {"run": str(run.path), "name": run.path.name}
    if lacking := missing(run.path):
        return row | {"state": "damaged", "problem": f"no {' and no '.join(lacking)}"}
    try:
        return row | _facts(run)
    except UserError as error:
        return row | {"state": "damaged", "problem": error.message}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return row | {"state": "damaged", "problem": f"{type(error).__name__}: {error}"}


def _facts(run: Run) -> dict[str, Any]:
    """State and figures; a loss that is not finite is "nan", "inf" or "-inf", as in the event log."""
    created = run.read_meta().get("created", 0.0)
    events = merged(_notable(run.event_log))
    of = {kind: [event for event in events if event["t"] == kind] for kind in ("run", "step", "eval", "end")}
    started, step = (of[kind][-1] if of[kind] else {} for kind in ("run", "step"))
    evaluated = [event["bpb"] for event in of["eval"] if event["comparable"] and math.isfinite(event["bpb"])]
    loss = step.get("loss")
    return {
        "created": created,
        "state": _state(run, events),
        "kind": started.get("kind"),
        "active": started.get("active"),
        "step": step.get("step", started.get("step", 0)),
        "steps": _ends(events) or started.get("steps"),
        "tokens": step.get("tokens", 0),
        "loss": loss if loss is None or math.isfinite(loss) else str(loss),
        "best_bpb": min(evaluated, default=None),
        "age": max(0.0, time.time() - created),  # of a folder from a machine whose clock is ahead
    }


def _ends(events: list[Event]) -> int | None:
    """With which step the run ends, as the newest event says: a decay that was started ends it early."""
    return next((event["ends"] for event in reversed(events) if type(event.get("ends")) is int), None)


def _state(run: Run, events: list[Event]) -> str:
    """training, finished, stopped (saved itself), or interrupted: unfinished, and nobody is at it."""
    if is_held(run.lock):
        return "training"
    last = events[-1] if events else {}
    if last.get("t") != "end":
        return "interrupted"
    return "finished" if last["reason"] == "done" else "stopped"


def _notable(log: Path) -> list[Event]:
    """All events but the steps, after the last step that no later attempt undid.

    Torn lines are passed over, or raise `UserError`, as in `lumina.events.read_events`.
    """
    events: list[Event] = []
    steps: list[bytes] = []
    attempt, torn = -1, 0
    for number, line in enumerate(log.read_bytes().splitlines() if log.exists() else (), start=1):
        if line.startswith(STEP) and not torn:
            steps.append(line)
            continue
        event = parse(line)
        if event is None:
            torn = torn or number
            continue
        if torn and event["attempt"] <= attempt:
            raise UserError(f"{log}:{torn}: not an event, and not the torn last line of an attempt")
        attempt, torn = event["attempt"], 0
        if line.startswith(STEP):
            steps.append(line)
        else:
            events.append(event)
    resumed = [(event["attempt"], event["parent_step"]) for event in events if event.get("parent_step") is not None]
    for line in reversed(steps):
        step = parse(line)
        if step and not undone(step["attempt"], step["step"], resumed):
            return [step, *events]
    return events
