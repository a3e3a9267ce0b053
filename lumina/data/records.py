"""What flows through the data room: texts and conversations, and what is wrong with those that are neither."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lumina.errors import UserError

Role = Literal["system", "user", "assistant"]
Kind = Literal["text", "chat"]
KINDS: tuple[Kind, ...] = ("text", "chat")
MAX_PROBLEMS = 20  # enough to see the pattern


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """A document: a text, or a conversation, which has `messages`.

    `where` is "a.txt" or "b.jsonl:17". A large text comes in parts, of which only the last one is `last`. Documents of
    one `family` share their text and are held out together; it is the hash of the content, if nothing else is known.
    `format` is how it was written: text, messages, alpaca, …
    """

    where: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    family: str = ""
    last: bool = True
    format: str = "text"

    @property
    def kind(self) -> Kind:
        return "chat" if self.messages else "text"

    @property
    def content(self) -> str:
        """All of its text, without roles."""
        return "\n".join(message.content for message in self.messages) if self.messages else self.text

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return sum(len(part.encode()) for part in (self.text, *(message.content for message in self.messages)))

    @property
    def key(self) -> int:
        """64 bits that name the family."""
        return int(self.family[:16], 16) if self.family else int(digest(self.identity)[:16], 16)

    @property
    def identity(self) -> str:
        """Equal for equal documents only."""
        return json.dumps(self.messages) if self.messages else self.text


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Problems:
    """What is wrong with the input, gathered so that nobody mends it one run at a time.

    `tolerated` records may be bad: they are left out and listed. What is wrong with a file, or with one record too
    many, is in `fatal`; reading stops when there are `MAX_PROBLEMS` of these, or at `most`.
    """

    def __init__(self, tolerated: int = 0, most: int = MAX_PROBLEMS) -> None:
        self.tolerated, self.most = tolerated, most
        self.fatal: list[str] = []
        self.skipped: list[str] = []

    def record(self, problem: str) -> None:
        """A bad record: `b.jsonl:17: not JSON, …`."""
        if len(self.skipped) < self.tolerated:
            self.skipped.append(problem)
        else:
            self.file(problem)

    def file(self, problem: str) -> None:
        """A bad file, folder or pattern."""
        self.fatal.append(problem)

    @property
    def enough(self) -> bool:
        return len(self.fatal) >= self.most

    def raise_any(self) -> None:
        """Raises `UserError` with all fatal problems, if there are some."""
        if not self.fatal:
            return
        shown: Sequence[str] = self.fatal[: self.most]
        if self.tolerated and self.skipped:
            shown = [*shown, f"besides {len(self.skipped)} records that data.skip_bad={self.tolerated} tolerates"]
        if self.enough:
            shown = [*shown, "… reading stopped here; there may be more"]
        fix = "mend these, leave them out of data.train and data.eval, or tolerate N bad records with data.skip_bad=N"
        raise UserError.collect(shown, "the data cannot be read", fix)
