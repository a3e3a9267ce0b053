"""How often to save: `checkpoint.every=auto`, from what a save costs here and how often something fails.

A save every T seconds costs stall / T of the time, and a failure, every `mtbf` seconds, T / 2 on average. The sum is
least at T = sqrt(2 · mtbf · stall): Young, "A first order approximation to the optimum checkpoint interval", CACM
17(9), 1974; Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006,
whose further terms matter only where a save takes a notable part of `mtbf`. The cost is flat around its minimum: twice
or half the interval costs a quarter more.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lumina.checkpoint.places import disk
from lumina.checkpoint.writer import Way, Writer
from lumina.errors import UserError
from lumina.run.lock import RunLock
from lumina.training.machine import Choices

if TYPE_CHECKING:
    from lumina.training.setup import Parts

NAME, LOCK = ".trial-save-", "lock"  # of the folder beside the runs that is written once and deleted


def best_interval(stall: float, mtbf: float) -> float:
    """Seconds between saves: Young's and Daly's sqrt(2 · mtbf · stall)."""
    return math.sqrt(2 * mtbf * stall)


def choose(stall: float, step_time: float, mtbf: float, steps: int, eval_every: int) -> Choices:
    """`checkpoint.every` for a run of so many `steps`, from a save's `stall` and a step's time in seconds.

    It is moved to a multiple or a divisor of `eval_every` that is near: only what is evaluated and saved can be best.
    """
    seconds = best_interval(stall, mtbf)
    exact = max(1, round(seconds / step_time))
    every = min(in_step_with(eval_every, exact) if eval_every < steps else exact, steps)
    moved = f", {exact} steps, moved to the evaluations" if every not in (exact, steps) else ""
    longer = ", longer than the run" if exact > steps else ""
    begin = f"sqrt(2 x {span(mtbf)} x {span(stall)}) = {span(seconds)} at {span(step_time)} a step{moved}{longer}"
    share, lost = stall / (every * step_time + stall), every * step_time / 2
    told = f"about {100 * share:.2g} % of the time goes into saving, a failure costs {span(lost)} on average"
    return {"checkpoint.every": (every, f"{begin}; {told}")}


def in_step_with(eval_every: int, steps: int) -> int:
    """The multiple or divisor of `eval_every` nearest to `steps`, unless it is further away than half of it."""
    if not eval_every:
        return steps
    small = [n for n in range(1, math.isqrt(eval_every) + 1) if eval_every % n == 0]
    near = [*small, *(eval_every // n for n in small), max(1, round(steps / eval_every)) * eval_every]
    best = min(near, key=lambda n: abs(n - steps))
    return best if abs(best - steps) <= steps / 2 else steps


def span(seconds: float) -> str:
    """Seconds with three digits, or hours: 24h, 232s, 1.09s, 0.0163s."""
    return f"{seconds / 3600:g}h" if seconds >= 3600 and seconds % 360 == 0 else f"{float(f'{seconds:.3g}'):g}s"


def measure_stall(parts: Parts, root: Path) -> float:
    """Seconds that training waits for a save of this state, on the disk of `root`; nothing is left there.

    Raises `DiskRefused` if a save cannot be tried.
    """
    world = parts.world
    with ExitStack() as stack:
        aside = world.decide(lambda: stack.enter_context(_trial_folder(root)))
        writer = stack.enter_context(Writer(aside, world, cast("Way", parts.config.checkpoint.write)))
        writer.save(0, parts.model.tensors(), parts.optimizer.tensors(), {})
        writer.finish()
        (receipt,) = writer.poll()
    return receipt.stall


@contextmanager
def _trial_folder(root: Path) -> Iterator[Path]:
    """A folder on the disk of `root`, which need not be there yet: locked inside the block, gone after it.

    What killed processes left goes first, also beside a `root` that was made since. Raises `DiskRefused`.
    """
    parent = next(path for path in (root.absolute(), *root.absolute().parents) if path.is_dir())
    for left in (*parent.glob(f"{NAME}*"), *parent.parent.glob(f"{NAME}*")):
        with suppress(UserError, OSError), RunLock(left / LOCK):  # who is alive holds it
            shutil.rmtree(left)
    with ExitStack() as held:
        with disk(f"{parent}: a save cannot be tried here"):
            while (path := _own_folder(parent, held)) is None:
                pass
        held.callback(shutil.rmtree, path, ignore_errors=True)
        yield path


def _own_folder(parent: Path, held: ExitStack) -> Path | None:
    """A new folder and its lock, unless another start took it for a leftover before it was locked."""
    path = Path(tempfile.mkdtemp(prefix=NAME, dir=parent))
    with suppress(UserError, FileNotFoundError):
        held.enter_context(RunLock(path / LOCK))
        if (path / LOCK).exists():
            return path
    return None
