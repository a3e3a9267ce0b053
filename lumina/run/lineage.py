"""Which of a run's attempts led to where it stands, after it was resumed or went back. No torch.

The rule of `lumina.events.undone`, for checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lumina.errors import UserError
from lumina.events import parse, undone
from lumina.run.folder import Run


@dataclass(frozen=True)
class Lineage:
    """The attempts that went on from an earlier step: number, step, and whether on purpose."""

    begins: tuple[tuple[int, int, bool], ...] = ()

    def counts(self, attempt: int | None, step: int) -> bool:
        """Whether what `attempt` saved at `step` is part of the run.

        None is an attempt before checkpoints had its number; nobody went back then.
        """
        if attempt is None:
            return not any(back and parent < step for _, parent, back in self.begins)
        return not undone(attempt, step, ((later, parent) for later, parent, _ in self.begins))

    def after(self, attempt: int, parent: int) -> Lineage:
        """With an attempt that goes back to `parent`."""
        return Lineage((*self.begins, (attempt, parent, True)))


def lineage(run: Run) -> Lineage:
    """As the run's event log tells; without one, everything counts. Raises `UserError` if it is damaged there."""
    begun = [event for line in _lines(run) if b'"run"' in line and (event := parse(line)) and event.get("t") == "run"]
    resumed = [event for event in begun if event.get("parent_step") is not None]
    if any(type(event[name]) is not int for event in resumed for name in ("attempt", "parent_step")):
        wrong = "damaged: `attempt` and `parent_step` of a `run` event must be whole numbers"
        raise UserError(f"{run.event_log}: {wrong}", fix="restore the log")
    return Lineage(tuple((e["attempt"], e["parent_step"], e.get("reason") == "rollback") for e in resumed))


def overlays(run: Run) -> list[dict[str, Any]] | None:
    """What lies over the plan, by the last event that says so: each says all. None if none does."""
    said = (event for line in reversed(_lines(run)) if b'"overlays"' in line and (event := parse(line)))
    found: list[dict[str, Any]] | None = next((event["overlays"] for event in said if "overlays" in event), None)
    return found


def done_since(run: Run, attempt: int, step: int) -> list[dict[str, Any]]:
    """What was done behind a checkpoint that `attempt` saved of `step`: the `run` events of later attempts that went
    back on purpose, and the verdicts of trials."""
    marks = b'"rollback"', b'"verdict"'
    told = (event for line in _lines(run) if any(mark in line for mark in marks) and (event := parse(line)))
    found = []
    for event in told:
        back = event.get("t") == "run" and event.get("reason") == "rollback" and event["attempt"] > attempt
        trial = event.get("t") == "trial" and event.get("kind") == "verdict"
        later = event["attempt"] > attempt or (event["attempt"] == attempt and event.get("step", 0) > step)
        if back or (trial and later):
            found.append(event)
    return found


def _lines(run: Run) -> list[bytes]:
    return run.event_log.read_bytes().splitlines() if run.event_log.is_file() else []
