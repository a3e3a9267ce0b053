"""Several processes of one world, forked from one that has everything imported: torch takes seconds to import.

`torchrun` itself starts the processes of one test and of the examples; what the others try is what is inside.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

LONGEST = 300.0  # seconds
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["lumina.training.trainer", "torch.distributed.fsdp", "torch.optim.adamw", "pytest"])


def several(size: int, work: Callable[..., None], *arguments: Any, folder: Path) -> list[int]:
    """Calls `work` in so many processes; their exit codes, a signal's negative. If one fails, the others are ended,
    by SIGQUIT.

    What they say is in `folder`/said-<rank>.txt.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    environment = dict(os.environ) | {name: str(value) for name, value in world.items()}
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        FORKING.Process(target=_live, args=(rank, environment, folder / f"said-{rank}.txt", work, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    _watch(processes)
    return [int(process.exitcode or 0) for process in processes]


def all_well(size: int, work: Callable[..., None], *arguments: Any, folder: Path) -> None:
    """The same, where none may fail."""
    codes = several(size, work, *arguments, folder=folder)
    assert codes == [0] * size, "\n".join((folder / f"said-{rank}.txt").read_text() for rank in range(size))


def _watch(processes: list[BaseProcess]) -> None:
    end, left = time.monotonic() + LONGEST, list(processes)
    while left:
        wait([process.sentinel for process in left], max(0.0, end - time.monotonic()))
        left = [process for process in left if process.exitcode is None]
        if left and (time.monotonic() > end or any(process.exitcode for process in processes)):
            for process in left:
                process.join(5)
                if process.exitcode is None and process.pid:
                    os.kill(process.pid, signal.SIGQUIT)  # no other test sends it: who ended so was ended from here
                process.join()
            return


def _live(rank: int, environment: dict[str, str], said: Path, work: Callable[..., None], arguments: Any) -> None:
    os.environ.clear()
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for target in (1, 2):
        os.dup2(output, target)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    try:
        work(*arguments)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
