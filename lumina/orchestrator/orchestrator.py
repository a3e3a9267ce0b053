"""The orchestrator: what was observed goes in, decisions come out.

    observe, looked, forecast -> Signals -> DETECTORS -> diagnose -> Policy -> Controls, or a `decision` event

A deterministic function of what it was fed: no clock, no randomness. Its state is plain values, part of the run's
checkpoints. A fault in it ends it, says so, and leaves the run alone; what `Controls` raises is the run's to answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from lumina.errors import UserError
from lumina.orchestrator import ledger
from lumina.orchestrator.detectors.table import DETECTORS
from lumina.orchestrator.diagnosis import diagnose
from lumina.orchestrator.finding import Finding, Subject
from lumina.orchestrator.policy import Choice, Mode, Policy
from lumina.orchestrator.protocol import Controls, Decision, Look, Observation, Replay
from lumina.orchestrator.robust import OUTLIER
from lumina.orchestrator.signals import Facts, Signals

Emit = Callable[..., object]
T = TypeVar("T")

QUIET = 200  # steps after a finding in which the same one is no news
UNCALM = 25  # steps after an outlier in which nothing is taken for a sound restore point: a smoothed loss takes as many


class Orchestrator:
    """Of one run. After each step: `observe` it, then `looked` and `forecast` if there was one, then `between`.

    `emit` takes the type of an event and its fields.
    """

    def __init__(self, mode: Mode, facts: Facts, emit: Emit) -> None:
        self.mode, self.emit = mode, emit
        self.signals, self.policy = Signals(facts), Policy(mode, facts)
        self.heard: dict[str, int] = {}  # the last step of each rule's findings, worse ones apart
        self.fresh: set[Subject] = set()
        self.ended = mode == "off"

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
        """Between two steps: says what it found, and does what cannot wait."""
        held = self._safely(lambda: self.policy.passed(self.signals.step))
        if held:
            self.emit("decision", step=self.signals.step, **ledger.outcome(held, self.signals.step))
        for finding in self._safely(self._news) or []:
            if self._handle(finding, controls):
                break

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
            if not choice.act:
                self.emit("decision", step=finding.step, **why.fields() | {"kind": "advise"})
                return False
            before, tried = self.policy.pack(), self.policy.open
            if tried and not refused:
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
        controls.rollback(why, choice.to, "skip" if choice.action == "rewind_skip" else "replay", choice.until)

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
        return {"signals": self.signals.pack(), "policy": self.policy.pack(), "heard": dict(self.heard)}

    def unpack(self, packed: Mapping[str, Any]) -> None:
        """The inverse. What cannot be read ends it, with an incident."""

        def read() -> None:
            self._know(packed)
            self.policy.unpack(packed["policy"])

        self._safely(read)

    def recall(self, ways_back: Iterable[Mapping[str, Any]]) -> None:
        """What was done since the checkpoint that the run goes on from, as the log has it: the `run` events."""

        def read() -> None:
            for back in ways_back:
                self.policy.recall(back)

        self._safely(read)

    def return_to(self, packed: Mapping[str, Any] | None, by_hand: bool = False) -> None:
        """The run went back to where its state was `packed`, or to its start.

        What was seen since is forgotten, what was done is not; where a person went back no outcome is awaited any more.
        """

        def read() -> None:
            self._know(packed)
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
