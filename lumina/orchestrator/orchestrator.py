"""The orchestrator: what was observed goes in, decisions come out.

    observe, looked, forecast -> Signals -> DETECTORS -> diagnose -> Policy -> Controls, or a `decision` event
                                                                         |
                                                             Trial -> commit -> probation

A deterministic function of what it was fed: no clock, no randomness. Its state is plain values, part of the run's
checkpoints. A fault in it ends it, says so, and leaves the run alone; what `Controls` raises is the run's to answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar

from lumina.errors import UserError
from lumina.orchestrator import ledger
from lumina.orchestrator.confidence import Confidence
from lumina.orchestrator.detectors.table import DETECTORS
from lumina.orchestrator.diagnosis import diagnose
from lumina.orchestrator.finding import Finding, Subject
from lumina.orchestrator.policy import Choice, Mode, Open, Policy, follow
from lumina.orchestrator.protocol import Controls, Decision, Look, Observation, Replay
from lumina.orchestrator.robust import OUTLIER
from lumina.orchestrator.signals import Facts, Signals
from lumina.orchestrator.trying import Trial, result

Emit = Callable[..., object]
T = TypeVar("T")

QUIET = 200  # steps after a finding in which the same one is no news
OUTSIDE = ("data", "hardware", "config")  # causes that are not what an intervention on trial has done
UNCALM = 25  # steps after an outlier in which nothing is taken for a sound restore point: a smoothed loss takes as many


class Orchestrator:
    """Of one run. After each step: `observe` it, then `looked` and `forecast` if there was one, then `between`.

    `emit` takes the type of an event and its fields.
    """

    def __init__(self, mode: Mode, facts: Facts, emit: Emit) -> None:
        self.mode, self.emit = mode, emit
        self.signals, self.policy = Signals(facts), Policy(mode, facts)
        self.waiting: Finding | None = None  # what has to be tried yet, or was being tried when the attempt ended
        self.heard: dict[str, int] = {}  # the last step of each rule's findings, worse ones apart
        self.fresh: set[Subject] = set()
        self.ended = mode == "off"

    def learn(self, taught: Confidence) -> None:
        """What earlier runs taught, before the first step of an attempt."""
        self.policy.taught = taught

    # -- what it hears -----------------------------------------------------------------------------------------------

    def observe(self, seen: Observation) -> None:
        """The next step's."""

        def hear() -> None:
            self.signals.observe(seen)
            self.fresh.add("step")

        self._safely(hear)

    def looked(self, look: Look) -> None:
        """What the probe saw behind a step."""

        def hear() -> None:
            self.signals.looked(look)
            self.fresh.add("look")

        self._safely(hear)

    def forecast(self, event: Mapping[str, Any]) -> None:
        """A `forecast` event."""

        def hear() -> None:
            self.signals.forecast(event)
            self.fresh.add("forecast")

        self._safely(hear)

    @property
    def calm(self) -> bool:
        """Whether the state may be kept as a restore point: nothing is suspected of it."""
        signals = self.signals
        strange = [z for judged in signals.judged[-UNCALM:] for z in judged if z is not None and z > OUTLIER]
        refused = any(step > signals.step - UNCALM for step in signals.refused)
        return not (strange or refused or signals.level.above or signals.level.unlearned or signals.contents.again)

    # -- what it does ------------------------------------------------------------------------------------------------

    def between(self, controls: Controls) -> None:
        """Between two steps: says what it found, does what cannot wait, and tries what may help."""
        if (due := self._safely(lambda: self.policy.due(controls.step))) and self._end_probation(due, controls):
            return
        held = self._safely(lambda: self.policy.passed(self.signals.step))
        if held:
            self.emit("decision", step=self.signals.step, **ledger.outcome(held, self.signals.step))
        for finding in self._safely(self._news) or []:
            if self._handle(finding, controls):
                break
        if self.waiting and not self.ended:  # behind a way back, or since the attempt before
            self._handle(self.waiting, controls)

    def _news(self) -> list[Finding]:
        """Findings that are new since the last call."""
        fresh, self.fresh, found = self.fresh, set(), []
        for detector in DETECTORS:
            finding = detector(self.signals) if detector.on in fresh else None
            if finding and self._is_news(finding):
                found.append(finding)
                self.heard[_heard_as(finding)] = finding.step
        return found

    def _is_news(self, finding: Finding) -> bool:
        last = self.heard.get(_heard_as(finding))
        return last is None or finding.step - last >= QUIET or finding.rule == "off_plan"  # each is another

    def _handle(self, finding: Finding, controls: Controls) -> bool:
        """Returns whether the run was acted on: what else was found is of a state that is no more."""
        replay = controls.replay(finding.before) if finding.hard else None
        points = controls.points() if finding.hard else ()
        refused: list[str] = []
        while True:
            made = self._safely(lambda: self._judge(finding, replay, points, refused))  # noqa: B023 - called at once
            if made is None:
                return False
            choice, why = made
            if finding is self.waiting and not choice.act:
                self.waiting = None
            if not choice.act:
                self.emit("decision", step=finding.step, **why.fields() | {"kind": "advise"})
                return False
            if choice.action == "trial":
                return self._try(finding, choice, why, controls)
            before, tried = self.policy.pack(), self.policy.open
            if tried and tried.trial and why.evidence["diagnosis"]["cause"] not in OUTSIDE:
                return self._undo(tried, ledger.failed(tried, why, controls.step), controls)
            if tried and not tried.trial and not refused:
                failed = ledger.outcome(tried, finding.step, held=False)
                self.emit("decision", step=finding.step, **failed)
            try:
                self._do(finding, choice, why, controls)
                return True
            except UserError as error:
                if choice.to is None:
                    raise
                self.policy.unpack(before)
                refused.append(f"Step {choice.to} could not be gone back to: {error.message}.")
                points = tuple(point for point in points if point < choice.to)  # one of before it may be better

    def _judge(
        self, finding: Finding, replay: Replay | None, points: tuple[int, ...], refused: list[str]
    ) -> tuple[Choice, Decision]:
        why = diagnose(finding, replay, self.signals)
        choice = self.policy.decide(finding, why, self.signals, points)
        made = ledger.decision(finding, why, choice, self.signals)
        made.evidence["step"] = finding.step
        return choice, replace(made, reason=" ".join([made.reason, *refused]))

    def _do(self, finding: Finding, choice: Choice, why: Decision, controls: Controls) -> None:
        """The policy knows of it first: it is in the state that a stop saves."""
        self.policy.done(finding, choice, finding.step)
        if choice.replan:
            controls.replan(why)
        if choice.action == "stop":
            controls.stop(why)
            return
        assert choice.to is not None
        after = follow(finding.rule, why.evidence["diagnosis"]["cause"], choice.to)
        controls.rollback(why, choice.to, "skip" if choice.action == "rewind_skip" else "replay", choice.until)
        self.waiting = after

    # -- trials ------------------------------------------------------------------------------------------------------

    def _try(self, finding: Finding, choice: Choice, why: Decision, controls: Controls) -> bool:
        """Returns whether the run was acted on. It is tried again where the attempt ends in the middle of it."""
        policy, step, self.waiting = self.policy, controls.step, finding
        fits = policy.fit(choice.tries, controls.rest)
        if isinstance(fits, str):
            self.waiting = None
            self._tell_trial(finding, choice, step, kind="refused", reason=fits)
            self._advise(finding, why, f"{why.reason} Not tried: {fits}.")
            return False
        tries, size = fits
        trial = Trial(f"{step}-{finding.rule}", tries, size, step + 1, policy.placebo, policy.facts.exact)
        cost, left = size.cost(len(tries), policy.placebo), policy.left
        self._tell_trial(finding, choice, step, kind="begin", **trial.plain() | {"cost": cost, "left": round(left)})
        with controls.fork(controls.step_seconds) as fork:
            best = trial.hold(controls, fork)
            without = trial.goes_on(fork) if best else 0.0
            opened = self._opened(finding, choice, trial, without) if best else None
            before = policy.pack()
            policy.held_trial(choice.fault, trial.spent, trial.verdicts(choice.fault, step), opened, step)
            self.waiting = None
            told = trial.plain() | {"left": round(policy.left)}
            self._tell_trial(finding, choice, step, kind="verdict", reason=result(trial), **told)
            made = replace(why, evidence=why.evidence | {"trial": told}, links=trial.files)
            if best is None or trial.won is None:
                self._advise(finding, made, f"{why.reason} {result(trial)}.")
                return False
            try:
                made = replace(made, action=trial.won.text, reason=f"{why.reason} {result(trial)}.")
                heard = controls.commit(made, fork, best)
            except UserError as error:
                policy.unpack(before)
                self._advise(finding, made, f"{made.reason} It could not be kept: {error.message}.")
                return False
        for seen, look in heard:
            if seen:
                self.observe(seen)
            if look:
                self.looked(look)
        self.fresh.clear()  # what an arm showed was judged by its end
        return True

    def _opened(self, finding: Finding, choice: Choice, trial: Trial, without: float) -> Open:
        assert trial.won is not None
        laid = [one.id for one in trial.won.overlays(trial.begin)]
        until = trial.begin - 1 + 2 * trial.size.steps
        return Open(
            finding.rule, trial.won.text, finding.step, until, trial.id, trial.begin - 1, choice.fault, laid, without,
            trial.size.probe,
        )  # fmt: skip

    def _end_probation(self, due: Open, controls: Controls) -> bool:
        """Holds the run against what it would have come to without; returns whether it went back for it.

        The same measure as in the trial, over twice its steps, in the run's own order.
        """
        if not set(due.laid) <= {one.id for one in controls.overlays}:  # a person undid it
            self.policy.taken_off()
            return False
        probe, step = min(due.probe, controls.rest), controls.step
        if probe < 1:
            self.policy.taken_off()
            return False
        with controls.fork(controls.step_seconds) as fork:
            end = fork.run(f"{due.trial}-probation", [], 0, probe)
        gain = due.without - end.heldout if math.isfinite(due.without) else math.inf
        held = math.isfinite(end.heldout) and gain > 0
        self.policy.judged(held, probe)
        came = ledger.probation(due, step, held, gain, end.heldout)
        if held:
            self.emit("decision", step=step, **came.fields() | {"kind": "outcome"})
            return False
        return self._undo(due, came, controls)

    def _undo(self, tried: Open, why: Decision, controls: Controls) -> bool:
        """Goes back to before what did not hold: the run that never had it."""
        if self.policy.open:
            self.policy.judged(held=False, spent=0)
        try:
            controls.undo(why, *tried.laid)
        except UserError as error:
            reason = f"{why.reason}. It could not be undone: {error.message}"
            self.emit("decision", step=controls.step, **replace(why, reason=reason).fields() | {"kind": "advise"})
            return False
        return True

    def _tell_trial(self, finding: Finding, choice: Choice, step: int, **told: Any) -> None:
        self.emit("trial", step=step, rule=finding.rule, fault=choice.fault, **ledger.plain(told))

    def _advise(self, finding: Finding, why: Decision, reason: str) -> None:
        fields = replace(why, action="watch", reason=reason).fields() | {"kind": "advise"}
        self.emit("decision", step=finding.step, **ledger.plain(fields))

    def _safely(self, work: Callable[[], T]) -> T | None:
        """What fails ends the orchestrator, not the run."""
        if self.ended:
            return None
        try:
            return work()
        except Exception as error:
            self.ended = True
            said = f"{type(error).__name__}: {error}"
            self.emit("incident", step=self.signals.step, kind="orchestrator failed", error=said[:500])
            return None

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def pack(self) -> dict[str, Any]:
        """Its state, as plain values that JSON keeps."""
        return {
            "signals": self.signals.pack(),
            "policy": self.policy.pack(),
            "heard": dict(self.heard),
            "waiting": ledger.plain(asdict(self.waiting)) if self.waiting else None,
        }

    def unpack(self, packed: Mapping[str, Any]) -> None:
        """The inverse. What cannot be read ends it, with an incident."""

        def read() -> None:
            self._know(packed)
            self.policy.unpack(packed["policy"])
            self.waiting = Finding(**packed["waiting"]) if packed["waiting"] else None

        self._safely(read)

    def recall(self, ways_back: Iterable[Mapping[str, Any]]) -> None:
        """What was done since the checkpoint that the run goes on from, as the log has it: the `run` events."""

        def read() -> None:
            for back in ways_back:
                self.waiting = self.policy.recall(back)

        self._safely(read)

    def return_to(self, packed: Mapping[str, Any] | None, by_hand: bool = False) -> None:
        """The run went back to where its state was `packed`, or to its start.

        What was seen since is forgotten, what was done is not; where a person went back no outcome is awaited any more.
        """

        def read() -> None:
            self._know(packed)
            self.waiting = None
            if by_hand:
                self.policy.went_back(self.signals.step)

        self._safely(read)

    def _know(self, packed: Mapping[str, Any] | None) -> None:
        facts, self.fresh = self.signals.facts, set()
        self.signals = Signals.unpack(packed["signals"], facts) if packed else Signals(facts)
        self.heard = dict(packed["heard"]) if packed else {}


def _heard_as(finding: Finding) -> str:
    """The same rule, broken in the same way: what is worse is news."""
    worse = ["lasting"] if finding.values.get("lasting") else ["hard"] if finding.hard else []
    return ", ".join([finding.rule, *sorted(finding.values.get("broken", ())), *worse])
