"""What a detector says: that something is the matter, since when, and by which numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lumina.orchestrator.signals import Signals

Subject = Literal["step", "look", "forecast"]  # what a detector judges anew


@dataclass(frozen=True)
class Finding:
    """Of the detector `rule` at `step`, plain values."""

    rule: str
    step: int
    since: int  # the step that it began with, as far as the signals tell
    text: str  # one sentence for a person
    hard: bool = False  # a fault that cannot wait
    values: dict[str, Any] = field(default_factory=dict)  # what was seen, beside the threshold that it passed

    @property
    def before(self) -> int:
        """Restore points of before this step are of before the fault: what is not finite in a step was so in the
        weights that the step before left."""
        return self.since - (self.rule == "non_finite")


class Detector(NamedTuple):
    """A rule: a pure function of the signals, for one thing.

    `hard` ones are armed from the first step and at all times; the others are silent in the warm-up, for
    `signals.SETTLE` steps after a planned change, and in the decay where it looks like what they look for.
    """

    name: str
    find: Callable[[Signals], Finding | None]
    hard: bool = False
    in_decay: bool = True
    on: Subject = "step"

    def __call__(self, signals: Signals) -> Finding | None:
        return self.find(signals) if self.armed(signals) else None

    def armed(self, signals: Signals) -> bool:
        if self.hard:
            return True
        decays = signals.seen is not None and signals.seen.stage == "decay"
        return not signals.settling and (self.in_decay or not decays)
