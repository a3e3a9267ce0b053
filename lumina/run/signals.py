"""Being asked to stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Inside the block, the first SIGINT or SIGTERM sets `requested` to its number; the second interrupts.

    Python allows handlers in the main thread only: in another one this does nothing.
    """

    def __init__(self) -> None:
        self.requested = 0

    def __enter__(self) -> Self:
        signals = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = number
        # `os.write`: a handler may run inside a print. On a terminal it takes the place of the status line.
        begin = b"\r\x1b[K" if os.isatty(2) else b"\n"
        os.write(2, begin + b"stopping after this step; once more stops at once, without saving\n")
