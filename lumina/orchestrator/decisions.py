"""All that was decided about a run, from its events: what, why, on which evidence, and whether it still holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lumina.events import Event, undone

FIELDS = ("rule", "action", "reason", "evidence", "links", "diagnosis", "arm")


def told(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Of all events, of every attempt, in the order written: each decision as plain values.

    `undo` is the name that `lumina undo` takes, None where there is nothing to undo; `state` says what became of it.
    """
    events = list(events)
    resumed = [(e["attempt"], e["parent_step"]) for e in events if e["t"] == "run" and e.get("parent_step") is not None]
    said = [event["overlays"] for event in events if "overlays" in event]
    there = {one["id"]: one for one in (said[-1] if said else [])}
    found: list[dict[str, Any]] = []
    known: set[str] = set()
    for event in events:
        why = event if event["t"] == "decision" else event.get("why") if event["t"] == "run" else None
        if not why:
            continue
        mine = [one["id"] for one in event.get("overlays", ()) if one["id"] not in known]
        known |= {one["id"] for one in event.get("overlays", ())}
        token = event.get("overlay") if event["t"] == "decision" else None
        laid = [id for id in mine if token in (None, id)]
        entry = {"step": event["step"], "attempt": event["attempt"]}
        entry |= {name: why[name] for name in FIELDS if name in why}
        entry["undo"] = next((id for id in laid if id in there), None)
        entry["state"] = _state(event, laid, there, resumed)
        found.append(entry)
    return found


def _state(event: Event, laid: list[str], there: dict[str, Any], resumed: list[tuple[int, int]]) -> str:
    if laid and not any(id in there for id in laid):
        return "undone"
    if laid:
        one = next(there[id] for id in laid if id in there)
        if one["end"] == one["begin"]:
            return "done"
        return "in force" if one["end"] is None else f"until step {one['end']}"
    if event["t"] == "decision" and undone(event["attempt"], event["step"], resumed):
        return "the run went back before it"
    return "done"


def text(decision: dict[str, Any]) -> str:
    """A decision as a person reads it."""
    by = "by hand" if decision["rule"] == "hand" else f"by {decision['rule']}"
    lines = [
        f"step {decision['step']}, attempt {decision['attempt']}: {decision['action']} ({by}; {decision['state']})"
    ]
    if decision.get("reason"):
        lines.append(f"  why       {decision['reason']}")
    if decision.get("diagnosis"):
        lines.append(f"  diagnosis {decision['diagnosis']}")
    if decision.get("evidence"):
        said = ", ".join(f"{name} {_shown(value)}" for name, value in decision["evidence"].items())
        lines.append(f"  evidence  {said}")
    if decision.get("links"):
        lines.append(f"  files     {', '.join(decision['links'])}")
    if decision["undo"]:
        lines.append(f"  undo      lumina undo RUN {decision['undo']}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
