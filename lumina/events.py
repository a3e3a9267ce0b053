"""The event log of a run: one JSON object a line, appended and flushed, never edited.

It is the only source of whatever shows a run. A line is `{"t": type, "v": 1, "attempt": k, "step": n, …}`.
Each resume or rollback begins attempt k+1, whose `run` event names the `parent_step` it went on from.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from lumina.errors import DiskRefused, UserError

Event = dict[str, Any]
Listener = Callable[[Event], None]

VERSION = 1
TYPES = (
    "run", "step", "moe", "mod", "probe", "eval", "checkpoint", "phase", "incident",
    "system", "sample", "forecast", "decision", "trial", "end",
)  # fmt: skip
RESERVED = frozenset({"t", "v", "attempt"})
FREE_TEXT = frozenset({"prompt", "text"})  # what a model or a person wrote: "nan" there is a word
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class EventWriter:
    """Appends the events of one attempt to `path` and hands each to every listener, in order.

    JSON has no NaN and no infinity: they are written as "nan", "inf" and "-inf", and read back as floats.
    """

    def __init__(self, path: Path, attempt: int, listeners: Sequence[Listener] = (), hold: bool = False) -> None:
        """With `hold`, lines that the disk refuses wait in memory, in order, until it takes them.

        Raises `DiskRefused` if the file cannot be opened.
        """
        self.path, self.attempt, self.listeners, self.hold = path, attempt, listeners, hold
        self._waiting = bytearray()  # what the disk has not taken, maybe from the middle of a line on
        self._refused = ""  # why the disk did not take something, the last time
        try:
            self._file = path.open("ab", buffering=0)
            torn = not _ends_with_newline(path)
        except OSError as error:
            raise self._refusal(error) from error
        if torn:  # an earlier process was killed in the middle of a line
            self._write(b"\n")

    def emit(self, type: str, /, step: int | None = None, **fields: Any) -> Event:
        """Writes one event and returns it, as a reader will get it.

        Raises `ValueError` for an unknown type or a reserved field name, and `TypeError` for anything but a
        plain JSON value: a tensor would make the writer wait for its device. Raises `DiskRefused` if the disk refuses;
        with `hold` an `incident` says so once.
        """
        event = self._event(type, step, fields)
        waited = bool(self._waiting)
        self._write(as_line(event).encode() + b"\n")
        self._hear(event)
        if self._waiting and not waited:
            self.emit("incident", step=step, kind="log refused", error=self._refused)
        return event

    def record(self, type: str, /, step: int | None = None, **fields: Any) -> Event:
        """`emit` for what must be known before it is done: returns when the disk has it, with `hold` too.

        Raises `DiskRefused` if it does not take it; the log is without it then, and nobody heard of it.
        """
        event = self._event(type, step, fields)
        line = as_line(event).encode() + b"\n"
        self._flush()  # what waits comes first
        size = os.fstat(self._file.fileno()).st_size
        self._waiting += line
        try:
            self._flush(sync=True)
        except DiskRefused:
            if len(self._waiting) < len(line):  # some of it is in the file
                os.ftruncate(self._file.fileno(), size)
            self._waiting.clear()
            raise
        self._hear(event)
        return event

    def _event(self, type: str, step: int | None, fields: dict[str, Any]) -> Event:
        if type not in TYPES:
            raise ValueError(f"unknown event type {type!r}; known: {', '.join(TYPES)}")
        if clash := RESERVED & fields.keys():
            raise ValueError(f"event {type!r}: {', '.join(sorted(clash))} cannot be a field")
        event: Event = {"t": type, "v": VERSION, "attempt": self.attempt}
        event |= fields if step is None else {"step": step, **fields}
        require_plain(event, f"event {type!r}")
        return event

    def _hear(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)

    def _write(self, line: bytes) -> None:
        """Appends a line after those that wait. Nothing is dropped of one that was written in part."""
        self._waiting += line
        try:
            self._flush()
        except DiskRefused:
            if not self.hold:
                raise

    def _flush(self, sync: bool = False) -> None:
        """Writes what waits; with `sync` it returns when the disk has that."""
        try:
            if self._refused or os.fstat(self._file.fileno()).st_nlink == 0:  # deleted, or of a disk that went away
                self._file.close()
                self._file = open(self.path, "ab", buffering=0, opener=_existing)  # noqa: SIM115 - until `close`
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
            if sync:
                os.fsync(self._file.fileno())
            self._refused = ""
        except OSError as error:
            refusal = self._refusal(error)
            self._refused = refusal.message
            raise refusal from error

    def _refusal(self, error: OSError) -> DiskRefused:
        again = f"lumina resume {shlex.quote(str(self.path.parent))}"
        fix = f"make the disk writable or free space on it, then: {again}"
        return DiskRefused(f"{self.path}: event not written: {error.strerror}", fix)

    def close(self) -> None:
        """Raises `DiskRefused`, which says how many, if lines are left that the disk does not take."""
        try:
            if self.hold and self._waiting:
                self._flush()
        except DiskRefused as error:
            lost = self._waiting.count(b"\n")
            raise DiskRefused(f"{error.message}; lines that waited for it are lost: {lost}", error.fix) from None
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except DiskRefused as error:
            if kind is None:
                raise
            self._hear(self._event("incident", None, {"kind": "log lost", "error": error.message}))


def _existing(path: str, flags: int) -> int:
    """Opens a log that is there: a new one would begin in the middle of a run."""
    return os.open(path, flags & ~os.O_CREAT)


def as_line(event: Event) -> str:
    """The event as its line in the log."""
    return json.dumps(_encode(event), allow_nan=False, separators=(",", ":"))


def read_events(path: Path) -> Iterator[Event]:
    """Every event of every attempt, in the order written; unknown types included.

    A killed process can tear its last line. So a line that is no event is passed over at the end of the log
    and where another attempt begins after it; anywhere else it raises `UserError` with its number.
    """
    attempt, torn = -1, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            event = parse(line)
            if event is None:
                torn = torn or number
                continue
            if torn and event["attempt"] <= attempt:
                raise UserError(
                    f"{path}:{torn}: not an event, and not the torn last line of an attempt",
                    fix="restore the log, or delete this line",
                )
            attempt, torn = event["attempt"], 0
            yield event


def last_event(path: Path) -> Event | None:
    """The last whole event, found from the end of the log; None if there is none."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a file, so no event log", fix="move it away; checkpoints are found without a log")
    lines = path.read_bytes().splitlines() if path.exists() else []
    return next((event for line in reversed(lines) if (event := parse(line)) is not None), None)


