"""A trial on a run, through `Controls`: the pairs of arms, what they came to, and the probation of what won.

The pairs of other orders come first; then, in the run's own order, the arm that leads is held, so that its steps become
the run's if it wins. Where the fork is left without a winner the run stands where it stood, to the bit.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lumina.config.overlay import Overlay
from lumina.errors import UserError
from lumina.orchestrator.candidates import Candidate
from lumina.orchestrator.confidence import Verdict
from lumina.orchestrator.protocol import ENDPOINT, Controls, Fork, Outcome
from lumina.orchestrator.trial import LEAST, Judged, Size, judge, winner

CONTROL, PLACEBO = "control", "placebo"


@dataclass
class Trial:
    """One, before and after it was held. `id` is a part of its files' names."""

    id: str
    candidates: tuple[Candidate, ...]
    size: Size
    begin: int  # the first step of its arms
    decay: int  # the first step of the run's last decay, 0 without
    placebo: bool  # whether an arm is run that has to come to the control's end
    exact: bool  # to the bit
    work: dict[str, float] = field(default_factory=dict)  # what a step of a candidate costs, over the control's
    ends: dict[str, list[float]] = field(default_factory=dict)  # of each arm, of each pair: the run's own order first
    judged: list[Judged] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # candidates that this run cannot have, and why
    void: str = ""  # why nothing may be concluded
    apart: str = ""  # why not of any other trial of this run either
    spent: float = 0.0  # steps' worth of compute
    seconds: float = 0.0  # counted

    @property
    def files(self) -> str:
        """Of its arms, all of them."""
        return f"trials/{self.id}-*.jsonl"

    @property
    def won(self) -> Candidate | None:
        best = None if self.void else winner(self.judged)
        return next((one for one in self.candidates if best and one.name == best.name), None)

    def plain(self) -> dict[str, Any]:
        """Every number, for the ledger."""
        judged = {one.name: one.plain() for one in self.judged}
        arms = [
            {"name": one.name, "action": one.action, "asks": one.text} | judged.get(one.name, {}) | self._work(one)
            for one in self.candidates
        ]
        return {
            "id": self.id, "steps": self.size.steps, "probe": self.size.probe, "pairs": self.size.pairs,
            "arms": arms, "control": [round(end, 6) for end in self.ends.get(CONTROL, [])],
            "placebo": self.ends.get(PLACEBO), "void": self.void, "spent": round(self.spent, 1),
            "seconds": round(self.seconds, 3), "winner": self.won.name if self.won else None,
        }  # fmt: skip

    def verdicts(self, fault: str, step: int) -> list[Verdict]:
        """What it teaches of each candidate; the run that held it has no name for itself."""
        actions = {one.name: one.action for one in self.candidates}
        return [
            Verdict(fault, actions[one.name], one.won, one.mean, one.low, one.noise, "", "", step)
            for one in ([] if self.void else self.judged)
        ]

    def _work(self, candidate: Candidate) -> dict[str, Any]:
        """What a step costs where it is another than the control's, and why it was refused."""
        work = self.work.get(candidate.name, 1.0)
        shown: dict[str, Any] = {} if work == 1.0 else {"work": round(work, 4)}
        return shown | ({"refused": self.refused[candidate.name]} if candidate.name in self.refused else {})

    # -- holding it --------------------------------------------------------------------------------------------------

    def hold(self, controls: Controls, fork: Fork) -> Outcome | None:
        """Runs all arms and judges them; the outcome of the winner's held arm, if one won."""
        arms = {one.name: one.overlays(self.begin, self.decay) for one in self.candidates}
        self.work = {name: controls.work(laid) for name, laid in arms.items()}
        held: dict[str, Outcome] = {}
        sound = True  # whether the control of this pair takes the share of tokens that it was trained for
        for pair in [*range(1, self.size.pairs), 0]:
            leader = self._leader() if pair == 0 else None
            for name, laid in {CONTROL: [], **arms}.items():
                if name in self.refused:
                    continue
                outcome = self._run(fork, name, laid, pair, hold=name == leader)
                if self.void:
                    return None
                if outcome is None:
                    continue
                sound = outcome.comparable if name == CONTROL else sound
                if sound and not outcome.comparable:  # it buys its loss with another depth
                    outcome = replace(outcome, heldout=math.nan)
                self.ends.setdefault(name, []).insert(0 if pair == 0 else len(self.ends[name]), outcome.heldout)
                if name == leader:
                    held[name] = outcome
            if pair == 0 and self.placebo and (placebo := self._run(fork, PLACEBO, [], pair)):
                self._compare(placebo)
        control, count = self.ends[CONTROL], len(self.candidates)
        self.judged = [judge(name, control, self.ends[name], count) for name in arms if name not in self.refused]
        if (won := self.won) is None:
            return None
        kept = held.get(won.name)
        if kept is None:  # another led before the last pair
            kept = self._run(fork, won.name, arms[won.name], 0, hold=True, probe=0)
        if kept:
            self.spent -= kept.steps * self.work[won.name]
        return kept

    def goes_on(self, fork: Fork) -> float | None:
        """What the run would come to without the winner at the end of the probation, nats: as much as can be where that
        is not finite, and None where memory did not hold it."""
        outcome = self._run(fork, f"{CONTROL}-on", [], 0, steps=2 * self.size.steps)
        if outcome is None or outcome.void:
            return None
        return outcome.heldout if math.isfinite(outcome.heldout) else sys.float_info.max

    @property
    def probation(self) -> tuple[int, int]:
        """With which step that of the winner ends, and how long it is probed then: the control's time, counted."""
        assert self.won is not None
        work = self.work[self.won.name]
        return self.begin - 1 + _share(2 * self.size.steps, work), _share(self.size.probe, work)

    def _run(
        self,
        fork: Fork,
        name: str,
        laid: Sequence[Overlay],
        pair: int,
        hold: bool = False,
        steps: int | None = None,
        probe: int | None = None,
    ) -> Outcome | None:
        """An arm; those of a pair take equal counted time, so that one whose steps cost more takes fewer.

        None if this run has nothing for it: a candidate is out then; without a control there is no trial.
        """
        work = self.work.get(name, 1.0)
        steps = _share(self.size.steps, work) if steps is None else steps
        probe = _share(self.size.probe, work) if probe is None else probe
        order = [Overlay(f"order {pair}", "data.order", pair, self.begin)] if pair else []
        file = f"{self.id}-{name}-{pair}"
        try:
            outcome = fork.run(file, [*laid, *order], steps, probe, hold)
        except UserError as error:
            self.refused[name] = error.message
            if name in (CONTROL, PLACEBO):
                self.void = f"the control cannot be run: {error.message}"
            return None
        self.spent += (1 + ENDPOINT) * (steps + probe) * work
        self.seconds += outcome.seconds * work
        if outcome.void and name in (CONTROL, PLACEBO):
            self.void = f"the control does not fit: {outcome.void}"
        return outcome

    def _leader(self) -> str | None:
        """The candidate that is ahead in the pairs so far."""
        control = self.ends.get(CONTROL, [])
        gains = {
            one.name: statistics.fmean(a - b for a, b in zip(control, self.ends[one.name], strict=True))
            for one in self.candidates
            if one.name not in self.refused
        }
        known = {name: gain for name, gain in gains.items() if not math.isnan(gain)}
        return max(known, key=lambda name: known[name], default=None)

    def _compare(self, placebo: Outcome) -> None:
        """Nothing was changed in this arm: what it ends off the control is what arms cannot be compared beyond."""
        control = self.ends[CONTROL][0]
        self.ends[PLACEBO] = [placebo.heldout]
        apart = abs(placebo.heldout - control)
        alike = str(placebo.heldout) == str(control)  # as texts, for NaN equals no NaN
        if not alike and (self.exact or not apart < LEAST):
            self.apart = f"an arm in which nothing was changed ended {apart:.3g} nats off: arms cannot be compared"
            self.void = self.apart


def result(trial: Trial) -> str:
    """What came of it, one sentence for a person."""
    if trial.void:
        return f"Tried, but nothing can be concluded: {trial.void}"
    head = f"{trial.won.text} won" if trial.won else "Nothing won"
    return f"{head}, in {trial.size.pairs} pairs of {trial.size.steps} steps and a probe of {trial.size.probe}"


def _share(steps: int, work: float) -> int:
    """As many steps of this work as are worth so many of the control's."""
    return max(1, round(steps / work))
