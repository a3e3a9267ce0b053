"""One process at a time in a run folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

from lumina.errors import UserError

PATIENCE = 0.5  # seconds


class RunLock:
    """Holds a run until the block or the process ends, however it ends. `UserError` if another one holds it.

    The kernel keeps the lock (`flock`), so nothing is stale after a crash; the file only says who holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        self._file = self.path.open("a+")
        if not _take(self._file):
            holder = _describe(self.path)
            self._file.close()
            raise UserError(
                f"{self.path.parent}: in use by {holder}",
                fix="wait until it ends or stop it there with kill, or start another: lumina train … --fresh",
            )
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        return self

    def __exit__(self, *_: object) -> None:
        self._write("")
        self._file.close()  # releases; the file stays, for removing it would race with the next holder

    def _write(self, content: str) -> None:
        """Signs, past Python's buffer. A full disk takes no signature, but the lock holds all the same."""
        with suppress(OSError):
            os.ftruncate(self._file.fileno(), 0)
            os.write(self._file.fileno(), content.encode())


def is_held(path: Path) -> bool:
    """Whether a process holds the run now. Looking takes a shared lock for an instant, which `RunLock` waits out."""
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _take(file: IO[str]) -> bool:
    """Tries for half a second: who only looks (`is_held`) is gone by then."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)


def _describe(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, LookupError, TypeError):  # not signed yet, on a full disk, or by something else
        return "another process"
