"""Conversations to token ids: one Jinja template, stored with the tokenizer, used for training and for chatting.

The template is rendered once for each pattern of roles, with marks in the place of what was said: a skeleton. So the
text of a message never becomes a special token, whatever it says, and it is known to the character which part of a
conversation counts: what stands inside `{% generation %}` (as in transformers), or else each answer and the special
token behind it.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lumina.data.records import Message, Role
from lumina.errors import UserError

if TYPE_CHECKING:
    from jinja2.parser import Parser
    from jinja2.runtime import Context

    from lumina.data.tokenizer import Tokenizer

FILE_NAME = "chat_template.jinja"
# Each turn begins with its role's token; an answer ends with the token that also ends a document, so that a model of
# texts has learnt already what it means.
DEFAULT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
COUNTED, TURN = 1, 2  # bits of a token's mark: it is to be learnt; it begins a user's turn, where a cut may be made
_BEGIN, _END = "\ue000", "\ue001"  # private-use characters around what counts
# The place of message i, between two characters that are white space: they are missing if the template trims.
_PLACE = "\x1f\ue002{}\ue003\x1f"
_MARK = re.compile(f"(?P<edge>[{_BEGIN}{_END}])|(?P<left>\x1f?)\ue002(?P<said>\\d+)\ue003(?P<right>\x1f?)")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: what the model writes, marked if the rendering is for a skeleton."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: Context, caller: Any) -> str:
        inside = str(caller())
        return f"{_BEGIN}{inside}{_END}" if context.get("marking") else inside


@dataclass(frozen=True, slots=True)
class Part:
    """A special token, or (`id` -1) the text between two of them. Spans and places are in characters of it.

    `counted` spans are to be learnt; at the places of `turns` a user's turn begins.
    """

    text: str
    id: int = -1
    counted: tuple[tuple[int, int], ...] = ()
    turns: tuple[int, ...] = ()

    @property
    def uniform(self) -> bool:
        """All of its tokens count or none, and no turn begins inside."""
        return self.counted in ((), ((0, len(self.text)),)) and self.turns in ((), (0,))

    def stripped(self, left: bool, right: bool) -> Part:
        """Without the white space that a special token before or behind it takes to itself."""
        cut = len(self.text) - len(self.text.lstrip()) if left else 0
        text = self.text[cut:].rstrip() if right else self.text[cut:]
        places = {place: min(max(place - cut, 0), len(text)) for place in (*sum(self.counted, ()), *self.turns)}
        counted = tuple((places[a], places[b]) for a, b in self.counted if places[a] < places[b])
        return Part(text, self.id, counted, tuple(places[turn] for turn in self.turns))


class ChatTemplate:
    """How a tokenizer writes conversations. `stop_ids` end an answer."""

    def __init__(self, source: str, tokenizer: Tokenizer, names: Mapping[str, str]) -> None:
        """`names` are the special tokens that the template may name: bos_token and so on.

        Raises `UserError` for a template that is not Jinja, or gives an answer no end.
        """
        self.source, self._tokenizer = source, tokenizer
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        environment.globals |= {"raise_exception": _refuse, **names}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"the chat template is not Jinja: {error}", fix=f"mend {FILE_NAME}") from None
        self._skeleton = lru_cache(maxsize=4096)(self._make_skeleton)
        self.stop_ids = self._stop_ids()

    def render(self, messages: Sequence[Message], open: bool = False) -> str:
        """The conversation as text, as transformers renders it. `open` ends where an answer would begin.

        Raises `ValueError` if the template refuses it.
        """
        return self._render(messages, open, marking=False)

    def parts(self, messages: Sequence[Message], open: bool = False) -> list[Part]:
        """The conversation in special tokens and the texts between them.

        Raises `ValueError` if the template refuses it, or changes what was said by more than trimming it.
        """
        skeleton = self._skeleton(tuple(message.role for message in messages), open)
        if self.source != DEFAULT and skeleton.text(messages) != self.render(messages, open):
            raise ValueError("the chat template changes what is said; change the messages, or use another template")
        return list(skeleton.parts(messages))

    def encode(self, conversations: Sequence[Sequence[Message]], open: bool = False) -> list[tuple[list[int], bytes]]:
        """Ids and marks (a byte a token, `COUNTED` and `TURN`) of each conversation, in parallel.

        Raises `ValueError` as `parts` does.
        """
        split = [self.parts(messages, open) for messages in conversations]
        texts = [part for parts in split for part in parts if part.id < 0]
        uniform = iter(self._tokenizer.encode_batch([part.text for part in texts if part.uniform]))
        mixed = iter(self._tokenizer.encode_with_places([part.text for part in texts if not part.uniform]))
        encoded: list[tuple[list[int], bytes]] = []
        for parts in split:
            ids: list[int] = []
            marks = bytearray()
            for part in parts:
                if part.uniform:
                    new = [part.id] if part.id >= 0 else next(uniform)
                    own = bytearray([COUNTED if part.counted else 0]) * len(new)
                    if part.turns and new:
                        own[0] |= TURN
                else:
                    new, places = next(mixed)
                    own = _marks(part, places)
                ids += new
                marks += own
            encoded.append((ids, bytes(marks)))
        return encoded

    def _render(self, messages: Sequence[Message], open: bool, marking: bool) -> str:
        plain = [{"role": message.role, "content": message.content} for message in messages]
        try:
            given = {"messages": plain, "add_generation_prompt": open, "tools": None, "documents": None}
            return str(self._template.render(given, marking=marking))
        except Exception as error:  # a template is a program, and can fail as one
            raise ValueError(f"the chat template refuses it: {error}") from None

    def _make_skeleton(self, roles: tuple[Role, ...], open: bool) -> _Skeleton:
        places = [Message(role, _PLACE.format(i)) for i, role in enumerate(roles)]
        return _Skeleton(self._render(places, open, marking=True), roles, self._tokenizer)

    def _stop_ids(self) -> frozenset[int]:
        """The special tokens that count behind an answer."""
        try:
            stops = self._skeleton(("user", "assistant"), False).stops()
        except ValueError as error:
            raise UserError(f"the chat template writes no answer: {error}", fix=f"mend {FILE_NAME}") from None
        if not stops:
            fix = f"put a special token behind an answer in {FILE_NAME}, inside its generation block if it has one"
            raise UserError("the chat template gives an answer no end", fix)
        return stops


@dataclass(slots=True)
class _Piece:
    """Of a skeleton: a special token, literal text, or (`said`) the place of message number `said`.

    `left` and `right` are trimmed off the message.
    """

    literal: str = ""
    id: int = -1
    said: int = -1
    left: bool = False
    right: bool = False
    counted: bool = False
    turn: bool = False

    def text(self, messages: Sequence[Message]) -> str:
        if self.said < 0:
            return self.literal
        said = messages[self.said].content
        said = said.lstrip() if self.left else said
        return said.rstrip() if self.right else said


class _Skeleton:
    """What the template writes for some roles, whatever they say. Raises `ValueError` if it does not write it all."""

    def __init__(self, marked: str, roles: Sequence[Role], tokenizer: Tokenizer) -> None:
        self._roles, self._specials, self._strips = roles, tokenizer.specials, tokenizer.strips
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._pieces = list(self._split(marked))
        said = [(at, piece.said) for at, piece in enumerate(self._pieces) if piece.said >= 0]
        if [message for _, message in said] != list(range(len(roles))):
            raise ValueError("the chat template does not write each message once, in order")
        self._at = [at for at, _ in said]
        if _BEGIN not in marked:
            self._count_answers()
        self._mark_turns()

    def text(self, messages: Sequence[Message]) -> str:
        return "".join(piece.text(messages) for piece in self._pieces)

    def parts(self, messages: Sequence[Message]) -> Iterator[Part]:
        """Text between two special tokens is one text: tokens may reach over the border of what was said."""
        text, counted, turns = "", list[tuple[int, int]](), list[int]()
        strip = False
        for piece in [*self._pieces, None]:
            if piece is None or piece.id >= 0:
                strips = self._strips.get(piece.id, (False, False)) if piece else (False, False)
                part = Part(text, -1, tuple(counted), tuple(turns)).stripped(strip, strips[0])
                if part.text:
                    yield part
                text, counted, turns, strip = "", [], [], strips[1]
            if piece is None:
                return
            if piece.id >= 0:
                whole = ((0, len(piece.literal)),)
                yield Part(piece.literal, piece.id, whole if piece.counted else (), (0,) if piece.turn else ())
                continue
            own, begin = piece.text(messages), len(text)
            if piece.turn:
                turns.append(begin)
            if piece.counted and own:
                begin = counted.pop()[0] if counted and counted[-1][1] == begin else begin
                counted.append((begin, len(text) + len(own)))
            text += own

    def stops(self) -> frozenset[int]:
        """The special tokens that count behind the last message."""
        behind = self._pieces[self._at[-1] + 1 :]
        return frozenset(piece.id for piece in behind if piece.counted and piece.id >= 0)

    def _split(self, marked: str) -> Iterator[_Piece]:
        counted, start = False, 0
        for mark in _MARK.finditer(marked):
            yield from self._literals(marked[start : mark.start()], counted)
            start = mark.end()
            if mark["edge"]:
                counted = mark["edge"] == _BEGIN
            else:
                left, right = not mark["left"], not mark["right"]
                yield _Piece(said=int(mark["said"]), left=left, right=right, counted=counted)
        yield from self._literals(marked[start:], counted)

    def _literals(self, text: str, counted: bool) -> Iterator[_Piece]:
        start = 0
        for match in self._special.finditer(text):
            if match.start() > start:
                yield _Piece(text[start : match.start()], counted=counted)
            yield _Piece(match[0], id=self._specials[match[0]], counted=counted)
            start = match.end()
        if start < len(text):
            yield _Piece(text[start:], counted=counted)

    def _count_answers(self) -> None:
        """Without generation blocks: each answer and the first special token behind it."""
        for role, at, following in zip(self._roles, self._at, [*self._at[1:], None], strict=True):
            if role == "assistant":
                self._pieces[at].counted = True
                for piece in self._pieces[at + 1 : following]:
                    if piece.id >= 0:
                        piece.counted = True
                        break

    def _mark_turns(self) -> None:
        """A user's turn begins behind all that counts of the answer before, and the white space behind that."""
        for number in range(1, len(self._roles)):
            if (self._roles[number - 1], self._roles[number]) != ("assistant", "user"):
                continue
            between = self._pieces[self._at[number - 1] + 1 : self._at[number]]
            while any(piece.counted for piece in between):
                between.pop(0)
            solid = (piece for piece in between if piece.id >= 0 or piece.literal.strip())
            next(solid, self._pieces[self._at[number]]).turn = True


def _marks(part: Part, places: Sequence[tuple[int, int]]) -> bytearray:
    """Of a text's tokens, each made of the characters of its place: those that reach into a counted span count."""
    marks = bytearray(len(places))
    for begin, end in part.counted:
        first = bisect_right(places, begin, key=lambda place: place[1])
        behind = bisect_left(places, end, key=lambda place: place[0])
        marks[first:behind] = bytes([COUNTED]) * (behind - first)
    for turn in part.turns:
        first = bisect_left(places, turn, key=lambda place: place[0])
        if first < len(marks):
            marks[first] |= TURN
    return marks


def _refuse(message: str) -> None:
    raise TemplateError(message)
