"""Leaving a run on trial: arms from one place, each with overlays of its own, and back to the bit.

An arm goes some steps, then a probe: a few steps of linear decay to 0 and a causal evaluation. Without the decay every
cut of the learning rate would win (short-horizon bias: Wu et al. 2018, 1803.02021). Its events go to a file of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lumina.checkpoint.places import disk
from lumina.checkpoint.snapshot import Snapshot
from lumina.config.overlay import Overlay, added, check
from lumina.errors import DiskRefused, OutOfMemory, UserError
from lumina.events import EventWriter
from lumina.orchestrator.protocol import ENDPOINT, FEWEST, Heard, Outcome
from lumina.training import oom
from lumina.training.course import Course
from lumina.training.evaluate import Evaluation


@dataclass
class _Held:
    """The end of an arm's steps, before its probe, and what was told until then."""

    end: Snapshot
    events: list[tuple[str, dict[str, Any]]]
    overlays: tuple[Overlay, ...]
    heard: list[Heard]


class Arms:
    """The place where a run is left; inside the block arms begin and end there. See `orchestrator.protocol.Fork`."""

    def __init__(
        self,
        course: Course,
        folder: Path,
        step_seconds: float,
        worth: int,
        between: Callable[[], None],
        require: Callable[[Overlay], None],
    ) -> None:
        """`step_seconds` is what a step counts, `worth` the steps of which evaluations may take a share; `between` is
        called after each step of an arm, and may end it; `require` raises `UserError` for an overlay that this run has
        nothing for."""
        self.course, self.folder, self.step_seconds, self.between = course, folder, step_seconds, between
        self.require = require
        # tokens of held-out text: a third of a step's compute is without gradient
        self.tokens = max(FEWEST, round(3 * ENDPOINT * worth * course.config.train.batch_tokens))
        self.held: dict[str, _Held] = {}

    def __enter__(self) -> Self:
        course = self.course
        self.left, self.last = time.perf_counter(), course.last
        self.here, self.overlays, self.emit = course.take(), course.state.overlays, course.emit
        self.heard = course.seen, course.looked
        return self

    def __exit__(self, *_: object) -> None:
        self.held.clear()

    def run(self, name: str, overlays: Sequence[Overlay], steps: int, probe: int, hold: bool = False) -> Outcome:
        """See `orchestrator.protocol.Fork`. Whatever goes wrong inside, the run is where it was left."""
        try:
            with self.course.fitting.on_trial():
                return self._run(name, overlays, steps, probe, hold)
        except OutOfMemory as error:
            if self.course.parts.world.size > 1:
                raise
            void = error.message
        self.held.pop(name, None)
        oom.free()
        return Outcome(name, steps, probe, [], math.nan, False, (steps + probe) * self.step_seconds, void)

    def _run(self, name: str, overlays: Sequence[Overlay], steps: int, probe: int, hold: bool) -> Outcome:
        here, rest = self.course.state.progress.step, self.course.steps - self.course.state.progress.step
        if steps < 0 or probe < 0 or not 1 <= steps + probe <= rest:
            wrong = f"arm {name}: {steps} steps and {probe} of the probe, but the run has {rest} left"
            raise UserError(wrong, fix="make it shorter")
        acting = self.overlays
        for one in overlays:
            acting = added(acting, one, fork=True)
            self.require(one)
        decay = Overlay(f"probe of {name}", "lr.decay", probe, here + steps + 1) if probe else None
        told: list[tuple[str, dict[str, Any]]] = []
        heard: list[Heard] = []
        with ExitStack() as stack:
            stack.callback(self._return)
            self.course.emit = stack.enter_context(self._telling(name, told))
            self.course.state.overlays = acting
            for _ in range(steps):
                self.course.seen = self.course.looked = None
                (self.course.advance if hold else self.course.step)()
                heard.append((self.course.seen, self.course.looked))
                self._took(name, len(heard), steps + probe)
            if hold:
                self.held[name] = _Held(self.course.take(), list(told), acting, heard)
            if decay:
                self.course.state.overlays = added(acting, decay, fork=True)
            for n in range(probe):
                self.course.step()
                self._took(name, steps + n + 1, steps + probe)
            self.course.observe()
            heldout = self._evaluate()
        losses = [fields["loss"] for type, fields in told if type == "step" and here < fields["step"] <= here + steps]
        seconds = (steps + probe) * self.step_seconds
        return Outcome(name, steps, probe, losses, heldout.loss, heldout.comparable, seconds)

    def _took(self, name: str, steps: int, of: int) -> None:
        self.course.told(f"arm {name}", steps, of)
        self.between()

    def _evaluate(self) -> Evaluation:
        """The arm's end, on a part of the held-out text."""
        course, kind = self.course, self.course.parts.main_kind
        step, tokens = course.state.progress.step, course.state.progress.tokens
        capacity = (
            course.values(step)["mod_capacity"] if course.config.model.mod else None
        )  # that the arm is trained for
        result = course.fitting.evaluate(kind, capacity, self.tokens)
        told = {"split": "part of heldout", "data": kind, "routing": "causal"}
        course.emit("eval", step=step, tokens=tokens, **told, **result.fields())
        return result

    def require_held(self, outcome: Outcome) -> tuple[Overlay, ...]:
        """What lies over the plan at the end of that arm. Raises `UserError` if a run cannot go on from there."""
        if outcome.name not in self.held:
            raise UserError(f"arm {outcome.name}: its end was not held", fix="run it with hold=True")
        for one in self.held[outcome.name].overlays:
            check(one)
        return self.held[outcome.name].overlays

    def keep(self, outcome: Outcome) -> list[Heard]:
        """Stands at the end of a held arm, and tells what it did as the run's own; returns what its steps showed."""
        held = self.held[outcome.name]
        self.course.return_to(held.end)
        self.course.state.overlays = held.overlays
        self.course.parts.world.each(lambda: self._tell_again(held))
        self.course.last = time.perf_counter()
        return held.heard

    def _tell_again(self, held: _Held) -> None:
        for type, fields in held.events:
            self.course.emit(type, **fields)

    @contextmanager
    def _telling(self, name: str, told: list[tuple[str, dict[str, Any]]]) -> Iterator[Callable[..., None]]:
        """Remembers events, and writes them to the arm's file in the main process.

        What the disk refuses waits until the arm ends: all processes leave it together.
        """
        writers: list[EventWriter] = []

        def tell(type: str, /, **fields: Any) -> None:
            told.append((type, fields))
            for writer in writers:
                writer.emit(type, **fields)

        def begin() -> None:
            with disk(f"{self.folder}: no folder for trials"):
                self.folder.mkdir(exist_ok=True)
            writers.append(EventWriter(self.folder / f"{name}.jsonl", self.course.state.attempt, hold=True))

        def end() -> None:
            for writer in writers:
                writer.close()

        self._ask_the_disk(begin)
        try:
            yield tell
        except BaseException:
            with suppress(DiskRefused):
                end()
            raise
        self._ask_the_disk(end)

    def _ask_the_disk(self, work: Callable[[], None]) -> None:
        """Raises `DiskRefused` in all processes, unless the run is to go on without: then an incident says so."""
        course = self.course
        try:
            course.parts.world.decide(work)
        except DiskRefused as error:
            if course.config.checkpoint.on_error == "stop":
                error.fix = "make the disk writable or free space on it; the run stands where it was left"
                raise
            step = self.here.state["progress"].step
            self.emit("incident", step=step, kind="log lost", error=error.message)

    def _return(self) -> None:
        """Back to where the run was left; the time since is not training time."""
        self.course.emit, self.course.state.overlays = self.emit, self.overlays
        self.course.return_to(self.here)
        self.course.seen, self.course.looked = self.heard
        self.course.last = self.last + time.perf_counter() - self.left
