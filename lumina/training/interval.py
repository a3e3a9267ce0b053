"""How often to save: `checkpoint.every=auto`, from what a save costs here and how often something fails.

A save every T seconds costs lost / T of the time, and a failure, every `mtbf` seconds, T / 2 on average. The sum is
least at T = sqrt(2 · mtbf · lost): Young, "A first order approximation to the optimum checkpoint interval", CACM
17(9), 1974; Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006,
whose further terms matter only where a save takes a notable part of `mtbf`. The cost is flat around its minimum: twice
or half the interval costs a quarter more.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lumina.checkpoint.places import disk
from lumina.checkpoint.writer import Way, Writer
from lumina.errors import UserError
from lumina.run.lock import RunLock
from lumina.training.machine import Choices

if TYPE_CHECKING:
    from lumina.training.setup import Parts

NAME, LOCK = ".trial-save-", "lock"  # of the folder beside the runs that is written once and deleted


def best_interval(lost: float, mtbf: float) -> float:
    """Seconds between saves that cost `lost` seconds each: Young's and Daly's sqrt(2 · mtbf · lost)."""
    return math.sqrt(2 * mtbf * lost)


@dataclass(frozen=True)
class Cost:
    """What a save takes here, in seconds: `lost` to training, and `lasts` until it was read back."""

    lost: float
    lasts: float


def choose(cost: Cost, step_time: float, mtbf: float, steps: int, eval_every: int) -> Choices:
    """`checkpoint.every` for a run of so many `steps`, from a save's `cost` and a step's time in seconds.

    A save that comes before the last was read back would wait for it. The interval is moved to a multiple or a divisor
    of `eval_every` that is near: only what is evaluated and saved can be best.
    """
    seconds = best_interval(cost.lost, mtbf)
    least = math.ceil(cost.lasts / step_time)
    exact = max(1, least, round(seconds / step_time))
    every = min(in_step_with(eval_every, exact, least) if eval_every < steps else exact, steps)
    moved = f", {exact} steps, moved to the evaluations" if every not in (exact, steps) else ""
    longer = ", longer than the run" if exact > steps else ""
    waits = f", but a save lasts {span(cost.lasts)}" if cost.lasts > seconds else ""
    sqrt = f"sqrt(2 x {span(mtbf)} x {span(cost.lost)}) = {span(seconds)}"
    begin = f"{sqrt}{waits} at {span(step_time)} a step{moved}{longer}"
    share, redone = cost.lost / (every * step_time + cost.lost), every * step_time / 2
    told = f"about {100 * share:.2g} % of the time goes into saving, a failure costs {span(redone)} on average"
    return {"checkpoint.every": (every, f"{begin}; {told}")}


def cheaper(costs: Mapping[Way, Cost]) -> Choices:
    """`checkpoint.write`, the way by which training loses least."""
    way = min(costs, key=lambda way: costs[way].lost)
    measured = " and ".join(f"{span(cost.lost)} {way}" for way, cost in costs.items())
    return {"checkpoint.write": (way, f"a save, measured beside steps, costs {measured}")}


def in_step_with(eval_every: int, steps: int, least: int) -> int:
    """The multiple or divisor of `eval_every` nearest to `steps`, unless it is further away than half of it.

    It is `least` at least, which `steps` are, too.
    """
    if not eval_every:
        return steps
    small = [n for n in range(1, math.isqrt(eval_every) + 1) if eval_every % n == 0]
    multiples = (max(1, times) * eval_every for times in (steps // eval_every, math.ceil(steps / eval_every)))
    near = [*small, *(eval_every // n for n in small), *multiples]
    best = min((n for n in near if n >= least), key=lambda n: abs(n - steps))
    return best if abs(best - steps) <= steps / 2 else steps


def span(seconds: float) -> str:
    """Seconds with three digits, or hours: 24h, 232s, 1.09s, 0.0163s."""
    return f"{seconds / 3600:g}h" if seconds >= 3600 and seconds % 360 == 0 else f"{float(f'{seconds:.3g}'):g}s"


def measure(
    parts: Parts, root: Path, ways: Sequence[Way], step: Callable[[], object], step_time: float
) -> dict[Way, Cost]:
    """What a save of this state costs in each of these ways, on the disk of `root`; nothing is left there.

    `step` takes a step beside it, of `step_time` seconds alone. Raises `DiskRefused` if a save cannot be tried.
    """
    return {way: _measure(parts, root, way, step, step_time) for way in ways}


def _measure(parts: Parts, root: Path, way: Way, step: Callable[[], object], step_time: float) -> Cost:
    """Of the second save: the first one takes the memory that all others use again."""
    world = parts.world
    with ExitStack() as stack:
        aside = world.decide(lambda: stack.enter_context(_trial_folder(root)))
        writer = stack.enter_context(Writer(aside, world, way))
        for number in (0, 1):
            steps, start = 0, time.perf_counter()
            writer.save(number, parts.model.tensors(), parts.optimizer.tensors(), {})
            while not (receipts := writer.poll()):
                step()
                steps += 1
            lasts = time.perf_counter() - start
    return Cost(max(receipts[0].stall, lasts - steps * step_time), lasts)


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
