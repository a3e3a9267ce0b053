"""A session: one attempt of a run, from where it stands to its last step or to a request to stop.

The course takes the steps; the session saves what is due, listens for signals, and leaves everything saved.
Everything a reader wants goes through one `EventWriter`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

from lumina.config.change import RESUME
from lumina.config.resolve import Resolved
from lumina.errors import DiskRefused
from lumina.events import EventWriter
from lumina.progress import Tell, silent
from lumina.run import signals, supervised
from lumina.run.folder import Run
from lumina.run.watchdog import Watchdog
from lumina.training import machine, room, setup
from lumina.training.course import Course
from lumina.training.saving import Saver

Listener = Callable[[dict[str, Any]], None]


class Session:
    """One attempt of a run: restores, steps to the end or to a stop request, and leaves everything saved."""

    def __init__(
        self,
        run: Run,
        resolved: Resolved,
        parts: setup.Parts,
        rate: float,
        listeners: Sequence[Listener],
        told: Tell,
        changed: dict[str, list[Any]] | None = None,
    ) -> None:
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
        recast = resolved.origins["precision.mode"] == RESUME
        self.saver = Saver(run, parts, self.course.state, self.told, recast)

    def train(self) -> None:
        """Runs the attempt. A signal that asks to stop saves and raises `Stopped`; see `lumina.run.signals`."""
        self.attempt = attempt = self.world.decide(self.run.next_attempt)
        hold = self.config.checkpoint.on_error == "continue"
        with ExitStack() as stack:
            stack.enter_context(self.watchdog)
            skipped = self.saver.restore() if attempt else []
            requests = stack.enter_context(signals.Requests())
            if self.world.main:
                self.events = stack.enter_context(EventWriter(self.run.event_log, attempt, self.listeners, hold))
            self._announce(skipped, attempt)
            self.course.begin()
            while self.course.state.progress.step < self.parts.steps:
                self._step()
                self._answer(self.world.max(requests.take()))
            self._finish()

    def _step(self) -> None:
        """The next step, and a checkpoint where one is due."""
        self.course.advance()
        step, every = self.course.state.progress.step, int(self.config.checkpoint.every)
        if step < self.parts.steps and every and step % every == 0:
            self._save()

    # -- saving, stopping ----------------------------------------------------------------------------------------------

    def _answer(self, asked: int) -> None:
        """Does what signals asked, of any process, since the last step."""
        stop, save = signals.read(asked)
        if stop:
            self._stop(stop)
        elif save:
            self._save(signal=save)

    def _save(self, last: bool = False, **why: str) -> None:
        """Saves this step, if that is not done; its time is not training time. After the `last` there is no other."""
        if self.saver.saved_step == self.course.state.progress.step:
            return
        start = time.perf_counter()
        try:
            receipt = self.saver.save(self.course.last_eval)
        except DiskRefused as error:
            self._not_saved(error, last or self.config.checkpoint.on_error == "stop")
        else:
            self._emit("checkpoint", step=receipt.step, seconds=round(receipt.seconds, 3), bytes=receipt.bytes, **why)
        self.course.last += time.perf_counter() - start

    def _not_saved(self, error: DiskRefused, ends: bool) -> None:
        """Tells that the disk refused a checkpoint; raises the error if that `ends` the attempt."""
        step = self.course.state.progress.step
        with suppress(DiskRefused) if ends else nullcontext():  # of the log: the first error is the one to mend
            self._emit("incident", step=step, kind="save refused", error=error.message, ends=ends)
            if ends:
                self._emit("end", step=step, reason="save refused")
        if ends:
            raise error

    def _stop(self, signal: str) -> None:
        """Saves where we are, then says how to go on."""
        self._save(last=True, signal=signal)
        self.course.observe()
        self._emit("end", step=self.course.state.progress.step, reason="stopped", signal=signal)
        raise Stopped(self.run, self.course.state.progress.step, signal)

    def _finish(self) -> None:
        """The last observation, evaluation and checkpoint."""
        self.course.evaluate()
        self._save(last=True)
        self.course.observe()
        self._emit("end", step=self.course.state.progress.step, reason="done")

    def _emit(self, type: str, /, **fields: Any) -> None:
        """Events are the main process's to write."""
        if self.world.main:
            self.events.emit(type, **fields)

    def _tell_hang(self, facts: dict[str, Any]) -> None:
        """Called in another thread: what hangs may hold the writer of the events, or be a listener."""
        with EventWriter(self.run.event_log, self.attempt) as events:
            events.emit("incident", step=self.course.state.progress.step, rank=self.world.rank, **facts)

    def _announce(self, skipped: Sequence[tuple[Path, str]], attempt: int) -> None:
        self._emit(
            "run",
            step=self.course.state.progress.step,
            path=str(self.run.path),
            preset=self.source,
            parent_step=self.course.state.progress.step if attempt else None,
            skipped_checkpoints=[[path.name, reason] for path, reason in skipped],
            loader_tok_s=round(self.parts.loader.throughput()),
            machine=machine.facts(self.config.parallel.device),
            matmul_flops=self.peak,
            choices=self.choices,
            changed=self.changed,
            disk=room.facts(self.config, self.run.checkpoints),
            **setup.description(self.parts),
        )
        if self.world.main and (why := supervised.restart()):
            self._emit("incident", step=self.course.state.progress.step, kind="restart", **why)


class Stopped(Exception):  # noqa: N818 - not an error: the run was asked to stop and saved itself
    """The run was stopped by a signal after saving its state at `step`."""

    def __init__(self, run: Run, step: int, signal: str) -> None:
        super().__init__(f"stopped by {signal} at step {step}; state saved")
        self.run, self.step, self.signal = run, step, signal
