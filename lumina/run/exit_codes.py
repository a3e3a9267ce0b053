"""What the process says when it ends."""

from __future__ import annotations

from typing import Final

DONE: Final = 0
BUG: Final = 1  # ours
USER_ERROR: Final = 2  # printed without a traceback
STOPPED: Final = 3  # by a signal, state saved
HANG: Final = 4  # no sign of life: stacks in log.txt
OUT_OF_MEMORY: Final = 5  # beyond repair
MACHINE_FAILED: Final = 6  # what training needs, as a disk or a network does; another start may get by
INTERRUPTED: Final = 130  # at once, by a second ctrl-C or before training: 128 + SIGINT, as shells count
KILLED: Final = 128  # and the number of the signal, as shells count
