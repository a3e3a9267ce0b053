"""A run on trial: what starting, stepping, evaluating and saving of a configuration take here, by doing them.

    lumina plan --measure -> a process of its own, which does all that a run does up to its first steps
        -> start | WARM + STEPS steps | evaluation | probe | save -> figures for the calibration

Nothing is left but the prepared data in the cache, where the run itself will find it.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from lumina.errors import UserError
from lumina.progress import Tell, silent
from lumina.run.exit_codes import DONE, USER_ERROR

if TYPE_CHECKING:
    from lumina.config.resolve import Resolved
    from lumina.training.course import Course
    from lumina.training.setup import Parts

WARM, STEPS = 3, 20
BLOCKS = 4  # of steps that follow one another, whose means tell how far slow ones come together
SPREAD = 3.18  # standard errors of a mean of 4 on each side: 95 % (Student's t of 3 degrees of freedom)
# What a machine drifts from its 20 steps to the steps of the run: 5.8 % (root mean square) over the five runs of
# benchmarks/planner/time.md, times Student's t of 5 degrees of freedom, 95 %.
DRIFT = 0.15
EVAL_BATCHES = 32  # evaluated at most; a held-out side of more is reckoned from them
STAGES = 7  # that are told

Figures = dict[str, float]


def measure_in_process(config: Path, progress: Tell = silent) -> Figures:
    """The figures of a YAML file's run, by `measure` in a fresh process, whose start counts as that of a run does.

    Raises `UserError` with what that process said if it could not.
    """
    command = [sys.executable, "-m", "lumina.training.trial", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        last = "{}"
        for line in process.stdout:
            last = line
            if "done" in (told := json.loads(line)):
                progress(told["what"], told["done"], STAGES)
    said: dict[str, Any] = json.loads(last)
    if "message" in said:
        raise UserError(said["message"], said["fix"])
    if process.returncode != DONE:
        raise UserError(
            f"timing a step ended with exit code {process.returncode}", "see above, and try it: lumina train"
        )
    return {str(name): float(value) for name, value in said.items()}


def measure(config: Path, tell: Callable[[str, int], None]) -> Figures:
    """Seconds of the parts of a run, bytes at its most, and this machine's matmul rates in FLOP/s."""
    from lumina.config.resolve import resolve
    from lumina.training import machine, setup
    from lumina.training.precision import DTYPES

    began = psutil.Process().create_time()
    resolved = resolve(config)
    tell("preparing the data", 0)
    begin = time.perf_counter()
    corpus = setup.load_data(resolved.config)
    prepared = 0.0 if corpus.facts.get("cached", True) else time.perf_counter() - begin
    if prepared:  # the run will find it in the cache, and so does this
        corpus = setup.load_data(resolved.config)
    tell("trying this machine", 1)
    settled, rate = setup.settle_all(resolved, corpus)
    parts = setup.build(settled.config, corpus)
    with (
        tempfile.TemporaryDirectory(prefix="lumina-trial-") as folder,
        _on_course(folder, settled, parts, rate) as course,
    ):
        tell("rehearsing the largest batch", 2)
        course.begin()
        start = time.time() - began - prepared
        tell("timing steps", 3)
        figures = _steps(course) | {"start": start, "compiled": float(settled.config.train.compile == "on")}
        tell("evaluating", 4)
        figures |= _looks(course, parts)
        tell("saving", 5)
        figures |= _save(parts, Path(folder))
    device, mode = settled.config.parallel.device, settled.config.precision.mode
    figures["memory"] = machine.memory_used(device)
    tell("timing products", 6)
    for name in {"fp32", mode.removesuffix("_pure")}:
        figures[f"matmul_{name}"] = machine.matmul_rate(device, DTYPES[name])
    return figures


@contextmanager
def _on_course(folder: str, settled: Resolved, parts: Parts, rate: float) -> Iterator[Course]:
    """What a session steps through, telling its events to a file."""
    from lumina.config.resolve import write
    from lumina.events import EventWriter
    from lumina.run.folder import Run
    from lumina.training.course import Course

    run = Run.create(Path(folder), "trial")
    write(settled, run.config)
    with EventWriter(run.event_log, 0) as events:

        def emit(type: str, /, **fields: Any) -> None:
            events.emit(type, **fields)

        yield Course(run, settled, parts, rate, emit, silent, lambda new: None)


def _steps(course: Course) -> Figures:
    """Mean seconds of a step, and between which those of a run lie (`spread`).

    The mean, not the median: a run's time is the sum of its steps, slow ones too. Of depth routing that still falls
    the steps are scaled to those of the capacity that it falls to.
    """
    from lumina.model.cost import count

    times, parts, model = [], course.parts, course.config.model
    least = count(model).flops_per_token
    for _ in range(WARM + STEPS):
        if course.state.progress.step == parts.steps:  # a short run is stepped through again
            course.observe()
            course.state.progress.step = 0
        course.step()
        capacity = parts.model.routers[0].capacity if parts.model.routers else None
        times.append(course.state.progress.step_seconds * least / count(model, capacity=capacity).flops_per_token)
    low, mean, high = spread(times[WARM:])
    return {"step": mean, "step_low": low, "step_high": high}


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The mean of these steps, and between which that of a run's steps lies with 95 %.

    Neighbours are slow together, so that what the mean is off by is told by the means of blocks; and the machine will
    not be as it was.
    """
    size, mean = len(seconds) // BLOCKS, statistics.fmean(seconds)
    means = [statistics.fmean(seconds[i * size : (i + 1) * size]) for i in range(BLOCKS)]
    off = SPREAD * statistics.stdev(means) / BLOCKS**0.5 / mean
    times = 1 + math.hypot(off, DRIFT)
    return mean / times, mean, mean * times


def _looks(course: Course, parts: Parts) -> Figures:
    """Seconds of an evaluation of all that is held out, and of a probe."""
    from lumina.training.evaluate import evaluate

    mod, seconds = parts.config.model.mod, 0.0
    for kind in parts.kinds:
        batches = parts.heldout(kind, course.state.progress.eval_tokens)
        some = [batches[i] for i in range(min(EVAL_BATCHES, len(batches)))]
        start = time.perf_counter()
        evaluate(parts.model, some, batches.text_bytes, parts.precision, mod.capacity if mod else None)
        seconds += (time.perf_counter() - start) * len(batches) / len(some)
    start = time.perf_counter()
    course.look()
    return {"evaluation": seconds, "probe": time.perf_counter() - start}


def _save(parts: Parts, folder: Path) -> Figures:
    """Seconds that steps wait for a save, and that the last one takes until it was read back."""
    from lumina.checkpoint.writer import Writer

    with Writer(folder, parts.world, parts.config.checkpoint.write) as writer:  # type: ignore[arg-type]
        start = time.perf_counter()
        writer.save(0, parts.model.tensors(), parts.optimizer.tensors(), {})
        stall = time.perf_counter() - start
        writer.finish()
    return {"save": stall, "end": time.perf_counter() - start - stall}


def main(config: str) -> int:
    """Prints a line of JSON for each stage, and the figures, or what was wrong, last."""
    from lumina.errors import Told

    def tell(what: str, done: int) -> None:
        print(json.dumps({"what": what, "done": done}), flush=True)

    try:
        print(json.dumps(measure(Path(config), tell)), flush=True)
    except Told as error:
        print(json.dumps({"message": error.message, "fix": error.fix}), flush=True)
        return USER_ERROR
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
