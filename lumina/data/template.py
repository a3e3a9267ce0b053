"""Conversations to token ids: one Jinja template, stored with the tokenizer, used for training and for chatting.

The template is rendered once for each pattern of roles, with marks in the place of what was said. So the text of a
message never becomes a special token, whatever it says, and it is known to the character which part of a conversation
counts: what stands inside `{% generation %}` (as in transformers), or else each answer and the special token behind it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lumina.data.records import Message
from lumina.errors import UserError

if TYPE_CHECKING:
    from jinja2.parser import Parser

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
_SAID = re.compile("\ue000(\\d+)\ue001")  # private-use characters: the place of message i
_BEGIN, _END = "\ue002", "\ue003"  # of what counts
_MARKS = re.compile("[\ue000-\ue003]")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: what the model writes. Marked while a skeleton is made."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        inside = str(caller())
        return f"{_BEGIN}{inside}{_END}" if self.environment.globals["marking"] else inside


@dataclass(frozen=True, slots=True)
class Part:
    """A special token (`id`), or (`id` -1) text between two of them, of which some characters count.

    `turn`: a user's turn begins here.
    """

    text: str = ""
    id: int = -1
    counted: tuple[tuple[int, int], ...] = ()
    turn: bool = False


@dataclass(slots=True)
class _Piece:
    """Of a skeleton: a special token, literal text, or (`said`) the place of message number `said`."""

    text: str = ""
    id: int = -1
    said: int = -1
    counted: bool = False
    turn: bool = False


class ChatTemplate:
    """How a tokenizer writes conversations. `stop_ids` end an answer."""

    def __init__(self, source: str, tokenizer: Tokenizer, bos: str, eos: str) -> None:
        """Raises `UserError` for a template that is not Jinja, or gives an answer no end."""
        self.source, self._tokenizer = source, tokenizer
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self._environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        self._environment.globals |= {"raise_exception": _refuse, "marking": False, "bos_token": bos, "eos_token": eos}
        try:
            self._template = self._environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"the chat template is not Jinja: {error}", fix=f"mend {FILE_NAME}") from None
        specials = sorted(tokenizer.specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        self._skeleton = lru_cache(maxsize=4096)(self._make_skeleton)
        self.stop_ids = self._stop_ids()

    def render(self, messages: Sequence[Message], open: bool = False) -> str:
        """The conversation as text, as transformers renders it. `open` ends where an answer would begin."""
        rendered = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(self._template.render(messages=rendered, add_generation_prompt=open))
        except Exception as error:  # a template is a program of somebody else and raises what it likes
            raise ValueError(f"the chat template refuses it: {error}") from None

    def parts(self, messages: Sequence[Message], open: bool = False) -> list[Part]:
        """The conversation in special tokens and the texts between them.

        Raises `ValueError` if the template refuses it, or changes what was said.
        """
        pieces = self._skeleton(tuple(message.role for message in messages), open)
        if self.source != DEFAULT:
            self._check_unchanged(pieces, messages, open)
        return list(_joined(pieces, messages))

    def encode(self, conversations: Sequence[Sequence[Message]], open: bool = False) -> list[tuple[list[int], bytes]]:
        """Ids and marks (a byte a token, `COUNTED` and `TURN`) of each conversation, in parallel."""
        split = [self.parts(messages, open) for messages in conversations]
        texts = iter(self._tokenizer.encode_batch([p.text for parts in split for p in parts if p.id < 0]))
        return [self._put_together(parts, texts) for parts in split]

    def _put_together(self, parts: list[Part], texts: Iterator[list[int]]) -> tuple[list[int], bytes]:
        ids: list[int] = []
        marks = bytearray()
        for part in parts:
            new = [part.id] if part.id >= 0 else next(texts)
            if not new:
                continue
            whole = part.id >= 0 or part.counted == ((0, len(part.text)),)
            if part.counted and not whole:
                new, own = self._mixed(part)
            else:
                own = bytearray([COUNTED if part.counted else 0]) * len(new)
            own[0] |= TURN if part.turn else 0
            ids += new
            marks += own
        return ids, bytes(marks)

    def _mixed(self, part: Part) -> tuple[list[int], bytearray]:
        """Ids and marks of a text of which a part counts: tokens that begin in it."""
        ids, begins = self._tokenizer.encode_with_places(part.text)
        return ids, bytearray(any(start <= b < stop for start, stop in part.counted) for b in begins)

    def _make_skeleton(self, roles: tuple[Any, ...], open: bool) -> list[_Piece]:
        marked = [Message(role, f"\ue000{i}\ue001") for i, role in enumerate(roles)]
        self._environment.globals["marking"] = True
        try:
            text = self.render(marked, open)
        finally:
            self._environment.globals["marking"] = False
        said = [int(i) for i in _SAID.findall(text)]
        if said != list(range(len(roles))):
            raise ValueError("the chat template does not write each message once, in order")
        explicit = _BEGIN in text
        pieces = list(self._pieces(text))
        _mark_turns(pieces, roles)
        if not explicit:
            _mark_answers(pieces, roles)
        return pieces

    def _pieces(self, text: str) -> Iterator[_Piece]:
        counted = False
        for token in re.split(f"({_SAID.pattern.replace('(', '(?:')}|[{_BEGIN}{_END}])", text):
            if token in (_BEGIN, _END):
                counted = token == _BEGIN
            elif match := _SAID.fullmatch(token):
                yield _Piece(said=int(match[1]), counted=counted)
            else:
                yield from self._literal(token, counted)

    def _literal(self, text: str, counted: bool) -> Iterator[_Piece]:
        start = 0
        for match in self._special.finditer(text):
            if match.start() > start:
                yield _Piece(text[start : match.start()], counted=counted)
            yield _Piece(match[0], id=self._tokenizer.specials[match[0]], counted=counted)
            start = match.end()
        if start < len(text):
            yield _Piece(text[start:], counted=counted)

    def _check_unchanged(self, pieces: list[_Piece], messages: Sequence[Message], open: bool) -> None:
        """A template may look at what was said (and trim it, say); then training would not be what it renders."""
        ours = "".join(messages[piece.said].content if piece.said >= 0 else piece.text for piece in pieces)
        if ours != self.render(messages, open):
            raise ValueError("the chat template changes what is said; trim the messages, or use another template")

    def _stop_ids(self) -> frozenset[int]:
        """The special tokens that count: an answer's last."""
        try:
            pieces = self._skeleton(("user", "assistant"), False)
        except ValueError as error:
            raise UserError(f"the chat template writes no answer: {error}", fix=f"mend {FILE_NAME}") from None
        stops = frozenset(piece.id for piece in pieces if piece.counted and piece.id >= 0)
        if not stops:
            fix = f"put a special token behind an answer in {FILE_NAME}, inside its generation block if it has one"
            raise UserError("the chat template gives an answer no end", fix)
        return stops


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _mark_turns(pieces: list[_Piece], roles: Sequence[str]) -> None:
    """A user's turn begins with the special token before it, if that is not the one before an earlier turn."""
    last = -1
    for at, piece in enumerate(pieces):
        if piece.said < 0:
            continue
        if roles[piece.said] == "user" and piece.said and roles[piece.said - 1] == "assistant":
            begins = [i for i in range(last + 1, at) if pieces[i].id >= 0 and not pieces[i].counted]
            pieces[begins[-1] if begins else at].turn = True
        last = at


def _mark_answers(pieces: list[_Piece], roles: Sequence[str]) -> None:
    """Without generation blocks: each answer and the first special token behind it."""
    for at, piece in enumerate(pieces):
        if piece.said >= 0 and roles[piece.said] == "assistant":
            piece.counted = True
            for later in pieces[at + 1 :]:
                if later.said >= 0:
                    break
                if later.id >= 0:
                    later.counted = True
                    break


def _joined(pieces: list[_Piece], messages: Sequence[Message]) -> Iterator[Part]:
    """Text between two special tokens is one text: tokens may reach over the border of what was said."""
    text, counted, turn = "", [], False
    for piece in [*pieces, _Piece(id=0)]:
        if piece.id < 0:
            own = messages[piece.said].content if piece.said >= 0 else piece.text
            if piece.counted and own:
                counted.append((len(text), len(text) + len(own)))
            text, turn = text + own, turn or piece.turn
            continue
        if text:
            yield Part(text, counted=_merged(counted), turn=turn)
        if piece.text:
            yield Part(id=piece.id, counted=((0, 1),) if piece.counted else (), turn=piece.turn)
        text, counted, turn = "", [], False


def _merged(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)
