"""The shapes in which texts and conversations come, each to a record: see `normalise`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from lumina.data.records import Message, Problems, Record, Role


class Item(NamedTuple):
    """A value where a record should be, or what is wrong with it."""

    where: str
    value: object


SHOWN_KEYS = 8  # of a record of no known format


CONVERSATIONS = ("messages", "conversations", "conversation")
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {  # the keys that each needs, in the order of precedence
    **{key: ((key,),) for key in CONVERSATIONS},
    "alpaca": (("instruction", "output"),),
    "prompt": (("prompt", "completion"), ("prompt", "response")),
    "text": (("text",),),
}
KEYS = {key for ways in FORMATS.values() for way in ways for key in way} | {"input", "system"}
ROLES: dict[str, Role] = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "ai", "model"), "assistant"),
}
_JSON_NAMES = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number",
    str: "a string", list: "an array", dict: "an object",
}  # fmt: skip


def normalised(items: Iterable[Item], problems: Problems) -> Iterator[Record]:
    """The good ones of a file's records, which have one format."""
    fixed = None
    for where, value in items:
        try:
            known = format_of(value) if isinstance(value, dict) else None
            if fixed and known and known != fixed:
                raise ValueError(f'is a record of format "{known}", but this file began with "{fixed}"')
            record = normalise(_object(value), where)
        except ValueError as error:
            problems.record(f"{where}: {error}")
            if problems.enough:
                return
        else:
            fixed = known
            yield record


def _object(value: object) -> dict[str, Any]:
    if isinstance(value, ValueError):
        raise value
    if not isinstance(value, dict):
        raise ValueError(f'must be an object such as {{"text": "…"}}, is {_kind(value)}')
    return value


def format_of(record: dict[str, Any]) -> str | None:
    """The name in `FORMATS` of the format that `record` has; keys that are null count if nothing else does."""
    return _format(tuple(record), tuple(key for key, value in record.items() if value is not None))


@lru_cache(maxsize=1024)  # the records of a file have the same keys
def _format(keys: tuple[str, ...], filled: tuple[str, ...]) -> str | None:
    for there in (filled, keys):
        for name, ways in FORMATS.items():
            if any(all(key in there for key in way) for way in ways):
                return name
    return None


def normalise(record: dict[str, Any], where: str) -> Record:
    """The record that this object means. Raises `ValueError` saying what is wrong with it.

    Known are `messages` of OpenAI, `conversations` of ShareGPT and `conversation`, which may spell the keys of a turn
    either way, role and content or from and value; `instruction`, `input` and `output` of Alpaca with or without
    `system`; `prompt` with `completion` or `response`; `text`.
    """
    known = format_of(record)
    if known is None:
        others = '"messages", "conversations", "conversation", "instruction" and "output", "prompt" and "completion"'
        raise ValueError(f'must have the key "text" or {others}; its keys: {_keys(record)}')
    if known == "text":
        return Record(where, text=_string(record, "text"))
    if known in CONVERSATIONS:
        return Record(where, messages=_messages(record[known], known), format=known)
    if known == "alpaca":
        question, answer = "instruction", "output"
        asked = [_string(record, question), _optional(record, "input")]
    else:
        question, answer = "prompt", _present(record, "completion", "response")
        asked = [_string(record, question)]
    system = _optional(record, "system") if known == "alpaca" else ""
    answered = _string(record, answer)
    if not answered.strip():
        raise ValueError(f'"{answer}" is empty, there is nothing to learn')
    user = Message("user", "\n\n".join(filter(None, asked)))
    begin = (Message("system", system),) if system else ()
    return Record(where, messages=(*begin, user, Message("assistant", answered)), format=known)


def _messages(turns: object, key: str) -> tuple[Message, ...]:
    if not isinstance(turns, list):
        raise ValueError(f'"{key}" must be an array of turns, is {_kind(turns)}')
    if not turns:
        raise ValueError(f'"{key}" is empty')
    messages = tuple(_turn(turn, f"{key}[{i}]") for i, turn in enumerate(turns))
    for i, (role, content) in enumerate(messages):
        if role == "system" and i > 0:
            raise ValueError(f"{key}[{i}]: a system turn that is not the first one")
        if role == "assistant" and not content.strip():
            raise ValueError(f"{key}[{i}]: the assistant's turn is empty")
    if all(role != "assistant" for role, _ in messages):
        raise ValueError(f'"{key}" has no assistant turn, there is nothing to learn')
    return messages


def _turn(turn: object, place: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{place} must be an object with role and content, is {_kind(turn)}")
    said = _string(turn, _present(turn, "role", "from", place=place), place)
    if said not in ROLES:
        known = ", ".join(dict.fromkeys(ROLES.values()))
        raise ValueError(f"{place}: unknown role {said[:40]!r}; known are {known}")
    key = _present(turn, "content", "value", place=place)
    content = turn[key]
    if not isinstance(content, list):
        return Message(ROLES[said], _string(turn, key, place))
    return Message(ROLES[said], "".join(_part(part, f"{place}.{key}[{i}]") for i, part in enumerate(content)))


def _part(part: object, place: str) -> str:
    """The text of a part of a turn, as OpenAI has them."""
    if not isinstance(part, dict):
        raise ValueError(f"{place} must be an object with type and text, is {_kind(part)}")
    if part.get("type") != "text":
        raise ValueError(f"{place}: a part of type {str(part.get('type'))[:40]!r}; only text can be learned")
    return _string(part, _present(part, "text", place=place), place)


def _present(record: dict[str, Any], *spellings: str, place: str = "") -> str:
    """The spelling of a key that `record` has, if possible one whose value is not null."""
    given = [key for key in spellings if key in record]
    if not given:
        raise ValueError(f'{place} has no "{spellings[0]}"; its keys: {_keys(record)}')
    return next((key for key in given if record[key] is not None), given[0])


def _optional(record: dict[str, Any], key: str) -> str:
    return "" if record.get(key) is None else _string(record, key)


def _string(record: dict[str, Any], key: str, place: str = "") -> str:
    text = record[key]
    name = f'{place}: "{key}"' if place else f'"{key}"'
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, is {_kind(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"{name} has half a surrogate pair, \\u{code:04x}, no character") from None
    return text


def _kind(value: object) -> str:
    return _JSON_NAMES.get(type(value), type(value).__name__)


def _keys(record: dict[str, Any]) -> str:
    """The first keys, each shortened and without signs that could steer a terminal."""
    names = [str(key)[:40] for key in list(record)[:SHOWN_KEYS]]
    shown = [name if name.isprintable() else ascii(name)[1:-1] for name in names]
    more = len(record) - SHOWN_KEYS
    return ", ".join([*shown, f"and {more} more"] if more > 0 else shown) or "none"
