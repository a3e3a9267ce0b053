"""Processes that are made to be killed, forked from one that has everything imported and no thread started.

Importing torch takes a second or two, forking a few milliseconds: so each attempt at a run is a real process of its own
at hardly any cost. Whoever forks here must not compute: a library's threads do not survive a fork.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

LONGEST = 300.0  # seconds: far more than any attempt takes; one that is not done by then hangs


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or the negative number of the signal that killed it; what it answered."""

    code: int
    seconds: float
    answer: Any

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


def fork(work: Callable[[], Any], log: Path, kill_after: float = LONGEST) -> Ended:
    """Does `work` in another process and waits for it, or sends it SIGKILL after so many seconds.

    `work` returns plain JSON values; what it prints is appended to `log`, and so is the traceback if it raises.
    """
    start = time.perf_counter()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _do(work, log, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        if not select.select([pipe], [], [], kill_after)[0]:  # it closes when the process ends, whatever the reason
            os.kill(pid, signal.SIGKILL)
        answer = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Ended(code, time.perf_counter() - start, json.loads(answer) if code == 0 else None)


def _do(work: Callable[[], Any], log: Path, answer: int) -> NoReturn:
    """The life of the forked process: nothing of the one it was forked from runs in it."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
            os.dup2(descriptor, target)
        said = json.dumps(work()).encode()
        while said:
            said = said[os.write(answer, said) :]
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def last_line(log: Path) -> str:
    """What a process said last before it died."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing was said")
