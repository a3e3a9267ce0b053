"""Standard output and standard error, which may lose their readers: `| head`, a terminal that closes, a full disk.

That is no reason to end work of hours, whose results are elsewhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


@contextmanager
def lasting(stream: TextIO) -> Iterator[None]:
    """What is written to `stream` inside the block may be refused: from then on it goes nowhere, which is said once."""
    try:
        yield
    except OSError as error:
        discard(stream)
        if stream is sys.stdout:
            with lasting(sys.stderr):
                why = f"! standard output: {error.strerror}; nothing more is written there, and the work goes on"
                print(why, file=sys.stderr, flush=True)


def discard(stream: TextIO) -> None:
    """From now on what is written to `stream` goes nowhere, what waits to be written too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def complain(line: str) -> None:
    """Says it on standard error past Python's buffers, as a signal handler or another thread may; or to nobody."""
    with suppress(OSError):
        os.write(2, line.encode())
