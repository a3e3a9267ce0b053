"""What a signal asks of a run: to save and stop, or to save and go on.

| signal | who sends it | what it asks |
|---|---|---|
| SIGINT, SIGTERM | ctrl-C, `kill`, SLURM, Kubernetes, preemptible machines | save and stop; twice: stop at once |
| SIGHUP | a terminal that closes | save and stop, unless it is ignored (`nohup`) |
| SIGUSR2, SIGXCPU | SLURM with `--signal`, LSF; grid engines, a limit of processor time | save and stop |
| SIGUSR2 | this process, when the one that started it is gone (`lumina.run.supervised`) | save and stop |
| SIGUSR1 | whoever wants a checkpoint now | save and go on |

Only SIGINT and SIGTERM count for "twice": a cluster announces the end with one signal and means it with another, and a
limit of processor time says so every second; neither may break off the save that it asked for.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Self

from lumina.standard import complain

AT_ONCE = (signal.SIGINT, signal.SIGTERM)  # the second of these interrupts
STOP = (*AT_ONCE, signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU)
SAVE = signal.SIGUSR1

BASE = 256  # more than there are signals


class Requests:
    """Inside the block, signals are kept until `take` asks for them between two steps; the second SIGINT or SIGTERM
    raises `KeyboardInterrupt`.

    Python allows handlers in the main thread only: in another one this does nothing.
    """

    def __init__(self) -> None:
        self.stop = self.save = self.pressed = 0

    def __enter__(self) -> Self:
        numbers = heard() if _main_thread() else []
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def take(self) -> int:
        """What was asked since the last call, in one number, of which the largest of all processes counts: 0 for
        nothing, and stopping outranks saving, which it does too. `read` reads it."""
        save, self.save = self.save, 0
        return self.stop * BASE + save

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE:
            self.save = number
            return
        if number in AT_ONCE:
            if self.pressed:
                raise KeyboardInterrupt
            self.pressed = number
        if self.stop and number not in AT_ONCE:
            return
        self.stop = self.stop or number
        # A handler may run inside a print. On a terminal it takes the place of the status line.
        begin = "\r\x1b[K" if os.isatty(2) else "\n"
        if number in AT_ONCE:
            complain(f"{begin}stopping after this step; once more stops at once, without saving\n")
        else:
            complain(f"{begin}{signal.Signals(number).name}: saving after this step, then stopping\n")


def read(asked: int) -> tuple[str, str]:
    """The names of the signals in a number of `Requests.take`: which asked to stop, which to save; or empty."""
    stop, save = divmod(asked, BASE)
    return signal.Signals(stop).name if stop else "", signal.Signals(save).name if save else ""


def heard() -> list[signal.Signals]:
    """Those that ask something of this process: not SIGHUP where it is ignored, as `nohup` arranges."""
    deaf = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in (*STOP, SAVE) if not (deaf and number == signal.SIGHUP)]


class NothingToSave:
    """Inside the block, a request to save and go on is no reason to die: before and after training it asks nothing."""

    def __enter__(self) -> None:
        self._previous = signal.signal(SAVE, signal.SIG_IGN) if _main_thread() else None

    def __exit__(self, *_: object) -> None:
        if _main_thread():
            signal.signal(SAVE, self._previous)


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
