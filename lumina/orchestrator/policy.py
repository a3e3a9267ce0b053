"""What is done about a diagnosis: at once for hard faults, by trial for others, in mode `act`; else it is advice.

What is laid over the plan has won a trial (`trial`, `candidates`): a fault that may wait is met by nothing else.
Rules that no finding may pass: one intervention is open at a time, and the next soft one comes 5 / (1 - beta2) steps
later at the earliest, which is how long the second moments remember (science of stability, guards); nothing soft is
done in the warm-up, near planned changes, or in the decay; after `REWINDS` ways back at one place a person has to
look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from lumina.orchestrator.candidates import Candidate, candidates, fault
from lumina.orchestrator.confidence import Confidence, Verdict
from lumina.orchestrator.diagnosis import Cause, Diagnosis
from lumina.orchestrator.finding import Finding
from lumina.orchestrator.robust import median
from lumina.orchestrator.signals import Facts, Signals
from lumina.orchestrator.trial import NOISE, Size, size

Mode = Literal["off", "advise", "act"]
Action = Literal["skip_step", "rewind_replay", "rewind_skip", "trial", "stop", "watch"]

MOST, WITHIN = 6, 10_000  # ways back in so many steps, from wherever: our choice
NEAR = 500  # steps at most that are one place, however long the optimizer remembers: our choice
REWINDS = 2  # at one place: more were never seen to help (BLOOM 104B, OPT-175B)
MOST_TRIED = 3  # candidates of a trial: each more costs as much as the control, and raises the bar for all
REMEMBERED, LEARNED = 16, 256  # noises and verdicts of a run's trials
LOST = 0.25  # of what was learned: one step at 10 times the rate cost 2 to 13 % and healed, at 100 times 34 to 110 %
# These alone are acted on at once; of `FROM_OUTSIDE` what a replay shows to be no work of the run itself.
HARD = frozenset({"non_finite", "divergence", "loader", "invariant", "looked", "off_plan", "attention"})
FROM_OUTSIDE = frozenset({"attention"})
# What may be tried for: it lasts, and is neither data's nor one step's.
TRIED = frozenset(
    {
        "pace",
        "drift",
        "plateau",
        "attention",
        "starvation",
        "collapse",
        "over_balance",
        "router_gradient",
        "mod_capacity",
        "mod_agreement",
    }
)
# A state that was pushed off hides what pushed it: right behind a jump of the rate the higher one regains more in a
# short trial than the right one. So that begins before it; the way there is the same steps again, which change nothing.
FROM_BEFORE = frozenset({"pace"})
FOLLOWED: frozenset[Cause] = frozenset({"learning rate", "optimizer state"})  # which the same steps bring back
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
    replan: bool = False  # optimizer and loader are set to the plan before the way back
    until: int = 0  # a step up to whose batch more are left out
    fault: str = ""  # of a trial: the class of faults, and what is tried for it
    tries: tuple[Candidate, ...] = ()


@dataclass
class Open:
    """An intervention whose effect is not known yet."""

    rule: str
    action: str
    step: int  # of the run when it was done
    until: int  # step behind which it counts as held
    trial: str = ""  # the trial that it won, and what follows is of that
    tried: int = 0  # step of the run when it was held
    fault: str = ""
    laid: list[str] = field(default_factory=list)  # names of what it laid over the plan
    beside: list[dict[str, Any]] = field(default_factory=list)  # all that lies over the plan then
    without: float | None = None  # held-out loss, nats, that the run without it comes to at `until`, behind a probe
    probe: int = 0  # steps of that
    worth: int = 0  # steps by which the held-out text is measured


@dataclass
class Policy:
    """Remembers what was done: it is no part of what a way back undoes."""

    mode: Mode
    facts: Facts
    open: Open | None = None
    quiet: int = 0  # no soft action before this step
    places: list[list[int]] = field(default_factory=list)  # step, how often the run went back from near it, and to
    went: list[int] = field(default_factory=list)  # the last steps from which it went back
    tried: dict[str, list[str]] = field(default_factory=dict)  # actions tried for each fault since it was mended
    trials: int = 0  # in all, but for those from which nothing could be concluded
    apart: str = ""  # why arms of this run cannot be compared, once a placebo showed that
    spent: float = 0.0  # on them, steps' worth of compute
    noises: list[float] = field(default_factory=list)  # standard deviations of pairs, of the last candidates, nats
    taught: Confidence = field(default_factory=Confidence, compare=False)  # by earlier runs
    learned: list[Verdict] = field(default_factory=list)  # by this one
    over: bool = False  # handed over

    @property
    def cooldown(self) -> int:
        """Steps."""
        return math.ceil(round(5 / (1 - self.facts.beta2), 6))

    @property
    def near(self) -> int:
        """Steps around a way back that are the same place."""
        return min(self.cooldown, NEAR)

    def decide(self, finding: Finding, why: Diagnosis, signals: Signals, points: Sequence[int]) -> Choice:
        """`points`: steps that the run can go back to."""
        grown = finding.rule in FROM_OUTSIDE and why.verdict != "differs"
        if finding.hard and finding.rule in HARD and not grown:
            choice = self._hard(finding, why, points)
            return choice._replace(act=choice.act and self.mode == "act" and not self.over)
        return self._soft(finding, why, signals, points)

    def done(self, finding: Finding, choice: Choice, step: int) -> None:
        """The choice was acted on, when the run was at `step`."""
        if choice.action in ("rewind_replay", "rewind_skip"):
            place = self._place(finding.since)
            to = min(choice.to or 0, finding.since - self.near)
            if place is None:
                self.places.append([finding.since, 1, to])
            else:
                place[:] = [max(place[0], finding.since), place[1] + 1, min(place[2], to)]
            self.went = [*self.went[1 - MOST :], step]
            self.open = Open(finding.rule, choice.action, step, step + self.cooldown)
        self.over = self.over or choice.action == "stop"
        self.quiet = max(self.quiet, step + self.cooldown)

    # -- trials ------------------------------------------------------------------------------------------------------

    @property
    def left(self) -> float:
        """Steps' worth of compute that trials may still take."""
        return self.facts.budget * self.facts.steps - self.spent

    @property
    def noise(self) -> float:
        """Standard deviation of a pair's difference, nats: of this run's trials, or what is usual."""
        return median(self.noises) if self.noises else NOISE

    @property
    def placebo(self) -> bool:
        """Whether the next trial has one: until it shows that arms of this run can be compared."""
        return self.trials == 0

    @property
    def confidence(self) -> Confidence:
        """Of what helped, in earlier runs and in this one."""
        return Confidence([*self.taught.verdicts, *self.learned])

    def fit(self, tries: Sequence[Candidate], rest: int) -> tuple[tuple[Candidate, ...], Size] | str:
        """As many of them as a trial can hold, and its size; or why none fits."""
        if not self.facts.copies:
            return "memory holds no copies of the run (orchestrator.snapshot_every=0), and a trial takes two"
        refused = ""
        for count in range(len(tries), 0, -1):
            found = size(count, self.noise, rest, self.left, self.cooldown, self.placebo)
            if isinstance(found, Size):
                return tuple(tries[:count]), found
            refused = found
        return refused

    def held_trial(
        self,
        fault: str,
        spent: float,
        verdicts: Sequence[Verdict],
        actions: Sequence[str],
        won: Open | None,
        step: int,
        apart: str = "",
    ) -> None:
        """A trial of these actions is over, when the run was at `step`; `won` is what it committed to, `apart` why its
        arms cannot be compared."""
        self.trials, self.spent = self.trials + bool(verdicts), self.spent + spent
        self.apart = self.apart or apart
        self.learned = [*self.learned, *verdicts][-LEARNED:]
        self.noises = [*self.noises, *(one.noise for one in verdicts if one.noise > 0)][-REMEMBERED:]
        self.tried[fault] = [*self.tried.get(fault, []), *actions]
        self.open = won or self.open
        self.quiet = max(self.quiet, won.until if won else step + self.cooldown)

    def recall_trial(self, event: Mapping[str, Any]) -> None:
        """A trial of an attempt that was undone, as its verdict event tells it."""
        arms, fault, step = event["arms"], event["fault"], event["step"]
        taught = [
            Verdict(fault, arm["action"], arm["won"], arm["gain"], arm["low"], arm["noise"], "", "", step)
            for arm in arms
            if "won" in arm and not event["void"]
        ]
        self.held_trial(fault, event["spent"], taught, [arm["action"] for arm in arms], None, step)

    def due(self, step: int) -> Open | None:
        """The intervention whose probation ends with this step of the run."""
        return self.open if self.open and self.open.trial and step >= self.open.until else None

    def judged(self, held: bool, spent: float) -> None:
        """A probation is over. What did not hold counts as tried, so that something else comes next."""
        if self.open and held:
            self.tried.pop(self.open.fault, None)
        elif self.open:
            step = self.open.tried
            self.learned = [replace(v, won=False) if v.won and v.step == step else v for v in self.learned]
        self.open, self.spent = None, self.spent + spent

    def undone(self, since: int, step: int) -> None:
        """What did not hold is off the run, which went back from `step` to `since`; those steps are spent, too."""
        self.spent, self.quiet = self.spent + step - since, min(self.quiet, since + self.cooldown)

    def taken_off(self) -> None:
        """A person undid what is on probation: it is nobody's to judge any more."""
        self.open = None

    # -- what was done -----------------------------------------------------------------------------------------------

    def went_back(self, step: int) -> None:
        """By hand: what was tried is given up, and rests no longer than from here on."""
        self.open, self.quiet = None, min(self.quiet, step + self.cooldown)

    def recall(self, back: Mapping[str, Any]) -> Finding | None:
        """The `run` event of a way back, which the state that was restored does not know of; what is to be tried
        behind it."""
        why: Mapping[str, Any] = back.get("why") or {}
        evidence = why.get("evidence", {})
        if "probation" in evidence:
            self.judged(held=False, spent=evidence["probation"]["spent"])
            self.undone(back["parent_step"], evidence["step"])
            return None
        if "finding" not in evidence:
            self.went_back(back["parent_step"])
            return None
        finding = Finding(why["rule"], evidence["step"], evidence["finding"]["since"], "")
        self.done(finding, Choice(why["action"], True, "", back["parent_step"]), finding.step)
        found = evidence["finding"]
        cause, to = evidence["diagnosis"]["cause"], back["parent_step"]
        return follow(finding.rule, cause, to, found["since"], found.get("values", {}))

    def passed(self, step: int) -> Open | None:
        """The open intervention, if it has held until `step`: it is closed then."""
        if self.open is None or self.open.trial or step < self.open.until:
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

    def _soft(self, finding: Finding, why: Diagnosis, signals: Signals, points: Sequence[int]) -> Choice:
        kind = fault(finding, why)
        tried, advice = self.tried.get(kind, []), ADVICE[why.cause]
        follows = "follows" in finding.values  # its way back is the intervention that is open
        held_back = ("the run was handed over" if self.over else "") if follows else self.may(signals)
        held_back = held_back or self.apart
        if held_back:
            return Choice("watch", False, f"{advice} ({held_back})")
        tries = candidates(kind, finding, signals, tried) if finding.rule in TRIED or follows else []
        if not tries:
            nothing = f"; {', '.join(tried)} did not mend it, and nothing else is known: a person has to look"
            return Choice("watch", False, advice + (nothing if tried else ""))
        first = self.confidence.order(kind, [one.action for one in tries])
        ordered = tuple(sorted(tries, key=lambda one: first.index(one.action))[:MOST_TRIED])  # the others are next
        text = ", ".join(one.text for one in ordered)
        before = [step for step in points if step < finding.since]
        first_of_it = finding.rule in FROM_BEFORE and not (follows or tried or self._place(finding.since))
        if first_of_it and before and not isinstance(self.fit(ordered, self.facts.steps - max(before)), str):
            reason = f"back to step {max(before)}, before it began, and there to be tried: {text}"
            return Choice("rewind_replay", self.mode == "act", reason, max(before))
        return Choice("trial", self.mode == "act", f"to be tried: {text}", fault=kind, tries=ordered)

    def _hard(self, finding: Finding, why: Diagnosis, points: Sequence[int]) -> Choice:
        if finding.rule == "non_finite" and not finding.values["lasting"]:
            return Choice("skip_step", False, "the guard moved nothing in this step, so nothing is left to do")
        if finding.rule == "off_plan" and why.lost is not None and why.lost < LOST:
            cost = f"it cost {100 * max(0.0, why.lost):.0f} % of what was learned"
            return Choice("watch", False, f"one step alone, which heals: {cost}")
        if len([step for step in self.went if step > finding.step - WITHIN]) >= MOST:
            return Choice("stop", True, f"the run went back {MOST} times in {WITHIN} steps: a person has to look")
        place = self._place(finding.since)
        times = place[1] if place else 0
        to = self._point(finding, why, points, times)
        if times >= REWINDS:
            reason = f"the run went back from here {times} times, and it came again: a person has to look"
            return Choice("stop", True, reason)
        if to is None:
            return Choice("stop", True, "there is no restore point before it began, and going on makes it worse")
        replan = why.cause in ("learning rate", "config") or _misread(finding)
        if why.cause == "data" and why.verdict == "data" and not replan:
            more = f" and the {why.ahead} that follow and are as bad" if why.ahead else ""
            reason = f"back to step {to}, and past the batches since{more}, which are left out"
            return Choice("rewind_skip", True, reason, to, until=finding.step + why.ahead)
        if times and not replan and finding.rule in ("divergence", "non_finite"):
            reason = f"back to step {to} again; the same batches brought it back, so they are left out"
            return Choice("rewind_skip", True, reason, to)
        put = "optimizer and loader are set to the plan, then " if replan else ""
        return Choice("rewind_replay", True, f"{put}back to step {to}, and the same batches again", to, replan)

    def _point(self, finding: Finding, why: Diagnosis, points: Sequence[int], times: int) -> int | None:
        """The step to go back to: before the fault showed, each time an older one, for the newest may be of after it.

        Where the weights that the replay begins at find no batch finite, the newest one in memory is damaged itself.
        """
        sound = sorted(step for step in points if step < finding.before)
        older = times + (why.verdict == "damaged")
        return sound[max(0, len(sound) - 1 - older)] if sound else None

    def _place(self, step: int) -> list[int] | None:
        """The place that the run went back from, if `step` is near it, or on the way there again."""
        return next((place for place in self.places if place[2] <= step <= place[0] + self.near), None)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def pack(self) -> dict[str, Any]:
        return {
            "open": asdict(self.open) if self.open else None,
            "quiet": self.quiet,
            "places": [list(place) for place in self.places],
            "went": list(self.went),
            "tried": {fault: list(actions) for fault, actions in self.tried.items()},
            "apart": self.apart,
            "trials": self.trials,
            "spent": self.spent,
            "noises": list(self.noises),
            "learned": [one.pack() for one in self.learned],
        }

    def unpack(self, packed: Mapping[str, Any]) -> None:
        self.open = Open(**packed["open"]) if packed["open"] else None
        self.quiet = packed["quiet"]  # that it was handed over ends here: a person has looked, and went on
        self.places = [list(place) for place in packed["places"]]
        self.went = list(packed["went"])
        self.tried = {fault: list(actions) for fault, actions in packed["tried"].items()}
        self.trials, self.apart = packed["trials"], packed["apart"]
        self.spent, self.noises = packed["spent"], list(packed["noises"])
        self.learned = [Verdict.unpack(one) for one in packed["learned"]]


def follow(rule: str, cause: Cause, step: int, since: int, values: Mapping[str, Any]) -> Finding | None:
    """What is tried behind a way back to `step`: where the plan or the state made the run leave its way since a later
    one, the same steps will again. Hard faults act first and try afterwards."""
    if rule not in ("divergence", *FROM_BEFORE) or cause not in FOLLOWED:
        return None
    text = f"from step {since} on the run will leave its way again where nothing else is done"
    known = {"times": values["times"]} if "times" in values else {}
    return Finding(rule, step, step, text, False, {"follows": cause, "from": since} | known)


def _misread(finding: Finding) -> bool:
    """Whether batches are not those that were planned: it is the loader, and a new one reads them."""
    return finding.rule == "loader" or not {"batch", "data"}.isdisjoint(finding.values.get("broken", ()))
