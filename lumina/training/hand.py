"""What people ask of a run in training: its inbox, read between two steps, done through `Controls`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lumina.errors import UserError
from lumina.orchestrator import actions
from lumina.orchestrator.actions import Request
from lumina.orchestrator.protocol import Decision
from lumina.run.inbox import Inbox, Letter
from lumina.training.controls import SessionControls

if TYPE_CHECKING:
    from lumina.training.session import Session


class Hand:
    """The inbox of a session; the main process looks, and all do what it finds."""

    def __init__(self, session: Session) -> None:
        self.session, self.world = session, session.world
        self.controls, self.inbox = SessionControls(session), Inbox(session.run)

    def waiting(self) -> bool:
        return self.world.main and self.inbox.waiting()

    def obey(self) -> None:
        """Does what waits, each once, and tells what it does not do."""
        for letter in self.world.decide(self.inbox.letters):
            if self.world.decide(lambda letter=letter: self._was_done(letter)):  # type: ignore[misc]
                self._aside(letter, "done")  # and killed before it was moved
                continue
            try:
                self._do(letter)
            except UserError as error:
                asked = str((letter.content or {}).get("name", letter.name))[:50]
                self.session.tell("incident", kind="act refused", asked=asked, error=str(error))
                self._aside(letter, "refused")
            else:
                self._aside(letter, "done")

    def _do(self, letter: Letter) -> None:
        if letter.content is None:
            raise UserError(f"inbox/{letter.name}: {letter.problem}", fix="ask with lumina act")
        request = actions.checked(Request.unpack(letter.content), self.session.config)
        reason = f"asked by hand: {actions.ACTIONS[request.name].does}"
        actions.perform(self.controls, request, Decision("hand", request.text, {}, reason, [_link(letter)]))

    def _was_done(self, letter: Letter) -> bool:
        """Whether the journal has it: what was done is told before it is."""
        log = self.session.run.event_log
        return _link(letter).encode() in log.read_bytes() if log.exists() else False

    def _aside(self, letter: Letter, to: Literal["done", "refused"]) -> None:
        def move() -> None:
            self.inbox.aside(letter.name, to)

        self.world.decide(move)


def _link(letter: Letter) -> str:
    return f"inbox/{letter.name}"
