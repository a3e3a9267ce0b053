"""The moments at which a run is killed: by the clock, or at one exact operation of one function.

A forked process wraps the functions of `PLACES`: the wrappers count their calls and the operations inside, note which
one runs right now where the parent can read it (shared memory, which outlives the process), and at the operation that
was drawn end the process with a real SIGKILL.
"""

from __future__ import annotations

import functools
import importlib
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, NoReturn


@dataclass(frozen=True)
class Place:
    """A function of a run. `counts`: what is an operation in it, any call or those that touch the disk."""

    name: str
    function: str  # dotted, as its caller finds it
    counts: Literal["calls", "disk"]


COMPUTING, SAVING = "computing", "staging"
SWEEPING, RESTORING, SETTING_ASIDE = "sweeping", "restoring", "setting aside"
# In the order in which they are drawn, so that few kills meet very different ones.
PLACES = (
    Place("writing", "lumina.checkpoint.phases.write", "disk"),
    Place(COMPUTING, "lumina.training.oom.Fitting.step", "calls"),
    Place("publishing", "lumina.checkpoint.phases.publish", "disk"),
    Place("sealing", "lumina.checkpoint.phases.seal", "disk"),
    Place("flushing", "lumina.checkpoint.phases.flush", "disk"),
    Place("telling", "lumina.events.EventWriter._write", "disk"),  # `_write(self, line)`: it can be torn
    Place(SAVING, "lumina.checkpoint.phases.stage", "calls"),
    Place("linking", "lumina.checkpoint.places.point", "disk"),
    Place("evaluating", "lumina.training.oom.evaluate", "calls"),
    Place("tidying", "lumina.checkpoint.retention.prune", "disk"),
    Place(SWEEPING, "lumina.checkpoint.retention.sweep", "disk"),
    Place(RESTORING, "lumina.training.saving.Saver.restore", "disk"),
    Place(SETTING_ASIDE, "lumina.checkpoint.places.set_aside", "disk"),
    Place("reading back", "lumina.checkpoint.writer.Save._read_back", "disk"),
)
INDEX = {place.name: i for i, place in enumerate(PLACES)}
DISK = ("posix", "_io", "safetensors")  # modules whose functions, and whose objects' methods, touch the disk


@dataclass(frozen=True)
class Instant:
    """Before (0), inside (the so-manieth operation) or after (-1) the `call`-th call of a place in an attempt."""

    place: Place
    call: int
    operation: int

    def __str__(self) -> str:
        when = {0: "before", -1: "after"}.get(self.operation, f"operation {self.operation} of")
        return f"{when} call {self.call}"


class Note:
    """What the attempt under way has done, in memory that is shared with the processes forked from here on."""

    def __init__(self) -> None:
        self._cells = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
        n = len(PLACES)
        self.active, self.calls, self.operations = (self._cells[i * n : (i + 1) * n] for i in range(3))
        self._begun, self._saving = 3 * n, 3 * n + 1

    def clear(self) -> None:
        """For the next attempt; how many operations a place has is known from the earlier ones."""
        for i in range(len(PLACES)):
            self.active[i] = self.calls[i] = 0
        self._cells[self._begun] = self._cells[self._saving] = 0

    def enter(self, i: int) -> int:
        """Notes that place `i` begins, and which call of it this is in the attempt, from 1."""
        self._cells[self._begun] = self._cells[self._begun] or time.monotonic_ns()
        if i == INDEX[SAVING]:
            self._cells[self._saving] = self.trained
        self.active[i] += 1
        self.calls[i] += 1
        return self.calls[i]

    def leave(self, i: int, operations: int) -> None:
        self.active[i] -= 1
        self.operations[i] = operations

    @property
    def begun(self) -> float:
        """When the first place was reached, on the clock of `time.monotonic`; 0 if none was."""
        return self._cells[self._begun] / 1e9

    @property
    def trained(self) -> int:
        """Steps of the attempt that were computed to their end."""
        return self.calls[INDEX[COMPUTING]] - self.active[INDEX[COMPUTING]]

    @property
    def saving_since(self) -> int:
        """`trained` when the last save began."""
        return self._cells[self._saving]

    def where(self) -> str:
        """What was being done."""
        found = [place.name for i, place in enumerate(PLACES) if self.active[i]]
        return " + ".join(found) or ("between" if self.begun else "preparing")


def arm(note: Note, instant: Instant | None = None) -> None:
    """Wraps every place in this process, which is killed when it comes to the instant."""
    for i, (place, (owner, name)) in enumerate(zip(PLACES, resolve(), strict=True)):
        target = instant if instant and instant.place == place else None
        setattr(owner, name, _watched(getattr(owner, name), i, note, target))


def resolve() -> list[tuple[Any, str]]:
    """The owner of each place's function and its name there. Raises `LookupError` for one that is gone."""
    found = []
    for place in PLACES:
        parts = place.function.split(".")
        split = next(i for i, part in enumerate(parts) if not part.islower() or i == len(parts) - 1)
        owner: Any = importlib.import_module(".".join(parts[:split]))
        for part in parts[split:-1]:
            owner = getattr(owner, part, None)
        if not callable(getattr(owner, parts[-1], None)):
            raise LookupError(f"{place.function} is gone; name in {__name__} where a run is {place.name} now")
        found.append((owner, parts[-1]))
    return found


def _watched(function: Callable[..., Any], i: int, note: Note, instant: Instant | None) -> Callable[..., Any]:
    @functools.wraps(function)
    def watched(*arguments: Any, **options: Any) -> Any:
        call = note.enter(i)
        here = instant if instant and instant.call == call else None
        if here and here.operation == 0:
            _die()
        if here and here.operation > 0 and PLACES[i].name == "telling":
            function(arguments[0], arguments[1][: len(arguments[1]) // 2])
            _die()
        outer, counter = sys.getprofile(), _Operations(PLACES[i].counts, here.operation if here else -1)
        sys.setprofile(counter)
        try:
            result = function(*arguments, **options)
        finally:
            sys.setprofile(outer)
            note.leave(i, counter.count)
        if here:
            _die()
        return result

    return watched


class _Operations:
    """A profiler that counts operations, and ends the process before the `last` one."""

    def __init__(self, counts: Literal["calls", "disk"], last: int) -> None:
        self.count, self.last, self.disk = 0, last, counts == "disk"

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != ("c_call" if self.disk else "call") or (self.disk and not _touches_disk(argument)):
            return
        self.count += 1
        if self.count == self.last:
            _die()


def _touches_disk(function: Any) -> bool:
    """Whether a built-in function, or a built-in method by its object, is one of `DISK`."""
    module = getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__
    return module.startswith(DISK) and function.__name__ != "fspath"


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process survived SIGKILL")
