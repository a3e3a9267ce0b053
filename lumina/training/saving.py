"""A run's checkpoints: when one is saved, which are kept, and where an attempt goes on from."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lumina.checkpoint import retention, store
from lumina.checkpoint.writer import Writer
from lumina.errors import UserError
from lumina.progress import Tell, whole
from lumina.run.folder import Run
from lumina.training import machine, memory
from lumina.training.evaluate import Evaluation
from lumina.training.setup import Parts
from lumina.training.state import State, state_problems

T = TypeVar("T")
STEPS_REMEMBERED = 100  # that no writer stood beside: what the others are compared with


class Saver:
    """Saves and restores the `state` of a run; every process calls, the main one decides."""

    def __init__(self, run: Run, parts: Parts, state: State, told: Tell) -> None:
        self.run, self.config, self.world, self.state, self.told = run, parts.config, parts.world, state, told
        self.identity = {
            "tokenizer": parts.corpus.tokenizer.fingerprint,
            "data": parts.corpus.fingerprint,
            "kind": self.config.model.kind,
        }
        way, parallel = self.config.checkpoint.write, self.config.parallel
        if way == "auto":  # the run was begun by a version that did not ask
            room = memory.room_for_copy(self.config, self.world.size, self.world.local_size)
            way, _ = machine.choose_writing(parallel.device, int(parallel.threads), room, self.world)
        self.writer = Writer(run.checkpoints, self.world, way)
        self.saved_step: int | None = None  # published, or under way
        self.alone: deque[float] = deque(maxlen=STEPS_REMEMBERED)  # seconds of steps
        self.beside: list[float] = []  # seconds of the steps since the save began

    def save(self, evaluated: tuple[int, Evaluation] | None) -> list[dict[str, Any]]:
        """Begins a checkpoint of this step; if it was evaluated as the best, `best` will point at it.

        Returns the event of the save before, if that was still under way: this one waited for it.
        """
        progress = self.state.progress
        if evaluated and evaluated[0] == progress.step and evaluated[1].comparable:
            loss = evaluated[1].loss
            if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
                progress.best_loss, progress.best_step = loss, progress.step
        with whole(f"saving step {progress.step}", self.told):
            self._or_unsaved(self.writer.finish)
            before = self._told()  # prunes, which nothing may be under way for
            self.saved_step = None
            self.writer.save(
                progress.step,
                self.state.model_tensors(),
                self.state.optim_tensors(),
                self.identity | self.state.pack(),
            )
        self.saved_step = progress.step
        return before

    def poll(self, step_seconds: float) -> list[dict[str, Any]]:
        """The `checkpoint` events of what was published since, after a step that took so long.

        Older checkpoints go once a newer one was read back. Raises the `UserError` of a save that failed.
        """
        (self.beside if self.writer.busy else self.alone).append(step_seconds)
        return self._told()

    def finish(self) -> list[dict[str, Any]]:
        """Waits for the save that is under way; its event. Raises the `UserError` of a save that failed."""
        if self.writer.busy:
            with whole(f"reading step {self.saved_step} back", self.told):
                self._or_unsaved(self.writer.finish)
        return self._told()

    def require_saved(self) -> None:
        """Raises `UserError` if the last save did not last: before a run is called done, or stopped and saved."""
        if self.saved_step is None:
            raise UserError(
                f"{self.run.checkpoints}: the last checkpoint, read back from the disk, was not what had been written; "
                "earlier ones are untouched",
                fix=f"check the disk, then: lumina resume {self.run.path}",
            )

    def _or_unsaved(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except UserError:
            self.saved_step = None
            raise

    def _told(self) -> list[dict[str, Any]]:
        receipts = self._or_unsaved(self.writer.poll)
        if any(receipt.damaged and receipt.step == self.saved_step for receipt in receipts):
            self.saved_step = None
        events = [self._event(receipt) for receipt in receipts]
        if any(receipt.verified for receipt in receipts):
            self.world.decide(self._tidy)
        return events

    def _event(self, receipt: store.Receipt) -> dict[str, Any]:
        usual, beside, self.beside = statistics.median(self.alone) if self.alone else None, self.beside, []
        figures = {name: round(getattr(receipt, name), 4) for name in ("seconds", "stall", "waited")}
        return {
            "step": receipt.step,
            "bytes": receipt.bytes,
            **figures,
            "bandwidth": round(receipt.bandwidth),
            "way": receipt.way,
            "verified": receipt.verified,
            "slowed": None if usual is None else round(sum(seconds - usual for seconds in beside), 4),
            **({"problems": list(receipt.problems)} if receipt.problems else {}),
        }

    def restore(self) -> list[tuple[Path, str]]:
        """Loads the newest complete checkpoint; returns those it had to pass over, with the reason.

        Raises `UserError` if there are some and all are damaged: to begin again is for the user to say.
        """
        skipped: list[tuple[Path, str]] = []
        while True:
            without = [path for path, _ in skipped]
            found, damaged = store.newest(self.run.checkpoints, self.world, self.told, without)
            skipped += [one for one in damaged if one[0] not in without]
            if found is None:
                break
            retention.check_links(self.run.checkpoints)
            if problems := state_problems(found.state, self.identity):
                skipped.append((found.path, "; ".join(problems)))
                continue
            self._require_own(found)
            try:
                store.load(found, self.state.model_tensors(), self.state.optim_tensors(), self.world)
            except store.Unsound as error:
                skipped.append((found.path, error.message.partition(": ")[2]))
                continue
            self.state.unpack(found.state)
            self.world.decide(self._link_best)
            self.saved_step = found.step
            return skipped
        if skipped:
            reasons = [f"{path.name}: {reason}" for path, reason in skipped]
            raise UserError(
                "\n  - ".join([f"{self.run.checkpoints}: every checkpoint is damaged", *reasons]),
                fix="restore one, or start another: lumina train … --fresh",
            )
        return []

    def _require_own(self, found: store.Checkpoint) -> None:
        for what, value in self.identity.items():
            if found.state[what] != value:
                raise UserError(
                    f"{found.path}: saved with another {what} ({found.state[what]}) than the run now has ({value})",
                    fix=f"restore the run's {what}, or start another: lumina train … --fresh",
                )

    def _tidy(self) -> None:
        self._link_best()
        retention.prune(self.run.checkpoints, self.config.checkpoint.keep_last)

    def _link_best(self) -> None:
        """Points `best` where the state says it is: also after a crash between a save and its link."""
        best = self.state.progress.best_step
        if best is not None and store.folder(self.run.checkpoints, best).is_dir():
            store.point(self.run.checkpoints, "best", best)
