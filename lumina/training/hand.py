"""What people ask of a run in training: its inbox, read between two steps, done through `Controls`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lumina.config.overlay import pack
from lumina.errors import UserError
from lumina.orchestrator import actions
from lumina.orchestrator.actions import Request
from lumina.orchestrator.protocol import Decision
from lumina.run.inbox import Inbox, Letter
from lumina.training import failing
from lumina.training.controls import SessionControls

if TYPE_CHECKING:
    from lumina.training.session import Session


class Hand:
    """The inbox of a session; the main process looks, and all do what it finds."""

    def __init__(self, session: Session) -> None:
        self.session, self.world = session, session.world
        self.controls, self.inbox = SessionControls(session), Inbox(session.run)
        self.stuck: set[str] = set()  # letters that were answered and cannot be moved

    def waiting(self) -> bool:
        return self.world.main and self.inbox.waiting(self.stuck)

    def obey(self) -> None:
        """Does what waits, each once, and tells what it does not do; the run is then as if nobody had asked."""
        for letter in self.world.decide(self._letters):
            if self.world.decide(lambda letter=letter: self._was_done(letter)):  # type: ignore[misc]
                self._aside(letter, "done")  # and killed before it was moved
                continue
            overlays, attempt, error = self.controls.overlays, self.session.state.attempt, None
            try:
                self._do(letter)
            except Exception as failed:
                half_way = self.session.state.attempt > attempt  # it has to begin again from what the log says
                if half_way or failing.ends(failed, self.session.config):
                    raise
                error = failed
            if self.world.max(error is not None):
                self.session.state.overlays = overlays
                self._refuse(letter, failing.said(error))
            else:
                self._aside(letter, "done")

    def _refuse(self, letter: Letter, error: str) -> None:
        """Tells it, with what lies over the plan, for it may have failed after the journal had it; sets it aside."""
        asked = str((letter.content or {}).get("name", letter.name))[:50]
        laid = {"overlays": pack(self.controls.overlays), "ends": self.controls.course.steps}
        self.session.tell("incident", kind="act refused", asked=asked, error=error, **laid)
        self._aside(letter, "refused")

    def _do(self, letter: Letter) -> None:
        if letter.content is None:
            raise UserError(f"inbox/{letter.name}: {letter.problem}", fix="ask with lumina act")
        request = actions.checked(Request.unpack(letter.content), self.session.config)
        reason = f"asked by hand: {actions.ACTIONS[request.name].does}"
        why = Decision("hand", request.text, {"step": self.controls.step}, reason, [_link(letter)])
        actions.perform(self.controls, request, why)

    def _was_done(self, letter: Letter) -> bool:
        """Whether the journal has it: what was done is told before it is."""
        log = self.session.run.event_log
        return _link(letter).encode() in log.read_bytes() if log.exists() else False

    def _letters(self) -> list[Letter]:
        return [letter for letter in self.inbox.letters() if letter.name not in self.stuck]

    def _aside(self, letter: Letter, to: Literal["done", "refused"]) -> None:
        """One that cannot be moved is told once, and not read again in this attempt."""
        if not self.world.main:
            return
        try:
            self.inbox.aside(letter.name, to)
        except UserError as error:
            self.stuck.add(letter.name)
            self.session.tell("incident", kind="inbox", error=str(error))


def _link(letter: Letter) -> str:
    return f"inbox/{letter.name}"
