"""Resuming verified: configurations shared out among worker processes, their kills and verdicts collected."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lumina.config.resolve import resolve
from lumina.verify import configurations
from lumina.verify.kills import Job
from lumina.verify.processes import last_line

WORKER = ("-c", "from lumina.verify.worker import main; main()")

Event = dict[str, Any]
Listener = Callable[[Event], None]


@dataclass
class Outcome:
    """What was asked for, and what is found so far."""

    preset: str
    seed: int
    wanted: int  # kills
    folder: str  # where the runs are; it stays if something failed
    jobs: list[Job]
    kills: list[Event] = field(default_factory=list)
    verdicts: list[Event] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        return len(self.verdicts) == len(self.jobs)

    @property
    def failed(self) -> list[Event]:
        return [verdict for verdict in self.verdicts if verdict["problems"]]


def plan(preset: str, kills: int, seed: int, configuration: str = "") -> Outcome:
    """So many kills, spread evenly over the covering array, or all in one configuration.

    With fewer kills than configurations only the first ones, which hold most pairs, are verified.
    Raises `UserError` for an unknown preset or configuration.
    """
    resolve(preset)
    array = list(configurations.array(preset))
    if configuration:
        configurations.named(preset, configuration)
    names = [configuration] if configuration else array[:kills]
    folder = str(Path(tempfile.gettempdir()) / f"lumina-verify-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    jobs = [
        Job(
            preset=preset,
            name=name,
            seed=seed,
            kills=len(range(i, kills, len(names))),
            turn=array.index(name) if name in array else 1,
            folder=folder,
        )
        for i, name in enumerate(names)
    ]
    return Outcome(preset, seed, kills, folder, jobs)


def verify(outcome: Outcome, workers: int, listen: Listener, worker: Sequence[str] = WORKER) -> None:
    """Fills `outcome`, also with what was found before an interruption; `listen` gets every kill and verdict.

    `worker` is what Python is started with in each worker process.
    """
    folder, start = Path(outcome.folder), time.perf_counter()
    folder.mkdir()
    jobs, events = iter(outcome.jobs), queue.SimpleQueue[Event]()
    try:
        with _started(min(workers, len(outcome.jobs)), worker, folder, jobs, events):
            while not outcome.complete:
                event = events.get()
                (outcome.kills if event["t"] == "kill" else outcome.verdicts).append(event)
                outcome.seconds = time.perf_counter() - start
                listen(event)
    finally:
        if not outcome.failed:
            shutil.rmtree(folder)


@contextmanager
def _started(
    count: int, worker: Sequence[str], folder: Path, jobs: Iterator[Job], events: queue.SimpleQueue[Event]
) -> Iterator[None]:
    """Worker processes, out of reach of ctrl-C, at work on `jobs`; in the end they and their children are killed."""
    own = {"LUMINA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pipe, lock = subprocess.PIPE, threading.Lock()
    with ExitStack() as stack:
        for i in range(count):
            log = folder / f"worker-{i + 1}.txt"
            command = [sys.executable, *worker]
            with log.open("w") as errors:
                process = subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, stderr=errors, env=os.environ | own, start_new_session=True
                )
            driver = threading.Thread(target=_drive, args=(process, log, jobs, lock, events), daemon=True)
            stack.callback(_end, process, driver)
            driver.start()
        yield


def _end(process: subprocess.Popen[bytes], driver: threading.Thread) -> None:
    """Kills a worker with its children; its driver ends for want of answers."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    driver.join()
    with suppress(BrokenPipeError), process:
        pass


def _drive(
    process: subprocess.Popen[bytes],
    log: Path,
    jobs: Iterator[Job],
    lock: threading.Lock,
    events: queue.SimpleQueue[Event],
) -> None:
    """Gives one worker a job after another, and passes on what it tells."""
    while True:
        with lock:
            job = next(jobs, None)
        if job is None:
            return
        for event in _answers(process, job):
            events.put(event)
            if event["t"] == "verdict":
                break
        else:
            died = {"t": "verdict", "configuration": job.name, "kills": 0, "rounds": 0, "seconds": 0.0}
            events.put(died | {"problems": [f"the worker process died: {last_line(log)}"]})


def _answers(process: subprocess.Popen[bytes], job: Job) -> Iterator[Event]:
    """What a worker tells of a job; nothing more if it dies."""
    assert process.stdin
    assert process.stdout
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        process.stdin.flush()
        yield from map(json.loads, process.stdout)
