"""torchrun for the supervisor: it leaves signals to its processes, and says which one killed one of them.

    python -m lumina.run.launcher <options of torchrun>

A stop that is sent to every process (systemd, scancel, srun) reaches torchrun too. By itself it passes SIGTERM on and
kills, in the middle of a save, whoever is not done 30 s later; SIGUSR2 it does not know, and dies of it. Its processes
hear from the supervisor; when they have saved and ended, torchrun ends.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import psutil

from lumina.run.exit_codes import BUG, KILLED
from lumina.run.signals import SAVE, heard


def main() -> None:
    """Exits with 0, with 1 if a process did not end with 0, or as shells count if a signal killed one."""
    for number in heard():
        if number != SAVE:  # ignored from the start, by all
            signal.signal(number, _leave_to_processes)  # a function, for they would inherit that it is ignored
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(["--signals-to-handle", "SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        # torchrun sends SIGTERM to the others: who died of that was not the first.
        ends = ((each.timestamp, each.exitcode == -signal.SIGTERM, each.exitcode) for each in error.failures.values())
        _, _, code = min(ends)
        sys.exit(KILLED - code if code < 0 else BUG)


def _leave_to_processes(number: int, frame: FrameType | None) -> None:
    """As long as there is none, the signal is for torchrun itself."""
    if not psutil.Process().children():
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


if __name__ == "__main__":
    main()
