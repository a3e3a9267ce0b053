"""A session: one attempt of a run, from where it stands to its last step or to a request to stop.

The course takes the steps; the session saves what is due, listens for signals, and leaves everything saved.
Everything a reader wants goes through one `EventWriter`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from lumina.config import overlay
from lumina.config.change import RESUME
from lumina.config.resolve import Resolved
from lumina.errors import DiskRefused
from lumina.events import EventWriter
from lumina.orchestrator.protocol import Decision
from lumina.progress import Tell, silent
from lumina.run import signals, supervised
from lumina.run.folder import Run
from lumina.run.watchdog import Watchdog
from lumina.training import machine, oom, room, setup
from lumina.training.course import Course
from lumina.training.endings import Interrupted, Stopped
from lumina.training.experience import Experience
from lumina.training.forecasting import Forecaster
from lumina.training.hand import Hand
from lumina.training.oversight import Oversight
from lumina.training.saving import Saver
from lumina.training.ways_back import Back, WaysBack

Listener = Callable[[dict[str, Any]], None]


class Session:
    """One sitting of a run: restores, steps to the end or to a stop request, and leaves everything saved.

    It is one attempt, and another each time that it goes back.
    """

    def __init__(
        self,
        run: Run,
        resolved: Resolved,
        parts: setup.Parts,
        rate: float,
        listeners: Sequence[Listener],
        told: Tell,
        changed: dict[str, list[Any]] | None = None,
        apart: bool = False,
    ) -> None:
        """`apart`: something is done to it from outside, so it teaches other runs nothing, and is taught nothing."""
        self.run, self.config, self.parts, self.listeners = run, parts.config, parts, listeners
        self.world, self.watchdog = parts.world, Watchdog(run.log, self._tell_hang)
        self.told = self.watchdog.hear(told if parts.world.main else silent)
        self.source, self.changed = resolved.source, changed or {}
        self.choices = {
            key: origin.removeprefix("resolved: ")
            for key, origin in resolved.origins.items()
            if origin.startswith("resolved: ")
        }
        self.peak = rate * self.world.size  # FLOP/s of square matmuls, of all processes: what MFU is measured against
        self.course = Course(run, resolved, parts, self.peak, self._emit, self.told, self.watchdog.step)
        self.state = self.course.state
        self.forecaster = Forecaster(run, parts, rate, self._emit, apart)
        self.experience = Experience(run, self.config, self._emit)
        recast = resolved.origins["precision.mode"] == RESUME
        self.saver = Saver(run, parts, self.state, self.told, self._emit, recast)
        self.ways = WaysBack(self)
        self.hand = Hand(self)
        self.began = machine.work_began()
        self.ending = ""  # who asked to stop, if not a signal
        self.oversight = Oversight(self)

    def train(self, back: Back | None = None) -> None:
        """Trains to the end, from where the run stands or goes `back` to.

        A signal that asks to stop saves and raises `Stopped`; see `lumina.run.signals`. Raises `UserError` if the run
        cannot go on from there, `DiskRefused` if the disk does not take what it has to, and `OutOfMemory`.
        """
        self.state.attempt = self.world.decide(self.run.next_attempt)
        with ExitStack() as stack:
            stack.enter_context(self.watchdog)
            skipped = self.ways.begin(back)
            if self.changed:  # by now it is certain that the attempt begins
                self.world.decide(lambda: oom.rewrite(self.run, self.course.fitting.resolved))
            self.requests = stack.enter_context(signals.Requests())
            self.world.decide(lambda: self._open_log(stack))
            stack.enter_context(self.saver.writer)
            self.announce("rollback" if back else "resume" if self.state.attempt else "start", skipped)
            if back:
                self.ways.went_back(back.step)
            self.keep_ways_back()
            self._tell_restart()
            if self.state.attempt:
                with self.refusals():  # where no save comes, at the end of a run, none would tidy either
                    self.saver.tidy()
            self.course.begin()
            with suppress(Interrupted):
                self.oversight.begin()
            self._take_point_if_due(every=1)  # what goes wrong before the next is taken again from here
            self._heed_requests()  # since the run was left
            while self.state.progress.step < self.course.steps:
                with suppress(Interrupted):
                    self._step()
                self._heed_requests()
            self._finish()

    def _open_log(self, stack: ExitStack) -> None:
        hold = self.config.checkpoint.on_error == "continue"
        listeners: list[Listener] = [*self.listeners, self.forecaster, self.oversight.hear, self.experience]
        writer = EventWriter(self.run.event_log, self.state.attempt, listeners, hold)
        self.events = stack.enter_context(writer)

    def _step(self) -> None:
        """The next step, what whoever watches makes of it, and the restore points that are due."""
        attempt = self.state.attempt
        if any(one.begin == self.state.progress.step + 1 for one in self.state.overlays):
            self.keep_ways_back()
        self.course.seen = self.course.looked = None
        self.course.advance()
        with self.pausing(), self.refusals():
            self.saver.poll(self.state.progress.step_seconds)
        self.oversight.after_step()
        step, every = self.state.progress.step, int(self.config.checkpoint.every)
        if self.state.attempt > attempt or step == self.course.steps:
            return
        if every and step % every == 0:
            self._save()
        self._take_point_if_due(int(self.config.orchestrator.snapshot_every))

    def _take_point_if_due(self, every: int) -> None:
        wanted = self.oversight.watching and self.config.orchestrator.snapshot_every
        if wanted and self.state.progress.step % every == 0 and self.oversight.calm():
            self.ways.take_point()

    # -- saving, stopping ----------------------------------------------------------------------------------------------

    def _heed_requests(self) -> None:
        """Does what signals asked, of any process, since the last step, and then people, and what was decided."""
        self._answer(self.world.max(2 * self.requests.take() + self.hand.waiting()))
        if self.ending:
            self._stop(self.ending)

    def _answer(self, asked: int) -> None:
        """`asked` is twice the number of the signals, and 1 more if something is in the inbox."""
        stop, save = signals.read(asked // 2)
        if stop:
            self._stop(stop)
        elif save:
            self._save(signal=save)
        if asked % 2:
            self.hand.obey()

    def _save(self, last: bool = False, **why: str) -> None:
        """Begins to save this step, if that is not done; its time is not training time. After the `last` comes none."""
        if self.saver.saved_step == self.state.progress.step:
            return
        with self.pausing():
            with self.refusals():  # that of the save before is no reason not to try this one
                self.saver.finish()
            with self.refusals(last):
                self.saver.save(self.course.last_eval, **why)

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """The time of the block is not training time."""
        start = time.perf_counter()
        yield
        self.course.last += time.perf_counter() - start

    @contextmanager
    def refusals(self, last: bool = False) -> Iterator[None]:
        """What the disk refuses inside the block is told; it ends the attempt, if the user wants that or it is the
        `last` save."""
        try:
            yield
        except DiskRefused as error:
            step, ends = self.state.progress.step, last or self.config.checkpoint.on_error == "stop"
            with suppress(DiskRefused) if ends else nullcontext():  # of the log: the first error is the one to mend
                self._emit("incident", step=step, kind="save refused", error=error.message, ends=ends)
                if ends:
                    self._emit("end", step=step, reason="save refused")
            if ends:
                raise

    def secure(self, again: bool = False) -> None:
        """Puts the run as it stands on the disk, `again` if it is there. Raises `UserError` if that did not last."""
        if again:
            self.saver.saved_step = None
        self._save()
        with self.pausing():
            self.saver.finish()
        self.saver.require_saved()

    def keep_ways_back(self, ahead: int = 1) -> None:
        """Keeps on the disk what an undo of each overlay goes back to, and for their sake nothing else.

        Those that begin later than in the next `ahead` steps need nothing yet: they are undone by leaving them out.
        """
        step = self.state.progress.step
        if any(step < one.begin <= step + ahead for one in self.state.overlays):
            self._save()
        with self.pausing(), self.refusals():
            self.world.decide(lambda: self.saver.keep_ways_back(ahead))

    def _settle(self) -> None:
        """Waits until the last save has lasted."""
        with self.refusals(last=True):
            self.saver.finish()
        self.saver.require_saved()

    def _stop(self, signal: str) -> None:
        """Saves where we are, then says how to go on."""
        self._save(last=True, signal=signal)
        self._settle()
        self.course.observe()
        self._emit("end", step=self.state.progress.step, reason="stopped", signal=signal)
        raise Stopped(self.run, self.state.progress.step, signal)

    def _finish(self) -> None:
        """The last observation, evaluation and checkpoint."""
        self.course.evaluate()
        if not self.saver.judged:  # a signal or an action saved this step before it was evaluated
            self.saver.saved_step = None
        self._save(last=True)
        self._settle()
        self.course.observe()
        if self.world.main:
            self.forecaster.keep()
        self._emit("end", step=self.state.progress.step, reason="done")

    def _emit(self, type: str, /, **fields: Any) -> None:
        """Events are the main process's to write."""
        if type == "end":
            fields["at"] = round(time.time(), 3)
        if self.world.main:
            self.events.emit(type, **fields)

    def tell(self, type: str, /, **fields: Any) -> None:
        """Tells something of this step."""
        self._emit(type, step=self.state.progress.step, **fields)

    def record(self, type: str, /, **fields: Any) -> None:
        """Tells what must be known before it is done; returns when the disk knows it.

        Raises `DiskRefused` in all processes if the main one's does not take it; the log is without it then.
        """
        self.world.decide(lambda: self.events.record(type, **fields))

    def _tell_hang(self, facts: dict[str, Any]) -> None:
        """Called in another thread: what hangs may hold the writer of the events, or be a listener."""
        with EventWriter(self.run.event_log, self.state.attempt) as events:
            events.emit("incident", step=self.state.progress.step, rank=self.world.rank, **facts)

    def _tell_restart(self) -> None:
        if self.world.main and (why := supervised.restart()):
            self._emit("incident", step=self.state.progress.step, kind="restart", **why)

    def heed(self) -> None:
        """Raises `Interrupted` if the run was asked to stop: for what may be left at any step."""
        if self.world.max(self.requests.stop):
            raise Interrupted

    def announce(
        self, reason: str, skipped: Sequence[tuple[Path, str]], step: int | None = None, why: Decision | None = None
    ) -> None:
        """Tells that an attempt begins at `step`, by default where the state is; returns when the disk knows it.

        Raises `DiskRefused` in all processes if the main one's does not take it; the log is without it then.
        """
        step = self.state.progress.step if step is None else step

        def tell() -> None:
            self.events.record(
                "run",
                step=step,
                reason=reason,
                why=why.fields() if why else None,
                overlays=overlay.pack(self.state.overlays),
                ends=self.course.steps,
                path=str(self.run.path),
                at=round(time.time(), 3),  # from here to `end` is how long the attempt took
                began=self.began,
                preset=self.source,
                parent_step=step if self.state.attempt else None,
                skipped_checkpoints=[[path.name, reason] for path, reason in skipped],
                loader_tok_s=round(self.parts.loader.throughput()),
                machine=machine.facts(self.config.parallel.device),
                matmul_flops=self.peak,
                choices=self.choices,
                changed=self.changed,
                disk=room.facts(self.config, self.run.checkpoints, len({one.begin for one in self.state.overlays})),
                **setup.description(self.parts),
            )

        self.world.decide(tell)