def merged(events: Iterable[Event]) -> list[Event]:
    """The one history that led to the present state, in the order written.

    An attempt that went on from `parent_step` undoes what earlier attempts did after that step; where two
    attempts tell the same thing (type and step), the later one counts. No incident is undone: it happened.
    """
    events = list(events)
    resumed = [(e["attempt"], e["parent_step"]) for e in events if e.get("parent_step") is not None]
    teller = {(e["t"], e["step"]): e["attempt"] for e in events if "step" in e}

    def holds(event: Event) -> bool:
        if "step" not in event or event["t"] == "incident":
            return True
        told_last = event["attempt"] == teller[event["t"], event["step"]]
        return told_last and not undone(event["attempt"], event["step"], resumed)

    return [event for event in events if holds(event)]


def undone(attempt: int, step: int, resumed: Iterable[tuple[int, int]]) -> bool:
    """Whether what an attempt did at a step is no part of the run: a later one began before it.

    `resumed` are the attempts that went on from an earlier one, each with the step it went on from.
    """
    return any(attempt < later and parent < step for later, parent in resumed)


def require_plain(value: Any, where: str) -> None:
    """Raises `TypeError`, naming the place, unless JSON gives `value` back with the same types and keys."""
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{where}: key {key!r} is not a string")
            require_plain(item, f"{where}, {key}")
    elif kind is list:
        for i, item in enumerate(value):
            require_plain(item, f"{where}[{i}]")
    elif kind not in (str, int, float, bool, type(None)):
        raise TypeError(f"{where}: {kind.__module__}.{kind.__qualname__} is not a plain JSON value")


def as_plain(value: Any) -> Any:
    """With floats that JSON cannot hold as in the log: "nan", "inf", "-inf"."""
    return _encode(value)


def _encode(value: Any) -> Any:
    """Floats that JSON cannot hold become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    return [_encode(item) for item in value] if isinstance(value, list) else value


def _decode(value: Any) -> Any:
    """The inverse of `_encode`, except in free text."""
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: item if key in FREE_TEXT else _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value


def parse(line: bytes) -> Event | None:
    """The event on this line, or None if it holds none. The torn beginning of one never parses."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return _decode(event) if isinstance(event, dict) and "attempt" in event else None


def _ends_with_newline(path: Path) -> bool:
    """Whether the last line is whole; an empty file has none that is not."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")
