"""What earlier runs taught this one, and what it teaches later ones: `run.verdicts` and `orchestrator.confidence`.

    runs/X/verdicts.jsonl -> recall -> Confidence            `trial`, `decision` events of the log -> runs/.verdicts

It listens, and a fault in it costs later runs what this one learned, not this one a step. What is kept is read from the
log each time: so an attempt that goes on keeps what a kill kept the one before from keeping.
"""

from __future__ import annotations

from typing import Any

from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.events import Event, parse
from lumina.orchestrator.confidence import EVIDENCE, PROBATION, TRIAL, Confidence
from lumina.orchestrator.confidence import verdicts as verdicts_of
from lumina.run import verdicts
from lumina.run.folder import Run
from lumina.training.observer import Emit

MARKS = (f'"t":"{TRIAL}"'.encode(), f'"{PROBATION}"'.encode())  # of the few lines of a log that are read


class Experience:
    """Of one run; in the main process only."""

    def __init__(self, run: Run, config: Config, emit: Emit) -> None:
        self.run, self.emit = run, emit
        self.kind, self.version = config.model.kind, verdicts.version(config)
        self.broken = False

    def recall(self, step: int) -> Confidence:
        """What was known when the run began, which is now at `step`; what it learned since is part of its state."""
        try:
            return Confidence.of(verdicts.known(self.run))
        except UserError as error:
            self.emit("incident", step=step, kind="verdicts not known", error=error.message)
            return Confidence()

    def __call__(self, event: Event) -> None:
        """Keeps what this event says of a trial, and when an attempt goes on what earlier ones left."""
        why: Any = event.get("why") if event["t"] == "run" else event
        settles = isinstance(why, dict) and PROBATION in (why.get(EVIDENCE) or {})
        resumes = event["t"] == "run" and bool(event["attempt"])
        if not self.broken and (event["t"] == TRIAL or settles or resumes):
            self._keep(event)

    def _keep(self, event: Event) -> None:
        try:
            found = verdicts_of(self._log(), self.kind, self.run.path.name, self.run.id)
            verdicts.keep(self.run.path.parent, self.version, [verdict.pack() for verdict in found])
        except Exception as error:  # later runs are not worth this one
            self.broken = not isinstance(error, UserError)
            why = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.emit("incident", step=event.get("step", 0), kind="verdicts not kept", error=why)

    def _log(self) -> list[Event]:
        lines = self.run.event_log.read_bytes().splitlines()
        return [event for line in lines if any(mark in line for mark in MARKS) and (event := parse(line))]
