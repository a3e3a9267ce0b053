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

from lumina.config.overlay import pack
from lumina.errors import DiskRefused, UserError
from lumina.orchestrator import ledger
from lumina.orchestrator.confidence import Confidence
from lumina.orchestrator.detectors.table import DETECTORS
from lumina.orchestrator.diagnosis import diagnose
from lumina.orchestrator.finding import Finding, Subject
from lumina.orchestrator.policy import FROM_BEFORE, Choice, Mode, Open, Policy, follow
from lumina.orchestrator.protocol import ENDPOINT, Controls, Decision, Look, Observation, Replay
from lumina.orchestrator.robust import OUTLIER
from lumina.orchestrator.signals import Facts, Signals
from lumina.orchestrator.trying import Trial, result

Emit = Callable[..., object]
T = TypeVar("T")

QUIET = 200  # steps after a finding in which the same one is no news
OUTSIDE = ("data", "hardware", "config")  # causes that are not what an intervention on trial has done
STANDING = ("invariant", "looked")  # rules that say no earlier than each time since when: news at once, it is the same
UNCALM = 25  # steps after an outlier in which nothing is taken for a sound restore point: a smoothed loss takes as many


class Orchestrator:
    """Of one run. After each step: `observe` it, then `looked` and `forecast` if there was one, then `between`.

    `emit` takes the type of an event and its fields.
    """

    def __init__(self, mode: Mode, facts: Facts, emit: Emit) -> None:
        self.mode, self.emit = mode, emit
        self.signals, self.policy = Signals(facts), Policy(mode, facts)
        self.before: dict[str, Any] | None = None  # the policy's state before a trial whose winner is being committed
        self.waiting: Finding | None = None  # what has to be tried yet, or was being tried when the attempt ended
        self.heard: dict[str, int] = {}  # the last step of each rule's findings, worse ones apart
        self.fresh: set[Subject] = set()
        self.replays: dict[str, tuple[int, Replay]] = {}  # of each rule's findings, and the step of the last of these
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
        if self.before:
            self._safely(lambda: self._resume_trial(controls))
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
        replay = self._replayed(finding, controls) if finding.hard else None
        points = controls.points() if finding.hard or finding.rule in FROM_BEFORE else ()
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
            if tried and tried.trial and not refused:
                if why.evidence["diagnosis"]["cause"] in OUTSIDE:
                    because = "the run went back for something else"
                    self.emit("decision", step=finding.step, **ledger.unjudged(tried, finding.step, because))
                elif self._undo(tried, ledger.failed(tried, why, controls.step), controls):
                    return True
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

    def _replayed(self, finding: Finding, controls: Controls) -> Replay | None:
        """The suspect step taken again. Once for what lasts: the way there is longer each time, and says the same."""
        key = _heard_as(finding)
        last, known = self.replays.get(key, (0, None))
        if known and (finding.since <= last or (finding.rule in STANDING and finding.step - last < 2 * QUIET)):
            self.replays[key] = finding.step, known
            return known
        before = None if finding is self.waiting else self.waiting
        self.waiting = finding  # if the attempt ends in the middle, the next one takes it up
        replay = controls.replay(finding.before)
        self.waiting = before
        if replay:
            self.replays[key] = finding.step, replay
        return replay

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
        cause, values = why.evidence["diagnosis"]["cause"], why.evidence["finding"]["values"]
        after = follow(finding.rule, cause, choice.to, finding.since, values)
        controls.rollback(why, choice.to, "skip" if choice.action == "rewind_skip" else "replay", choice.until)
        self.waiting = after

    # -- trials ------------------------------------------------------------------------------------------------------

    def pending(self, step: int) -> bool:
        """Whether something has to be done behind this step, which the run stands at, before the next is taken."""
        return self.waiting is not None or self.policy.due(step) is not None

    def _resume_trial(self, controls: Controls) -> None:
        """The state is of a checkpoint that was made when a trial was over; maybe the journal never had its winner."""
        before, won, self.before = self.before, self.policy.open, None
        if before is None or won is None:
            return
        if set(won.laid) <= {one.id for one in controls.overlays}:
            self.waiting = None
        else:
            self.policy.unpack(before)

    def _try(self, finding: Finding, choice: Choice, why: Decision, controls: Controls) -> bool:
        """Returns whether the run was acted on. It is tried again where the attempt ends in the middle of it."""
        policy, step, self.waiting = self.policy, controls.step, finding
        decay = policy.facts.decay
        tries = [one for one in choice.tries if controls.alters(one.overlays(step + 1, decay))]
        fits = policy.fit(tries, controls.rest) if tries else "the run has all of it already"
        if isinstance(fits, str):
            self.waiting = None
            self._tell_trial(finding, choice, step, kind="refused", reason=fits)
            self._advise(finding, why, f"{why.reason} Not tried: {fits}.")
            return False
        chosen, size = fits
        trial = Trial(f"{step}-{finding.rule}", chosen, size, step + 1, decay, policy.placebo, policy.facts.exact)
        cost, left = size.cost(len(chosen), policy.placebo), policy.left
        self._tell_trial(finding, choice, step, kind="begin", **trial.plain() | {"cost": cost, "left": round(left)})
        with controls.fork(controls.step_seconds, size.steps + size.probe) as fork:
            best = trial.hold(controls, fork)
            without = trial.goes_on(fork) if best else None
            before = policy.pack()
            opened = self._opened(finding, choice, trial, without, controls) if best else None
            actions = [] if trial.apart else [one.action for one in chosen]
            policy.held_trial(
                choice.fault, trial.spent, trial.verdicts(choice.fault, step), actions, opened, step, trial.apart
            )
            told = trial.plain() | {"left": round(policy.left)}
            self._tell_trial(finding, choice, step, kind="verdict", reason=result(trial), **told)
            made = replace(why, evidence=why.evidence | {"trial": told}, links=[trial.files])
            if best is None or trial.won is None:
                self.waiting = None
                self._advise(finding, made, f"{why.reason} {result(trial)}.")
                return False
            made = replace(made, action=trial.won.text, reason=f"{why.reason} {result(trial)}.")
            self.before = before  # a checkpoint of now may be gone on from without what the journal is told next
            try:
                heard = controls.commit(made, fork, best)
            except DiskRefused:
                raise
            except UserError as error:
                policy.judged(held=False, spent=0)
                self._advise(finding, made, f"{made.reason} It could not be kept: {error.message}.")
                return False
            finally:
                self.before = self.waiting = None
        for seen, look in heard:
            if seen:
                self.observe(seen)
            if look:
                self.looked(look)
        return True

    def _opened(
        self, finding: Finding, choice: Choice, trial: Trial, without: float | None, controls: Controls
    ) -> Open:
        assert trial.won is not None
        laid = trial.won.overlays(trial.begin, trial.decay)
        until, probe = trial.probation
        return Open(
            finding.rule, trial.won.text, finding.step, until, trial.id, trial.begin - 1, choice.fault,
            [one.id for one in laid], pack([*controls.overlays, *laid]), without, probe,
            trial.size.steps + trial.size.probe,
        )  # fmt: skip

    def _end_probation(self, due: Open, controls: Controls) -> bool:
        """Holds the run against what it would have come to without; returns whether it went back for it.

        The same measure as in the trial, over twice its steps, in the run's own order.
        """
        step, there = controls.step, {one.id for one in controls.overlays}
        if not set(due.laid) <= there:  # a person undid it
            self.policy.taken_off()
            return False
        against = {
            "memory did not hold the run without it": due.without is None,
            "something else was done to the run since": pack(controls.overlays) != due.beside,
            "the run ends too soon": controls.rest < due.probe,
            "the run is only advised": self.mode != "act",
        }
        because, end = next((reason for reason, holds in against.items() if holds), ""), None
        if not because:
            with controls.fork(controls.step_seconds, due.worth) as fork:
                end = fork.run(f"{due.trial}-probation", [], 0, due.probe)
            because = end.void
        if because or due.without is None or end is None:
            self.policy.taken_off()
            self.emit("decision", step=step, **ledger.unjudged(due, step, because))
            return False
        gain = due.without - end.heldout
        held, spent = math.isfinite(end.heldout) and gain > 0, (1 + ENDPOINT) * due.probe
        self.policy.judged(held, spent)
        came = ledger.probation(due, step, held, gain, end.heldout, spent)
        if held:
            self.emit("decision", step=step, **came.fields() | {"kind": "outcome"})
            return False
        return self._undo(due, came, controls)

    def _undo(self, tried: Open, why: Decision, controls: Controls) -> bool:
        """Goes back to before what did not hold: the run that never had it. Returns whether it went."""
        if self.policy.open:
            self.policy.judged(held=False, spent=0)
        there = [one.id for one in controls.overlays if one.id in tried.laid]
        step = controls.step
        if not there:
            return False
        try:
            controls.undo(why, *there)
        except DiskRefused:
            raise
        except UserError as error:
            reason = f"{why.reason}. It could not be undone: {error.message}"
            self.emit("decision", step=step, **replace(why, reason=reason).fields() | {"kind": "advise"})
            return False
        self.policy.undone(controls.step, step)
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
            "before": self.before,
        }

    def unpack(self, packed: Mapping[str, Any]) -> None:
        """The inverse. What cannot be read ends it, with an incident."""

        def read() -> None:
            self._know(packed)
            self.policy.unpack(packed["policy"])
            self.waiting = Finding(**packed["waiting"]) if packed["waiting"] else None
            self.before = packed["before"]

        self._safely(read)

    def recall(self, since: Iterable[Mapping[str, Any]]) -> None:
        """What was done since the checkpoint that the run goes on from, as the log has it: ways back, and trials.

        A trial that no way back undid will be held again; of the others what they cost and taught is known.
        """

        def read() -> None:
            trials: list[Mapping[str, Any]] = []
            for event in since:
                if event["t"] == "trial":
                    trials.append(event)
                    continue
                for trial in trials:
                    if trial["step"] > event["parent_step"]:
                        self.policy.recall_trial(trial)
                self.waiting, trials = self.policy.recall(event), []

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
        facts, self.fresh, self.replays = self.signals.facts, set(), {}
        self.signals = Signals.unpack(packed["signals"], facts) if packed else Signals(facts)
        self.heard = dict(packed["heard"]) if packed else {}


def _heard_as(finding: Finding) -> str:
    """The same rule, broken in the same way: what is worse is news."""
    worse = ["lasting"] if finding.values.get("lasting") else ["hard"] if finding.hard else []
    return ", ".join([finding.rule, *sorted(finding.values.get("broken", ())), *worse])
