"""The losses of a run as its events tell them, with whatever changed on the way: what forecasts are made of.

Legend: n bins of steps, of which every curve has the same number for the same run, however far it has come.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.planner.schedule import Schedule

Array = NDArray[np.float64]

BINS = 200  # of a whole run: enough for a shape of three numbers
SAME_RATE = 1e-6  # relative; learning rates go through JSON as they are


class Change(NamedTuple):
    """From step `step` + 1 on the run is another than before, and why."""

    step: int
    why: str


class Evaluated(NamedTuple):
    """A held-out loss of the run's main kind, in nats a token."""

    step: int
    loss: float


@dataclass(frozen=True)
class Curve:
    """Bins of `width` steps: the last step of each and its mean loss, in nats a token. The last bin may be short.

    `stretch` is the learning rate over the planned one since the last change.
    """

    width: int
    steps: Array
    losses: Array
    counts: Array
    heldout: tuple[Evaluated, ...] = ()
    changes: tuple[Change, ...] = ()
    stretch: float = 1.0

    @property
    def now(self) -> int:
        """The last step that it knows."""
        return int(self.steps[-1]) if len(self.steps) else 0

    def until(self, step: int) -> Curve:
        """What was known of it behind step `step`, which ends a bin."""
        n = int(np.searchsorted(self.steps, step, side="right"))
        heldout = tuple(one for one in self.heldout if one.step <= step)
        changes = tuple(one for one in self.changes if one.step <= step)
        return Curve(self.width, self.steps[:n], self.losses[:n], self.counts[:n], heldout, changes, self.stretch)


def width_for(steps: int) -> int:
    """Steps of a bin, in a run of so many."""
    return max(1, math.ceil(steps / BINS))


class Recorder:
    """Listens to a run's events, of one attempt after another, and gives its curve at any time.

    What it knows is a function of the history that counts (`lumina.events.merged`): to go back it forgets.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.peak = schedule, schedule.parts[-1].lr
        self._losses = array("d")  # of every step, from 1
        self._heldout: list[Evaluated] = []
        self._changes: list[Change] = []
        self._stretches = [(0, 1.0)]  # from which step on the learning rate was which multiple of the planned one

    @classmethod
    def of(cls, schedule: Schedule, events: Iterable[dict[str, Any]]) -> Recorder:
        """Of the merged `events` of a run."""
        recorder = cls(schedule)
        for event in events:
            recorder.hear(event)
        return recorder

    def hear(self, event: dict[str, Any]) -> None:
        """An event; most do not matter. A step told again, after a resume, is the one that was told."""
        match event["t"]:
            case "step":
                self._step(event["step"], event["loss"], event["lr"])
            case "eval" if event["split"] == "heldout" and event["comparable"]:
                self._heldout = [one for one in self._heldout if one.step < event["step"]]
                self._heldout.append(Evaluated(event["step"], event["loss"]))
            case "run" if event.get("parent_step") is not None:
                self._back(event["parent_step"])
                if event.get("reason") == "rollback":
                    self._change(event["parent_step"], "the run went back to this step")
            case "phase" if event["step"] > 1:
                self._change(event["step"] - 1, f"phase {event['phase']} began")
            case "decision" if "overlays" in event:
                self._change(event["step"], f"{event['action']} was laid over the plan")

    @property
    def curve(self) -> Curve:
        """As far as the run has come."""
        width = width_for(self.schedule.steps)
        losses = np.array(self._losses)
        known = np.isfinite(losses)
        edges = np.arange(0, len(losses), width)
        counts = np.add.reduceat(known.astype(np.float64), edges) if len(losses) else np.zeros(0)
        sums = np.add.reduceat(np.where(known, losses, 0.0), edges) if len(losses) else np.zeros(0)
        full = counts > 0
        ends = np.minimum(edges + width, len(losses)).astype(np.float64)
        return Curve(
            width,
            ends[full],
            sums[full] / counts[full],
            counts[full],
            tuple(self._heldout),
            tuple(self._changes),
            self._stretches[-1][1],
        )

    def _step(self, step: int, loss: float, lr: float) -> None:
        while len(self._losses) < step - 1:  # a log that lost some
            self._losses.append(math.nan)
        if len(self._losses) >= step:
            self._losses[step - 1] = loss
        else:
            self._losses.append(loss)
        if not math.isfinite(loss):
            self._change(step, "the loss was not finite")
        planned = self.peak * float(self.schedule.rates(np.array([float(step)]))[0])
        stretch = lr / planned if planned else 1.0
        if abs(stretch - self._stretches[-1][1]) > SAME_RATE * stretch:
            self._stretches.append((step, stretch))
            self._change(step - 1, f"the learning rate became {stretch:.3g} of the planned one")

    def _change(self, step: int, why: str) -> None:
        if not any(one.step == step for one in self._changes):
            self._changes.append(Change(step, why))

    def _back(self, step: int) -> None:
        """Forgets what came after `step`."""
        del self._losses[step:]
        self._heldout = [one for one in self._heldout if one.step <= step]
        self._changes = [one for one in self._changes if one.step <= step]
        self._stretches = [one for one in self._stretches if one[0] <= step] or [(0, 1.0)]
