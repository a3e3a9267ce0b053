"""Where a session can go on from, and the ways back there: restore points in memory and on the disk.

A way back begins another attempt, and is known on the disk before a step is taken. Where it fails the run stands where
it stood, if memory had room for that; else the attempt ends.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lumina.checkpoint import store
from lumina.checkpoint.snapshot import Snapshot
from lumina.config import overlay
from lumina.config.overlay import SKIP, Overlay, added
from lumina.errors import UserError
from lumina.orchestrator.protocol import Decision
from lumina.planner.memory import RESTORE_POINTS
from lumina.run import lineage
from lumina.training import setup
from lumina.training.endings import LeftHalfway

if TYPE_CHECKING:
    from lumina.training.session import Session


@dataclass(frozen=True)
class Back:
    """Going back to `step`, to read what came after it again, or to leave out the batches of the steps `skip`.

    `skip` are the first and the last, or "all" since `step`.
    """

    step: int
    skip: tuple[int, int] | Literal["all"] | None = None


class WaysBack:
    """The restore points in memory of one session, and how it goes back to these and to checkpoints."""

    def __init__(self, session: Session) -> None:
        self.session, self.run, self.parts, self.world = session, session.run, session.parts, session.world
        self.course, self.state, self.saver = session.course, session.state, session.saver
        self.points: list[Snapshot] = []  # restore points in memory, the older first

    def take_point(self) -> Snapshot:
        """Makes this step a restore point in memory, in place of the older of two; its time is not training time."""
        with self.session.pausing():
            self.points = [point for point in self.points if _step(point) < self.state.progress.step]
            spare = self.points.pop(0) if len(self.points) == RESTORE_POINTS else None
            self.points.append(self.course.take(into=spare))
            self.points[-1].state["orchestrator"] = self.state.orchestrator()
        return self.points[-1]

    def begin(self, back: Back | None) -> list[tuple[Path, str]]:
        """Stands where the attempt begins; returns damaged checkpoints that were passed over, with the reason."""
        if self.state.attempt == 0:
            if back:
                raise UserError(f"{self.run.path}: has not begun, so there is nothing to go back to", "train it first")
            return []
        self.saver.recall()
        overlays = self._overlays()
        if back is None:
            skipped = self.saver.restore()
            self.state.overlays = self.state.overlays if overlays is None else overlays
            return skipped
        stood = self.world.decide(self._stood)
        if not back.step < stood:
            raise UserError(f"{self.run.path}: stands at step {stood}, not behind {back.step}", "name an earlier step")
        found = self.saver.find(back.step) if back.step else None
        self.state.overlays = self.saver.overlays() if overlays is None else overlays
        skip = (back.step + 1, stood) if back.skip == "all" else back.skip
        overlays = self._without(skip, back.step) if skip else self.state.overlays
        self._go_to(found)
        self.state.overlays = overlays
        return []

    def rollback(
        self,
        step: int,
        skip: tuple[int, int] | None = None,
        overlays: tuple[Overlay, ...] | None = None,
        why: Decision | None = None,
    ) -> None:
        """Goes back to the restore point of `step`, in memory or on disk, and begins another attempt there.

        The batches of steps `skip`, first and last, are quarantined; other `overlays` than those in force may be given.
        Raises `UserError`, with nothing done, if there is no such restore point, or the disk does not take the news.
        """
        if not step < self.state.progress.step:
            raise UserError(f"step {step}: the run is at step {self.state.progress.step}", "name an earlier step")
        with self.session.refusals():
            self.saver.finish()
        at_hand = next((point for point in self.points if _step(point) == step), None)
        found = at_hand or self.saver.find(step)
        overlays = self.state.overlays if overlays is None else overlays
        overlays = self._without(skip, step) if skip else overlays
        self.world.each(self.course.observe)
        before = self.state.attempt, self.state.overlays
        here = self._here() if self.points else None  # then there is room for another copy

        def move() -> None:
            self._go_to(found)

        def tell() -> None:  # known on the disk before a step is taken
            self._number(self.state.attempt + 1, overlays)
            self.session.announce("rollback", [], step, why)

        try:
            for work in (move, tell) if here else (tell, move):
                work()
        except Exception as error:
            if here is None and work is move:
                raise LeftHalfway(f"the way back to step {step} failed: {error}") from error
            self._number(*before)
            if here:
                self._stay(*here)
            raise
        self.state.overlays = overlays
        self.went_back(step)
        self.session.oversight.return_to(why)
        self.session.keep_ways_back()
        self.course.last = time.perf_counter()

    def _here(self) -> tuple[Snapshot, int | None, Any]:
        """Where the run stands, to stay there after all."""
        return self.course.take(), self.saver.saved_step, self.state.unpacked

    def _stay(self, point: Snapshot, saved: int | None, known: Any) -> None:
        self.course.return_to(point)
        self.saver.saved_step, self.state.unpacked = saved, known

    def _number(self, attempt: int, overlays: tuple[Overlay, ...]) -> None:
        """What is told from here on is of this attempt, over whose plan these overlays lie."""
        self.state.attempt, self.state.overlays = attempt, overlays
        if self.world.main:
            self.session.events.attempt = attempt

    def before(self, begin: int) -> int:
        """The newest restore point before step `begin`."""
        return max((step for step in self.known() if step < begin), default=begin - 1)

    def known(self) -> tuple[int, ...]:
        """The steps that it can go back to, on disk or in memory, ascending."""
        at_hand = [_step(point) for point in self.points]
        points = {*self.world.decide(self.saver.saved), *at_hand}
        return tuple(sorted(step for step in points if step < self.state.progress.step))

    def _go_to(self, point: Snapshot | store.Checkpoint | None) -> None:
        """Stands at a restore point; without one, at the start, where a session begins anyway."""
        self.course.last_eval, self.saver.saved_step = None, None
        if isinstance(point, Snapshot):
            self.course.return_to(point)
            self.state.unpacked = point.state["orchestrator"]
        elif point:
            self.saver.load(point)
        else:
            setup.load_origin(self.parts)

    def went_back(self, step: int) -> None:
        """The attempt that begins at `step` knows nothing of what came after it."""
        self.points = [point for point in self.points if _step(point) <= step]
        self.course.seen = self.course.looked = self.session.oversight.seen = None
        self.saver.lineage = self.saver.lineage.after(self.state.attempt, step)
        with self.session.refusals():
            self.world.decide(self.saver.link)

    def _without(self, skip: tuple[int, int], step: int) -> tuple[Overlay, ...]:
        """What lies over the plan, and a quarantine of what steps `skip` read or would have read, all after `step`."""
        first, last = skip
        if not step < first <= last:
            raise UserError(f"steps {first} to {last}: not after step {step}", "quarantine steps that are undone")
        overlays = self.state.overlays
        for block in self.parts.loader.blocks(first - 1, last - 1, overlay.skipped(overlays)):
            begin = block.at + 1
            id = f"{SKIP}@{begin}:{block.start}+{block.length}"
            overlays = added(overlays, Overlay(id, SKIP, [block.start, block.length], begin))
        return overlays

    def _overlays(self) -> tuple[Overlay, ...] | None:
        """What lies over the plan, as the log has it; None if the log does not say."""
        said = self.world.decide(lambda: lineage.overlays(self.run))
        return None if said is None else overlay.unpack(said, str(self.run.event_log))

    def _stood(self) -> int:
        """The last step that the run is known to have taken."""
        out = self.saver.abandoned()
        saved = [store.step_of(path) for path in store.checkpoints(self.run.checkpoints) if path not in out]
        told = [int(event["step"]) for event in self.run.events() if "step" in event]
        return max([0, *saved, *told])


def _step(point: Snapshot) -> int:
    step: int = point.state["progress"].step
    return step
