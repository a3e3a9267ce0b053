"""The watchdog: a process that shows no sign of life says where it stands and ends, instead of waiting for ever.

A sign of life is a step, or word of how far something long has come (`lumina.progress`): a batch evaluated, a
checkpoint saved or read back. How long the next may take is learned for each kind of work apart:

| kind of work | seconds without a sign | why |
|---|---|---|
| one of which fewer than three were measured | `FIRST` | compiling takes minutes, and a cold disk or cluster too |
| steps | 10 x their median, at least `FLOOR` | one slow step must not make all later hangs last longer |
| saving, reading, verifying | 10 x the longest, at least `FIRST` | a slow disk may let it wait that did not before |
| anything else | 10 x the longest, at least `FLOOR` | the words of one kind are not equally far apart |

Time in which the process itself was stopped (ctrl-Z, a paused container, a suspended machine) is not counted. A thread
of Python sees nothing while another holds the interpreter: past twice the limit, and `FIRST`, a thread of C writes the
stacks and ends the process with exit code 1. That one reads the clock alone: whoever is stopped for longer by a signal
that nobody can catch (SIGSTOP, a frozen cgroup) is ended by it when it goes on.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

from lumina.progress import Tell
from lumina.run import supervised
from lumina.run.exit_codes import HANG
from lumina.standard import complain

FLOOR = 60.0  # seconds
FIRST = 1800.0
LEAVING = 600.0  # to end, when all is done
FACTOR = 10
MEASURED = 3  # of a kind, before its limit is learned
REMEMBERED = 100  # of a kind
STEP, NEW = "a step", "a step of a new shape"
PATIENT = ("saving", "reading", "verifying")  # as what is told begins

Report = Callable[[dict[str, Any]], None]


class Watchdog:
    """Inside the block, a process without a sign of life writes all stacks to `log` and standard error, hands `report`
    the facts `{kind, seconds, doing, where}` and ends with exit code 4: what hangs cannot be unwound.

    `report` is called in another thread, while the first one may hold anything. The last three are for tests.
    """

    def __init__(
        self,
        log: Path,
        report: Report,
        *,
        floor: float = FLOOR,
        first: float = FIRST,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.log, self.report, self.leave = log, report, leave
        self.floor, self.first = floor, first
        self.pause = floor / 60  # between two looks
        self.doing, self.since, self.beats = "starting", time.monotonic(), 0
        self.step_seconds = 0.0
        self.seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self.watched, self.parent = threading.get_ident(), os.getppid()
        self.over = threading.Event()
        self.over.set()

    # -- signs of life --------------------------------------------------------------------------------------------

    def step(self, new: bool = False) -> None:
        """A step begins; a `new` one has shapes, or routers with a capacity, for which it may be compiled again."""
        self._beat(NEW if new else STEP)
        if self.step_seconds:
            self.seconds[STEP].append(self.step_seconds)
        self.step_seconds = 0.0

    def hear(self, tell: Tell) -> Tell:
        """`tell`, each word of which is a sign of life, but for those of other threads."""

        def told(what: str, done: int, total: int) -> None:
            if threading.get_ident() == self.watched:
                self._beat(STEP if done >= total else what.split(" step ")[0])
            tell(what, done, total)

        return told

    def _beat(self, next: str) -> None:
        """What was being done is done, or goes on; `next` is being done from now on."""
        now = time.monotonic()
        seconds, self.since, self.beats = now - self.since, now, self.beats + 1
        if self.doing == STEP:
            self.step_seconds += seconds  # what is evaluated and saved in between is no part of a step
        else:
            self.seconds[self.doing].append(seconds)
        changed, self.doing = next != self.doing, next
        if changed and not self.over.is_set():
            self._arm()

    # -- what is too long -----------------------------------------------------------------------------------------

    def limit(self) -> float:
        """Seconds that what is being done now may take until the next sign of life."""
        seconds = [*self.seconds[self.doing]]
        if len(seconds) < MEASURED:
            return self.first
        usual = statistics.median(seconds) if self.doing == STEP else max(seconds)
        return max(FACTOR * usual, self.first if self.doing.startswith(PATIENT) else self.floor)

    def __enter__(self) -> Self:
        self.watched, self.since = threading.get_ident(), time.monotonic()
        self._log: IO[bytes] = self.log.open("ab")
        self.over.clear()
        self._arm()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        main = threading.current_thread() is threading.main_thread()
        self._sleeps = main and signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL
        if self._sleeps:
            signal.signal(signal.SIGTSTP, self._sleep)
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._log.close()
        if self._sleeps:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)

    def _watch(self) -> None:
        seen, silence, last, asked = -1, 0.0, time.monotonic(), False
        while not self.over.wait(self.pause):
            now = time.monotonic()
            lived, last = min(now - last, 2 * self.pause), now  # more than that the process was stopped itself
            silence = silence + lived if self.beats == seen else 0.0
            if self.beats != seen and now - self.armed > self.limit() / 4:
                self._arm()
            seen = self.beats
            if not asked and supervised.abandoned(self.parent):
                asked = True
                os.kill(os.getpid(), supervised.LEFT_ALONE)
                complain("! whoever started this process is gone\n")
            if silence > self.limit():
                self._bite(silence)
                return

    def _bite(self, silence: float) -> None:
        where = _place(sys._current_frames().get(self.watched))
        said = f"! no sign of life for {silence:.0f} s in {self.doing}: {where}; the stacks of all threads:\n"
        try:
            complain(said)
            os.write(self._log.fileno(), said.encode())
            for file in (2, self._log.fileno()):
                faulthandler.dump_traceback(file=file)
            self.report({"kind": "hang", "seconds": round(silence, 1), "doing": self.doing, "where": where})
            supervised.tell_exit(HANG)
        finally:  # a disk that refuses, or hangs: the second line is armed
            self.leave(HANG)

    # -- the second line ------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        self.armed = time.monotonic()
        faulthandler.dump_traceback_later(max(2 * self.limit(), self.first), file=self._log, exit=True)

    def _sleep(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: the second line is called off, for it counts the time in which nobody lives."""
        faulthandler.cancel_dump_traceback_later()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # here the process stops, and from here it goes on
        signal.signal(number, self._sleep)
        self._arm()


def expect_exit(seconds: float = LEAVING) -> None:
    """From now on the process has this long to end; else it writes its stacks to standard error and is ended, with
    exit code 1. The work is done then, and all that was saved is on the disk."""
    faulthandler.dump_traceback_later(seconds, exit=True)


def _place(frame: FrameType | None) -> str:
    """Where a thread is: `function (file:line)` of its innermost frame, and of its innermost one in our own code."""
    if frame is None:
        return "the thread is gone"
    place, ours = _name(frame), frame
    while ours.f_back and "lumina" not in Path(ours.f_code.co_filename).parts:
        ours = ours.f_back
    return place if ours is frame else f"{place}, in {_name(ours)}"


def _name(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno})"
