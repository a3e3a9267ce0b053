"""A conversation: turns in the model's chat template, or, with a model that only continues text, a growing text.

Each answer reads the whole text anew instead of going on with the last cache. The tokens that were sampled need not
be the tokens of their text, and an interrupt may strike while some layers have stored a token and others have not.
So the answer of a model of texts is, to the bit, what `Model.stream` writes for the same text, settings and seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lumina.data.records import Message
from lumina.errors import UserError
from lumina.inference.engine import Model
from lumina.inference.sampler import Sampler


@dataclass(frozen=True)
class Turn:
    """What one side appended; of the model's side also from which checkpoint, and why it ended."""

    role: Literal["user", "assistant"]
    text: str
    step: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Answer:
    """One answer. `reason` as in `Model.stream`, or `interrupted`; the tokens are counted, the seconds measured.

    `prompt_tokens` were read, `left_out` older ones had no room, `tokens` were chosen (an end token included) in
    `seconds`, reading included. `cache_entries` per layer were stored.
    """

    text: str
    reason: str
    prompt_tokens: int
    left_out: int
    tokens: int
    seconds: float
    cache_entries: list[int]


class Conversation:
    """The turns so far, and how the next answer is sampled. Answer i (from 0) is drawn with `seed` + i."""

    def __init__(self, model: Model, sampler: Sampler, max_tokens: int, seed: int) -> None:
        self.model, self.sampler, self.max_tokens, self.seed = model, sampler, max_tokens, seed
        self.system = ""
        self.turns: list[Turn] = []
        self.last: Answer | None = None
        self._answers = 0
        # A first token for nobody: torch imports parts of itself in its first forward pass, which an interrupt of an
        # answer would tear, and an answer's seconds would hold.
        list(model.stream_ids(model.encode(""), 1, seed, sampler))

    @property
    def text(self) -> str:
        """All turns. What the user wrote begins a line; the model goes on right behind it."""
        return _joined(self.turns)

    def reset(self) -> None:
        """Forgets all turns; `system` and the settings stay."""
        self.turns = []

    def set_system(self, text: str) -> None:
        """Puts `text` before the conversation, where it stays when the oldest turns are left out.

        Raises `UserError` for one that takes more than half of what is read, or that the chat template refuses.
        """
        tokens, room = len(self.model.encode(text)), self.model.prompt_room(self.max_tokens)
        if tokens > room // 2:
            raise UserError(
                f"{tokens} tokens are too many: of {room} that are read, half is for the conversation",
                fix="write a shorter one",
            )
        if text and self.model.talks:
            self._encode([*_system(text), Message("user", "x")])
        self.system = text

    def prompt(self, turns: Sequence[Turn]) -> tuple[list[int], int]:
        """The ids that the model reads for these turns, and how many older ones had no room."""
        room = self.model.prompt_room(self.max_tokens)
        if self.model.talks:
            return self._dialogue(turns, room)
        text = _joined(turns)
        ids = self.model.encode(self._head + text)
        head = len(self.model.encode(self._head)) if self._head else 0
        left_out = max(0, len(ids) - room)
        return ids[:head] + ids[head + left_out :], left_out

    def _dialogue(self, turns: Sequence[Turn], room: int) -> tuple[list[int], int]:
        """Turns in the template, the oldest left out whole; of a last one that alone is too long the end is kept."""
        ids = self._written(turns)
        needed = len(ids)
        while len(ids) > room and (later := [i for i, turn in enumerate(turns) if i and turn.role == "user"]):
            turns = turns[later[0] :]
            ids = self._written(turns)
        return ids[-room:], needed - min(len(ids), room)

    def _written(self, turns: Sequence[Turn]) -> list[int]:
        """Ends where the model has to write: at the begin of an answer, or in one that it did not end."""
        messages = _merged([*_system(self.system), *(Message(turn.role, turn.text) for turn in turns)])
        begun = messages.pop().content if messages and messages[-1].role == "assistant" else ""
        return [*self._encode(messages), *self.model.tokenizer.encode(begun)]

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        try:
            ((ids, _),) = self.model.tokenizer.chat.encode([messages], open=True)
        except ValueError as error:
            raise _refused(error) from None
        return ids

    def answer(self, line: str, write: Callable[[str], object]) -> Answer:
        """Appends `line` and the model's continuation, each piece of which goes to `write` as it comes.

        An empty line adds nothing: the model goes on where it stopped. Whatever ends the answer early, an interrupt
        or a `write` that fails, what was written until then is kept. Raises `UserError`, with the conversation as
        it was, if the line is not Unicode, if there is nothing to answer, or if the chat template refuses the turns.
        """
        self.model.encode(line)  # refuses it with the place inside the line
        turns = [*self.turns, Turn("user", line)] if line else self.turns
        if self.model.talks and not turns:
            raise UserError("there is nothing to answer yet", fix="write a line")
        ids, left_out = self.prompt(turns)
        self.turns, text, reason, cache = turns, "", "interrupted", self.model.new_cache()
        pieces = self.model.stream_ids(ids, self.max_tokens, self.seed + self._answers, self.sampler, cache)
        self._answers += 1
        start = time.perf_counter()
        try:
            while True:
                piece = next(pieces)
                text += piece
                write(piece)
        except StopIteration as end:
            reason = str(end.value)
        finally:
            # The token chosen last was never stored.
            tokens = cache.position - len(ids) + 1 if cache.position else 0
            seconds = time.perf_counter() - start
            answer = Answer(text, reason, len(ids), left_out, tokens, seconds, cache.entries)
            self.last = answer
            if text:
                self.turns = [*turns, Turn("assistant", text, self.model.step, reason)]
        return answer

    def messages(self) -> list[dict[str, Any]]:
        """The transcript, one plain JSON object a turn: role, content and, of answers, step and reason."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            origin = {} if turn.step is None else {"step": turn.step, "reason": turn.reason}
            messages.append({"role": turn.role, "content": turn.text, **origin})
        return messages

    def transcript(self) -> str:
        """The text as the model would read it, had it room for all."""
        if self.model.talks:
            turns = [*_system(self.system), *(Message(turn.role, turn.text) for turn in self.turns)]
            try:
                return self.model.tokenizer.chat.render(_merged(turns))
            except ValueError as error:
                raise _refused(error) from None
        return self._head + self.text

    @property
    def _head(self) -> str:
        return f"{self.system}\n" if self.system else ""


def _system(text: str) -> list[Message]:
    return [Message("system", text)] if text else []


def _refused(error: ValueError) -> UserError:
    return UserError(str(error), fix="/reset forgets the turns, /system without TEXT what stands before them")


def _merged(messages: Sequence[Message]) -> list[Message]:
    """An answer that the model was asked to go on with is one answer; lines without an answer between are one turn."""
    merged: list[Message] = []
    for message in messages:
        if merged and message.role == merged[-1].role:
            between = "" if message.role == "assistant" else "\n"
            merged[-1] = Message(message.role, merged[-1].content + between + message.content)
        else:
            merged.append(message)
    return merged


def _joined(turns: Sequence[Turn]) -> str:
    text = ""
    for turn in turns:
        begins = turn.role == "user" and text and not text.endswith("\n")
        text += "\n" * bool(begins) + turn.text
    return text
