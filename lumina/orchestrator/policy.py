"""What is done about a diagnosis: at once for hard faults, in mode `act`; all else is advice, with its evidence.

Rules that no finding may pass: one intervention is open at a time, and the next soft one comes 5 / (1 - beta2) steps
later at the earliest, which is how long the second moments remember (science of stability, guards); nothing soft is
done in the warm-up, near planned changes, or in the decay; after `REWINDS` ways back at one place a person has to look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from lumina.orchestrator.diagnosis import Cause, Diagnosis
from lumina.orchestrator.finding import Finding
from lumina.orchestrator.signals import Facts, Signals

Mode = Literal["off", "advise", "act"]
Action = Literal["skip_step", "rewind_replay", "rewind_skip", "replan", "stop", "watch"]

REWINDS = 2  # at one place: more were never seen to help (BLOOM 104B, OPT-175B)
HARD = frozenset({"non_finite", "divergence", "loader", "invariant", "looked"})  # the only rules that act by themselves
ADVICE: dict[Cause, str] = {
    "data": "look at the batches of these steps; `data.skip` leaves some out",
    "learning rate": "compare the learning rate with the plan; `lr.scale` changes it within bounds",
    "optimizer state": "go back to before it began, or begin the moments anew",
    "numerics": "go back to before it began; a wider format keeps what left this one",
    "router": "look at the loads; a higher `bias_rate` balances faster",
    "depth": "look at the predictor: its evaluations are not comparable while it is off",
    "config": "restore the configuration that the run was started with",
    "hardware": "check the machine; the same step came out otherwise",
    "none": "watch: it may heal by itself",
}


class Choice(NamedTuple):
    """What is to be done: `act` says whether it is, or is only advised; `to` is the step to go back to."""

    action: Action
    act: bool
    reason: str
    to: int | None = None
    replan: bool = False  # before going back, the plan is put back
    ahead: int = 0  # batches to come that are left out as well


@dataclass
class Open:
    """An intervention whose effect is not known yet."""

    rule: str
    action: str
    step: int  # of the run when it was done
    until: int  # step behind which it counts as held


@dataclass
class Policy:
    """Remembers what was done: it is no part of what a way back undoes."""

    mode: Mode
    facts: Facts
    open: Open | None = None
    quiet: int = 0  # no soft action before this step
    places: list[list[int]] = field(default_factory=list)  # step, and how often the run went back from near it
    over: bool = False  # handed over

    @property
    def cooldown(self) -> int:
        """Steps."""
        return math.ceil(round(5 / (1 - self.facts.beta2), 6))

    def decide(self, finding: Finding, why: Diagnosis, signals: Signals, points: Sequence[int]) -> Choice:
        """`points`: steps that the run can go back to."""
        if finding.hard and finding.rule in HARD:
            choice = self._hard(finding, why, points)
            return choice._replace(act=choice.act and self.mode == "act" and not self.over)
        return Choice("watch", False, self._soft(why, signals))

    def done(self, finding: Finding, choice: Choice, step: int) -> None:
        """The choice was acted on, when the run was at `step`."""
        if choice.action in ("rewind_replay", "rewind_skip"):
            place = self._place(finding.since)
            if place is None:
                self.places.append([finding.since, 1])
            else:
                place[1] += 1
            self.open = Open(finding.rule, choice.action, step, step + self.cooldown)
        self.over = self.over or choice.action == "stop"
        self.quiet = max(self.quiet, step + self.cooldown)

    def passed(self, step: int) -> Open | None:
        """The open intervention, if it has held until `step`: it is closed then."""
        if self.open is None or step < self.open.until:
            return None
        held, self.open = self.open, None
        return held

    def may(self, signals: Signals) -> str:
        """Why nothing soft may be done now; empty if it may."""
        if self.over:
            return "the run was handed over"
        if self.open is not None:
            return f"{self.open.action} of step {self.open.step} is still on trial"
        if signals.step < self.quiet:
            return f"the last action has to settle until step {self.quiet}"
        if signals.settling:
            return "the run warms up, or a planned change is near"
        if signals.seen is not None and signals.seen.stage == "decay":
            return "the learning rate decays"
        return ""

    def _soft(self, why: Diagnosis, signals: Signals) -> str:
        held_back = self.may(signals)
        return ADVICE[why.cause] + (f" ({held_back})" if held_back else "")

    def _hard(self, finding: Finding, why: Diagnosis, points: Sequence[int]) -> Choice:
        if finding.rule == "non_finite" and not finding.values["lasting"]:
            return Choice("skip_step", False, "the guard moved nothing in this step, so nothing is left to do")
        place = self._place(finding.since)
        times = place[1] if place else 0
        to = self._point(finding, why, points, times)
        if times >= REWINDS:
            reason = f"the run went back from here {times} times, and it came again: a person has to look"
            return Choice("stop", True, reason)
        if to is None:
            return Choice("stop", True, "there is no restore point before it began, and going on makes it worse")
        replan = why.cause in ("learning rate", "config")
        if why.cause == "data" and why.verdict == "data":
            ahead = (finding.step - finding.since + 1) * 4**times
            reason = f"back to step {to}, and past the batches since and {ahead} more, which are left out"
            return Choice("rewind_skip", True, reason, to, replan, ahead)
        if times and not replan and finding.rule in ("divergence", "non_finite"):
            reason = f"back to step {to} again; the same batches brought it back, so they are left out"
            return Choice("rewind_skip", True, reason, to)
        put = "the plan is put back, then " if replan else ""
        return Choice("rewind_replay", True, f"{put}back to step {to}, and the same batches again", to, replan)

    def _point(self, finding: Finding, why: Diagnosis, points: Sequence[int], times: int) -> int | None:
        """The step to go back to: before the fault showed, each time an older one, for the newest may be of after it.

        What is not finite in a step was so in the weights that the step before left. If the replay, which begins at the
        newest point, has no finite batch, that point is damaged itself.
        """
        before = finding.since - (finding.rule == "non_finite")
        sound = sorted(step for step in points if step < before)
        older = times + (why.cause == "numerics" and why.verdict == "any batch")
        return sound[max(0, len(sound) - 1 - older)] if sound else None

    def _place(self, step: int) -> list[int] | None:
        """The place near `step` that the run went back from."""
        return next((place for place in self.places if abs(place[0] - step) <= self.cooldown), None)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def pack(self) -> dict[str, Any]:
        return {
            "open": asdict(self.open) if self.open else None,
            "quiet": self.quiet,
            "places": [list(place) for place in self.places],
        }

    def unpack(self, packed: Mapping[str, Any]) -> None:
        self.open = Open(**packed["open"]) if packed["open"] else None
        self.quiet = packed["quiet"]  # that it was handed over ends here: a person has looked, and went on
        self.places = [list(place) for place in packed["places"]]
