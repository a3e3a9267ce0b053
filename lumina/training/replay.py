"""A step taken again from the restore point before it: the machine, the data, or the state?

Megatron's rerun machine attributes faults so: what differs when it is computed again is hardware, what is equal is not;
and a loss that is high on this batch alone is the data's. The run is on trial meanwhile and stands afterwards, to the
bit, where it stood.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lumina.checkpoint.snapshot import Snapshot
from lumina.config.overlay import skipped
from lumina.data.loader import Batch
from lumina.errors import OutOfMemory
from lumina.orchestrator.protocol import Observation, Replay
from lumina.training.course import Course
from lumina.training.step import METRICS

if TYPE_CHECKING:
    from lumina.training.session import Session

OTHERS = 3  # batches to compare with, evenly spread
APART = 0.3  # nats above them, from which on it is asked how many of the batches that follow are as bad
NOISE = 0.01  # of the loss, our choice: less is the same, where a device does not give the same bits
FARTHEST = 4096  # batches; a search takes 2 log2 of them


def replay(session: Session, before: int) -> Replay | None:
    """See `orchestrator.protocol.Controls.replay`."""
    seen = session.oversight.seen
    points = [p for p in session.ways.points if seen and p.state["progress"].step < min(before, seen.step)]
    if seen is None or not points:
        return None
    try:
        return _again(session, seen, points[-1])
    except OutOfMemory:  # it takes a copy more than training; of several processes the others would wait
        if session.world.size > 1:
            raise
        return None


def _again(session: Session, seen: Observation, point: Snapshot) -> Replay:
    course = session.course
    left, last = time.perf_counter(), course.last
    here, emit, heard = course.take(), course.emit, (course.seen, course.looked)
    course.emit = lambda type, /, **fields: None
    try:
        with course.fitting.on_trial():
            course.return_to(point)
            begin = course.state.progress.step
            batches = _others(course, seen.step, begin)
            then = _compared(session, seen.step, batches)
            while course.state.progress.step < seen.step - 1:
                course.step()
                session.heed()
            course.observe()
            heldout = course.probe.heldout()
            now = then if begin == seen.step - 1 else _compared(session, seen.step, batches)
            course.step()
            assert course.state.pending
            again = dict(zip(METRICS, course.state.pending.read(), strict=False))
    finally:
        course.return_to(here)
        course.emit, (course.seen, course.looked) = emit, heard
        course.last = last + time.perf_counter() - left
    loss = again["nats"] / again["count"]
    exact = session.config.parallel.device == "cpu" or session.config.train.deterministic
    same = str((loss, again["grad_norm"])) == str((seen.loss, seen.grad_norm))  # as texts, for NaN equals no NaN
    same = same or (not exact and abs(loss - seen.loss) <= NOISE * abs(seen.loss))
    return Replay(
        seen.step, seen.loss, loss, same, heldout, exact,
        ahead=max(then, now, key=lambda one: (math.isfinite(one.loss), one.gap)).ahead,
        others=now.others, before=then.loss, others_before=then.others,
    )  # fmt: skip


def _others(course: Course, step: int, before: int) -> list[Batch]:
    """Batches of the same phase as that of `step`: of those read up to step `before`, which trained well, or, where
    these are too few, of the whole phase."""
    phase = next(phase for phase in reversed(course.phases) if step > phase.begin)
    first, last = (phase.begin, before) if before - phase.begin >= OTHERS else (phase.begin, phase.end)
    rest = [i for i in range(first, last) if i != step - 1]
    places = sorted({rest[(2 * i + 1) * len(rest) // (2 * OTHERS)] for i in range(OTHERS)} if rest else ())
    return [course.parts.loader.batch(i, skipped(course.state.overlays)) for i in places]


class _Compared(NamedTuple):
    """A step's batch beside others, as the same weights find them; losses in nats."""

    loss: float
    others: tuple[float, ...]
    ahead: int

    @property
    def gap(self) -> float:
        return _gap(self.loss, self.others)


def _gap(loss: float, others: Sequence[float]) -> float:
    """How much worse it is than the worst of the others: as much as can be if it is not finite, and minus infinity if
    they do not say."""
    if not others or not all(map(math.isfinite, others)):
        return -math.inf
    return (loss if math.isfinite(loss) else sys.float_info.max) - max(others)


def _compared(session: Session, step: int, batches: Sequence[Batch]) -> _Compared:
    others = tuple(_loss(session, batch) for batch in batches)
    loss = _of_step(session, step)
    return _Compared(loss, others, _ahead(session, step, loss, others))


def _ahead(session: Session, step: int, loss: float, others: Sequence[float]) -> int:
    """How many batches after that of `step`, which costs `loss`, cost as much: doubled until one does not, then halved.

    As much as it is more than half the way from the worst of `others` to it; two in a row that do not end the block.
    """
    gap = _gap(loss, others)
    if not gap > APART:
        return 0
    most = min(FARTHEST, session.parts.loader.phase_end(step - 1) - step)

    def bad(ahead: int) -> bool:
        last = min(ahead + 1, most)
        return any(_gap(_of_step(session, step + n), others) > gap / 2 for n in range(ahead, last + 1))

    low, high = 0, 1  # the block reaches as far as `low`, and not as far as `high`
    while high <= most and bad(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bad(middle) else (low, middle)
    return low


def _of_step(session: Session, step: int) -> float:
    """The loss of the weights as they are on the batch of `step`."""
    return _loss(session, session.parts.loader.batch(step - 1, skipped(session.state.overlays)))


def _loss(session: Session, batch: Batch) -> float:
    """Of the weights as they are, as training computes it; the gradients are thrown away. It takes as long as a step,
    and may be left like one."""
    course = session.course
    course.beat(False)
    session.heed()
    step = course.state.progress.step + 1
    sums = course.fitting.loss(batch, step, course.plan(course.values(step)))
    nats, _, count, _ = session.world.sum(sums).tolist()
    loss: float = nats / count
    return loss
