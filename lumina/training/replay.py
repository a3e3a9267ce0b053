"""A step taken again from the restore point before it: the machine, the data, or the state?

Megatron's rerun machine attributes faults so: what differs when it is computed again is hardware, what is equal is not;
and a loss that is high on this batch alone is the data's. The run is on trial meanwhile and stands afterwards, to the
bit, where it stood.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lumina.data.loader import Batch
from lumina.orchestrator.protocol import Replay
from lumina.training.course import Course
from lumina.training.step import METRICS

if TYPE_CHECKING:
    from lumina.training.session import Session

OTHERS = 3  # batches to compare with, evenly spread over the rest of the phase


def replay(session: Session) -> Replay | None:
    """See `orchestrator.protocol.Controls.replay`."""
    course, seen = session.course, session.oversight.seen
    points = [p for p in session.points if seen and p.state["progress"].step < seen.step]
    if seen is None or not points:
        return None
    left, last = time.perf_counter(), course.last
    here, emit, heard = course.take(), course.emit, (course.seen, course.looked)
    course.emit = lambda type, /, **fields: None
    try:
        with course.fitting.on_trial():
            course.return_to(points[-1])
            while course.state.progress.step < seen.step - 1:
                course.step()
                session.heed()
            course.observe()
            heldout = course.probe.heldout()
            others = tuple(_loss(course, batch) for batch in _others(course, seen.step))
            course.step()
            assert course.state.pending
            again = dict(zip(METRICS, course.state.pending.read(), strict=False))
    finally:
        course.return_to(here)
        course.emit, (course.seen, course.looked) = emit, heard
        course.last = last + time.perf_counter() - left
    loss = again["nats"] / again["count"]
    same = str((loss, again["grad_norm"])) == str((seen.loss, seen.grad_norm))  # as texts, for NaN equals no NaN
    return Replay(seen.step, seen.loss, loss, same, others, heldout)


def _others(course: Course, step: int) -> list[Batch]:
    """Batches of the same phase, far from that of `step`."""
    phase = next(phase for phase in reversed(course.parts.phases) if step > phase.begin)
    length, at = phase.end - phase.begin, step - 1 - phase.begin
    places = {(at + i * length // (OTHERS + 1)) % length for i in range(1, OTHERS + 1)} - {at}
    return [course.parts.loader.batch(phase.begin + place) for place in sorted(places)]


def _loss(course: Course, batch: Batch) -> float:
    """Of the weights as they are, as training computes it; the gradients are thrown away."""
    sums = course.fitting.loss(batch, course.state.progress.step + 1)
    nats, _, count, _ = course.parts.world.sum(sums).tolist()
    loss: float = nats / count
    return loss
