"""The supervisor: starts a command that trains, and starts it again when it dies, as long as that helps.

| the command ended with | what follows |
|---|---|
| 0 done, 2 user error, 3 stopped, 130 stopped at once, or by SIGTERM, SIGINT or SIGHUP | the same code |
| 1 a bug, 4 a hang, 5 out of memory, or by any other signal (the OOM killer, a bad address) | another start |

The same command again goes on with the run from its last good state. Starts are 1 s apart, then 2 s, 4 s … up to a
minute; after so many without a new checkpoint in between it gives up. Signals are passed on. A supervisor that is
killed cannot do that: its processes notice, save and stop (`lumina.run.watchdog`).
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from lumina.events import last_event
from lumina.run import supervised
from lumina.run.exit_codes import BUG, DONE, HANG, INTERRUPTED, OUT_OF_MEMORY, STOPPED, USER_ERROR
from lumina.run.folder import Run, write_json
from lumina.run.lock import is_held
from lumina.run.signals import SAVE, heard

PROGRAM = "lumina"
RESTARTS = 5
LOOK = 0.2  # seconds between two looks at the command
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the second start, and before any
ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # who sends one of these wants an end
MEANING = {
    BUG: "an error: its traceback is above",
    HANG: "a hang: its stacks are in the log",
    OUT_OF_MEMORY: "out of memory",
    -signal.SIGKILL: "as the system does when memory runs out",
}


class Supervisor:
    """Runs `command`, the arguments of `lumina` as a function of whether it has not begun yet.

    `run` is the run that it trains, if that is known before it says so. With several `processes` they are torchrun's.
    `say` is given a line for a person. `restarts` without a new checkpoint are too many.
    """

    def __init__(
        self,
        command: Callable[[bool], Sequence[str]],
        say: Callable[[str], None],
        run: Run | None = None,
        processes: int = 1,
        restarts: int = RESTARTS,
    ) -> None:
        self.command, self.say, self.run, self.processes, self.limit = command, say, run, processes, restarts
        self.child: subprocess.Popen[bytes] | None = None
        self.asked = 0  # the first signal that asked for an end
        self.restarts = self.vain = 0  # all, and those since the newest checkpoint
        self.attempt = run.next_attempt() if run else None  # that the command is to begin
        self.saved = self._saved_at()
        self.died: list[int | None] = []  # at which steps, since the newest checkpoint

    def supervise(self) -> int:
        """Runs the command until it is done, asked to stop, or beyond help. Returns its exit code, as shells count."""
        with tempfile.TemporaryDirectory(prefix="lumina-") as folder:
            self.folder = Path(folder)
            before = {number: signal.signal(number, self._pass_on) for number in heard()}
            try:
                return self._restart_until_it_ends()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _restart_until_it_ends(self) -> int:
        while True:
            began = time.time()
            code = self._start_and_wait()
            if self.asked or code in (DONE, USER_ERROR, STOPPED, INTERRUPTED) or -code in ASKED:
                return _as_shells_count(code)
            died = time.time()
            self._look_how_far()
            how = f"{_how(code)}{self._where()}"
            if self.vain >= self.limit:
                self._give_up(how)
                return _as_shells_count(code)
            pause = min(LONGEST_PAUSE, PAUSE * 2**self.vain)
            self.restarts, self.vain = self.restarts + 1, self.vain + 1
            self.say(f"! the run ended by {how}; restart {self.vain} of {self.limit} in {pause:g} s")
            if self._wait(pause) or self._wait_for_others():
                return STOPPED if self.saved else INTERRUPTED
            self._tell_why(code, max(0.0, died - max(began, self._saved_at())) + pause)

    # -- one start ------------------------------------------------------------------------------------------------

    def _start_and_wait(self) -> int:
        """The exit code of the command, negative if a signal ended it."""
        for path in self.folder.glob("exit-*"):
            path.unlink()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        arguments = [*(launcher if self.processes > 1 else []), "-m", PROGRAM, *self.command(self._first())]
        signal.signal(SAVE, signal.SIG_IGN)  # which the command inherits: before it listens, there is nothing to save
        self.child = subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | supervised.environment(self.folder) | {"PYTHONPATH": _python_path()},
            process_group=0,  # ctrl-C at a terminal is ours to pass on, once
        )
        signal.signal(SAVE, self._pass_on)
        while self.child.poll() is None:
            time.sleep(LOOK)
            self._learn_run()
            os.utime(self.folder)  # or whoever tidies temporary files would take a long run's folder away
        self._learn_run()
        code = self.child.returncode
        return code if self.processes == 1 or code <= 0 else self._code_of_processes()

    def _first(self) -> bool:
        """Whether the command has not begun yet what it is to begin: a run, or an attempt of one that was known."""
        if self.attempt is None or self.run is None:
            return self.run is None
        return self.run.next_attempt() == self.attempt

    def _code_of_processes(self) -> int:
        """What the processes themselves said: torchrun ends with 1 whatever they did, and ends all when one did."""
        said = {int(path.read_text()) for path in self.folder.glob("exit-*")}
        if self.asked and not said:
            return -self.asked
        return next((code for code in (USER_ERROR, STOPPED, INTERRUPTED, OUT_OF_MEMORY, HANG) if code in said), BUG)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Hands a signal to the command: to torchrun's processes themselves, for it would kill them after 30 s."""
        if number != SAVE:
            self.asked = self.asked or number
        if self.child is None or self.child.poll() is not None:
            return
        if self.processes == 1:
            self.child.send_signal(number)
            return
        workers = psutil.Process(self.child.pid).children()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(number)
        if not workers and number != SAVE:
            self.child.send_signal(signal.SIGTERM)

    def _wait(self, seconds: float) -> bool:
        """Waits, unless someone asks for an end: whether that happened."""
        end = time.monotonic() + seconds
        while not self.asked and time.monotonic() < end:
            time.sleep(min(LOOK, seconds))
        return bool(self.asked)

    def _wait_for_others(self) -> bool:
        """Waits until processes that outlived a launcher have let go of the run, for they save and stop; as `_wait`."""
        if self.run and is_held(self.run.lock):
            self.say("  the run is still in use: waiting for processes that outlived the one that started them")
            while not self.asked and is_held(self.run.lock):
                time.sleep(LOOK)
        return bool(self.asked)

    # -- how far it came ------------------------------------------------------------------------------------------

    def _learn_run(self) -> None:
        if self.run is None and (path := self.folder / "run").exists():
            self.run = Run(Path(path.read_text()))

    def _complete(self) -> list[Path]:
        found = self.run.checkpoints.glob("step-*/COMPLETE") if self.run else ()
        return [path for path in found if re.fullmatch(r"step-\d+", path.parent.name)]

    def _saved_at(self) -> float:
        """When the last checkpoint was published."""
        return max((path.stat().st_mtime for path in self._complete()), default=0.0)

    def _look_how_far(self) -> None:
        """Whether a checkpoint was published since, and where the command died."""
        saved = self._saved_at()
        if saved > self.saved:
            self.saved, self.vain, self.died = saved, 0, []
        last = last_event(self.run.event_log) if self.run else None
        self.died.append(last.get("step") if last else None)

    def _where(self) -> str:
        step = self.died[-1]
        return f" after step {step}" if step is not None else ""

    # -- what is said ---------------------------------------------------------------------------------------------

    def _tell_why(self, code: int, lost: float) -> None:
        """For the `incident` event of the next attempt."""
        why: dict[str, Any] = {"code": code if code > 0 else None, "signal": _signal(code) if code < 0 else None}
        write_json(self.folder / "restart.json", why | {"restarts": self.restarts, "seconds_lost": round(lost, 1)})

    def _give_up(self, how: str) -> None:
        times = "once" if self.vain == 0 else f"{self.vain + 1} times"
        self.say(f"error: the run ended {times} without a new checkpoint, at last by {how}")
        if len(self.died) > 1 and len({*self.died}) == 1 and self.died[0] is not None:
            self.say("  each time there: that is no accident, and no restart will get past it")
        if self.run:
            again = f"lumina resume {shlex.quote(str(self.run.path))}"
            self.say(f"  log: {self.run.log}\n  fix: mend what it and the lines above say, then: {again}")
        else:
            self.say("  fix: mend what it says above; it did not come as far as having a run folder")


def _python_path() -> str:
    """Finds this very package, whatever the working directory."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))


def _how(code: int) -> str:
    what = f"exit code {code}" if code > 0 else _signal(code)
    return f"{what} ({MEANING[code]})" if code in MEANING else what


def _signal(code: int) -> str:
    number = -code
    return signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"


def _as_shells_count(code: int) -> int:
    return code if code >= 0 else 128 - code
