"""The orchestrator: what was observed goes in, decisions come out.

    observe, looked, forecast -> Signals -> DETECTORS -> diagnose -> Policy -> Controls, or a `decision` event

A deterministic function of what it was fed: no clock, no randomness. Its state is plain values, part of the run's
checkpoints. A fault in it ends it, says so, and leaves the run alone; what `Controls` raises is the run's to answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from lumina.errors import UserError
from lumina.orchestrator import ledger
from lumina.orchestrator.detectors.table import DETECTORS
from lumina.orchestrator.diagnosis import Diagnosis, diagnose
from lumina.orchestrator.finding import Detector, Finding, Subject
from lumina.orchestrator.policy import Choice, Mode, Policy
from lumina.orchestrator.protocol import Controls, Decision, Look, Observation
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
        self.heard: dict[str, int] = {}  # the last step of each rule's findings
        self.fresh: set[Subject] = set()
        self.ended = mode == "off"

    # -- what it hears -----------------------------------------------------------------------------------------------

    def observe(self, seen: Observation) -> None:
        """The next step's; an earlier one says that the run went back."""

        def hear() -> None:
            if seen.step <= self.signals.step:
                self._went_back(seen.step - 1)
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
        return not (strange or refused or signals.level.above or signals.contents.again)

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
            if detector.on in fresh and (finding := detector(self.signals)) is not None:
                if self._is_news(detector, finding):
                    found.append(finding)
                self.heard[detector.name] = finding.step
        return found

    def _is_news(self, detector: Detector, finding: Finding) -> bool:
        last = self.heard.get(detector.name)
        grown = finding.rule == "non_finite" and len(self.signals.refused) > 1 and finding.values["lasting"]
        return last is None or finding.step - last >= QUIET or grown

    def _handle(self, finding: Finding, controls: Controls) -> bool:
        """Returns whether the run was acted on: what else was found is of a state that is no more."""
        replay = controls.replay() if finding.hard else None
        points = controls.points() if finding.hard else ()
        made = self._safely(lambda: self._judge(finding, diagnose(finding, replay, self.signals), points))
        if made is None:
            return False
        choice, why = made
        if not choice.act:
            self.emit("decision", step=finding.step, **why.fields() | {"kind": "advise"})
            return False
        try:
            self._do(finding, choice, why, controls)
        except UserError as error:
            refused = f"{why.reason} It could not be done: {error.message}."
            again = Decision(why.rule, "stop", why.evidence, refused)
            self.policy.done(finding, Choice("stop", True, refused), finding.step)
            controls.stop(again)
        return True

    def _judge(self, finding: Finding, why: Diagnosis, points: tuple[int, ...]) -> tuple[Choice, Decision]:
        choice = self.policy.decide(finding, why, self.signals, points)
        made = ledger.decision(finding, why, choice, self.signals)
        made.evidence["step"] = finding.step
        return choice, made

    def _do(self, finding: Finding, choice: Choice, why: Decision, controls: Controls) -> None:
        """The policy knows of it first: it is in the state that a stop saves."""
        self.policy.done(finding, choice, finding.step)
        if choice.replan:
            controls.replan(why)
        if choice.action == "stop":
            controls.stop(why)
            return
        assert choice.to is not None
        controls.rollback(why, choice.to, "skip" if choice.action == "rewind_skip" else "replay")
        last = self.signals.seen
        self._safely(lambda: self._went_back(choice.to or 0))
        if choice.ahead and last is not None:
            with suppress(UserError):  # there are no more batches in this phase
                controls.overlay(why, "data.skip", [last.batch + 1, choice.ahead])

    def _went_back(self, step: int) -> None:
        self.signals.rewind(step)
        self.heard = {rule: last for rule, last in self.heard.items() if last <= step}
        self.fresh = set()

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
            self.signals = Signals.unpack(packed["signals"], self.signals.facts)
            self.policy.unpack(packed["policy"])
            self.heard = dict(packed["heard"])

        self._safely(read)
