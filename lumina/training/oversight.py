"""The call site of the orchestrator, after each step: what it hears, and what becomes of the run if it fails.

Of several processes the main one thinks; what it does through `Controls` all do together (`following`). An exception in
it is told as an incident and ends it for the attempt: the run stands where it stood and trains on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lumina.events import Event
from lumina.orchestrator.alarms import Alarms
from lumina.orchestrator.orchestrator import Orchestrator
from lumina.orchestrator.protocol import Decision, Observation
from lumina.orchestrator.signals import Facts
from lumina.run import lineage
from lumina.training import failing
from lumina.training.following import Leading, follow
from lumina.training.memory import usable

if TYPE_CHECKING:
    from lumina.training.session import Session

KIND = "orchestrator failed"  # of the incident


class Oversight:
    """The orchestrator of a session, if its mode is not `off`."""

    def __init__(self, session: Session) -> None:
        self.session = session
        mode = session.config.orchestrator.mode
        self.watching = mode != "off"
        self.seen: Observation | None = None  # the last that was heard of the run as it is now
        self.orchestrator: Orchestrator | None = None
        if mode != "off" and session.world.main:
            self.orchestrator = Orchestrator(mode, Facts.of(session.config), session._emit)
            self.alarms = Alarms(usable(session.config.parallel.device), session._emit)

    def begin(self) -> None:
        """Goes on from what the checkpoint holds."""
        if not self.watching:
            return
        if self.orchestrator:
            self._guarded(self._recall)
            self.session.state.orchestrator = self._pack
        self.watching = self.session.world.decide(lambda: self.orchestrator is not None)
        step = self.session.state.progress.step
        if self.session.world.decide(lambda: self.orchestrator is not None and self.orchestrator.pending(step)):
            self.after_step()  # the attempt before ended in the middle of it

    def _recall(self) -> None:
        assert self.orchestrator
        session, known = self.session, self.session.state.unpacked
        self.orchestrator.learn(session.experience.recall(session.state.progress.step))
        if known is not None:
            self.orchestrator.unpack(known)
        stands = session.state.progress.step
        if since := lineage.done_since(session.run, session.state.saved_in, stands):
            self.orchestrator.recall(since)

    def return_to(self, why: Decision | None) -> None:
        """Knows what the restore point holds that the run went back to."""
        orchestrator, known = self.orchestrator, self.session.state.unpacked
        if orchestrator:
            by_hand = why is None or why.rule == "hand"
            self._guarded(lambda: orchestrator.return_to(known, by_hand))

    def hear(self, event: Event) -> None:
        """A listener, in the main process: what forecasts expect is part of what is seen; a clock only alarms."""
        orchestrator = self.orchestrator
        if orchestrator is None:
            return
        self._guarded(lambda: self.alarms(event))
        if event["t"] == "forecast":
            self._guarded(lambda: orchestrator.forecast(event))

    def calm(self) -> bool:
        """Whether the run as it stands may become a restore point: the same in every process."""
        return self.session.world.decide(self._calm)

    def _calm(self) -> bool:
        found: list[bool] = []
        if orchestrator := self.orchestrator:
            self._guarded(lambda: found.append(orchestrator.calm))
        return self.orchestrator is None or found == [True]

    def after_step(self) -> None:
        """What the last step and look showed is heard, then what has to be done is done; not training time."""
        course = self.session.course
        self.seen = course.seen or self.seen
        if not self.watching:
            return
        start, last = time.perf_counter(), course.last
        try:
            self._after_step()
        finally:
            if course.last == last:  # else what was done reckoned for itself
                course.last += time.perf_counter() - start

    def _after_step(self) -> None:
        from lumina.training.controls import SessionControls

        session, controls = self.session, SessionControls(self.session)
        if session.world.size == 1:
            self._hear(controls)
        elif session.world.main:
            with Leading(controls, session.world) as leading:
                self._hear(leading)
        else:
            follow(controls, session.world)
        if session.world.size > 1:
            self.watching = session.world.decide(lambda: self.orchestrator is not None)
        else:
            self.watching = self.orchestrator is not None

    def _hear(self, controls: Any) -> None:
        orchestrator, course = self.orchestrator, self.session.course
        seen, look = course.seen, course.looked
        if orchestrator is None:
            return

        def hear() -> None:
            if seen:
                orchestrator.observe(seen)
            if look:
                orchestrator.looked(look)
            orchestrator.between(controls)

        self._guarded(hear)

    def _guarded(self, work: Any) -> None:
        """What fails inside ends the orchestrator, unless the attempt itself has to end."""
        try:
            work()
        except Exception as error:
            if failing.ends(error, self.session.config):
                raise
            self.orchestrator = None
            self.session.tell("incident", kind=KIND, error=failing.said(error))

    def _pack(self) -> dict[str, Any] | None:
        """Its state; that of the checkpoint before if it failed since."""
        if self.orchestrator is None:
            return self.session.state.unpacked
        orchestrator, found = self.orchestrator, dict[str, Any]()
        self._guarded(lambda: found.update(orchestrator.pack()))
        return found if self.orchestrator else self.session.state.unpacked
