"""A run's checkpoints: how one is saved beside the steps, which are kept, and where an attempt goes on from."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from torch import Tensor

from lumina.checkpoint import catalogue, places, retention, store
from lumina.checkpoint.catalogue import LOSS, RUN
from lumina.checkpoint.writer import Writer
from lumina.config import overlay
from lumina.config.overlay import Overlay
from lumina.errors import DiskRefused, UserError
from lumina.progress import Tell, whole
from lumina.run.folder import Run
from lumina.run.lineage import Lineage, lineage
from lumina.training import machine, memory, setup
from lumina.training.evaluate import Evaluation
from lumina.training.precision import LossScale
from lumina.training.setup import Parts
from lumina.training.state import State

T = TypeVar("T")
STEPS_REMEMBERED = 100  # that no writer stood beside: what the others are compared with


class Saver:
    """Saves and restores the `state` of a run; every process calls, the main one decides."""

    def __init__(
        self, run: Run, parts: Parts, state: State, told: Tell, emit: Callable[..., object], recast: bool = False
    ) -> None:
        """`emit` is handed `checkpoint` events; `recast`: the user asked for this precision while the run went on,
        so that a checkpoint may be of another."""
        self.emit = emit
        self.recast, self.precision = recast, parts.precision
        self.run, self.config, self.world, self.state, self.told = run, parts.config, parts.world, state, told
        self.parts, self.lineage = parts, Lineage()
        self.identity = {
            "tokenizer": parts.corpus.tokenizer.fingerprint,
            "data": parts.corpus.fingerprint,
            "kind": self.config.model.kind,
            RUN: self.world.decide(lambda: run.id),
        }
        way, parallel = self.config.checkpoint.write, self.config.parallel
        if way == "auto":  # the run was begun by a version that did not ask
            room = memory.room_for_copy(self.config, self.world.size, self.world.local_size)
            way, _ = machine.choose_writing(parallel.device, int(parallel.threads), room, self.world)
        self.writer = Writer(run.checkpoints, self.world, way, self._keep_log, self._tidy)
        self.damaged: set[Path] = set()  # what the disk kept from being set aside
        self.saved_step: int | None = None  # published, or under way
        self.judged = False  # whether that one holds an evaluation of its step
        self.best_before: tuple[float | None, int | None] = (None, None)  # the last save
        self.why: dict[str, str] = {}  # what else the event of the last save tells
        self.alone: deque[float] = deque(maxlen=STEPS_REMEMBERED)  # seconds of steps
        self.beside: list[float] = []  # seconds of the steps since the save began

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(self, evaluated: tuple[int, Evaluation] | None, **why: str) -> None:
        """Begins a checkpoint of this step; if it was evaluated as the best, `best` will point at it.

        If the save before is still under way, this one waits for it. `why` is told in its event. Raises `DiskRefused`
        if the disk does not take it, or did not take the one before.
        """
        progress = self.state.progress
        self.finish()
        with whole(f"saving step {progress.step}", self.told):
            self.world.decide(self._require_folder)
            loss = self._judge(evaluated)
            state = self.identity | {LOSS: loss, "precision": self.config.precision.mode} | self.state.pack()
            tensors = self.state.model_tensors(), self.state.optim_tensors()
            self._or_unsaved(lambda: self.writer.save(progress.step, *tensors, state))
        self.saved_step, self.why, self.judged = progress.step, why, loss is not None

    def poll(self, step_seconds: float) -> None:
        """Tells what was published since, after a step that took so long.

        Raises the `UserError` of a save that failed, or that left behind what the disk did not let go.
        """
        (self.beside if self.writer.busy else self.alone).append(step_seconds)
        self._tell()

    def finish(self) -> None:
        """Waits for the save that is under way. Raises the `UserError` of a save that failed."""
        if self.writer.busy:
            with whole(f"reading step {self.saved_step} back", self.told):
                self._or_unsaved(lambda: self.writer.finish(self.told))
        self._tell()

    def require_saved(self) -> None:
        """Raises `UserError` if the last save did not last: before a run is called done, or stopped and saved."""
        if self.saved_step is None:
            raise UserError(
                f"{self.run.checkpoints}: the last checkpoint did not last: the disk refused it, or gave back other "
                "bytes than were written; earlier ones are untouched",
                fix=f"check the disk, then: lumina resume {self.run.path}",
            )

    def _judge(self, evaluated: tuple[int, Evaluation] | None) -> float | None:
        """The held-out loss of this step, if it may be compared; the lowest makes it the best."""
        progress, loss = self.state.progress, None
        self.best_before = progress.best_loss, progress.best_step
        if evaluated and evaluated[0] == progress.step and evaluated[1].comparable:
            loss = evaluated[1].loss if math.isfinite(evaluated[1].loss) else None
        if loss is not None and (progress.best_loss is None or loss < progress.best_loss):
            progress.best_loss, progress.best_step = loss, progress.step
        return loss

    def _or_unsaved(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except UserError:
            self._unsaved()
            raise

    def _unsaved(self) -> None:
        """The last save is none; the best is one of those that were saved."""
        progress = self.state.progress
        progress.best_loss, progress.best_step = self.best_before
        self.saved_step = None

    def _tell(self) -> None:
        receipts = self._or_unsaved(self.writer.poll)
        if any(receipt.damaged and receipt.step == self.saved_step for receipt in receipts):
            self._unsaved()
        if events := [self._event(receipt) for receipt in receipts]:
            self.world.decide(lambda: self._emit_all(events))
            self.world.decide(lambda: self._distrust(receipts))
        for receipt in receipts:
            if receipt.refused:
                receipt.refused.told = not self.world.main
                raise receipt.refused

    def _distrust(self, receipts: list[store.Receipt]) -> None:
        """A damaged checkpoint counts for nothing, also where the disk lets nobody rename it."""
        damaged = {receipt.path for receipt in receipts if receipt.damaged}
        self.damaged |= {path for path in damaged if path.suffix != places.DAMAGED}
        with suppress(DiskRefused):  # it is known here; the next time the disk may take a note of it
            retention.note_damaged(self.run.checkpoints, self.damaged)
        if damaged:
            self.link()

    def _emit_all(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self.emit("checkpoint", **event)

    def _event(self, receipt: store.Receipt) -> dict[str, Any]:
        usual, beside, self.beside = statistics.median(self.alone) if self.alone else None, self.beside, []
        figures = {name: round(getattr(receipt, name), 4) for name in ("seconds", "stall", "waited")}
        return {
            "step": receipt.step,
            "bytes": receipt.bytes,
            **figures,
            "stall_steps": None if usual is None else round(receipt.stall / usual, 2),
            "bandwidth": round(receipt.bandwidth),
            "way": receipt.way,
            "verified": receipt.verified,
            "slowed": None if usual is None else round(sum(seconds - usual for seconds in beside), 4),
            **self.why,
            **({"problems": list(receipt.problems)} if receipt.problems else {}),
        }

    def _require_folder(self) -> None:
        """Where the folder of the run was moved or deleted, no second one is begun that lacks all but checkpoints."""
        if not self.run.config.is_file():
            fix = "bring the folder back to where it was"
            raise DiskRefused(f"{self.run.path}: checkpoint not written: the folder of the run is gone", fix)

    def tidy(self) -> None:
        """What earlier attempts left goes, where nothing keeps it; a save that is under way is waited for.

        Raises `UserError` if the disk refuses.
        """
        self.finish()

        def work() -> None:
            if self.run.checkpoints.is_dir():
                retention.sweep(self.run.checkpoints)
                self._tidy()

        self.world.decide(work)

    def _tidy(self, saved: Path | None = None) -> None:
        """Older checkpoints go, once a newer one was `saved`: in its thread, while nothing that it asks can change."""
        self._require_folder()
        self.damaged -= {saved}
        self._link_best()
        keep = self.config.checkpoint
        kinds = keep.keep_last, keep.keep_best, keep.keep_every
        retention.prune(self.run.checkpoints, *kinds, self.abandoned(), self.damaged)

    def _keep_log(self) -> None:
        """A checkpoint is never ahead of the log on the disk: what was told before it would be told by nobody again."""
        with places.disk(f"{self.run.event_log}: not flushed"), suppress(FileNotFoundError):
            places.sync(self.run.event_log)

    def _link_best(self) -> None:
        """Points `best` where the state says it is: also after a crash between a save and its link."""
        best = self.state.progress.best_step
        if best is not None and store.folder(self.run.checkpoints, best).is_dir():
            store.point(self.run.checkpoints, "best", best)

    # -- restoring ----------------------------------------------------------------------------------------------------

    def recall(self) -> None:
        """Learns which attempts count, before the run goes on; what a killed save was replacing has its name again."""
        self.lineage = self.world.decide(lambda: lineage(self.run))
        self.world.decide(lambda: places.put_back(self.run.checkpoints))

    def restore(self) -> list[tuple[Path, str]]:
        """Loads the newest complete checkpoint that counts; returns those it had to pass over, with the reason.

        The run begins again where none is left; what was saved then is among those passed over.
        Raises `UserError` if there are some, all damaged or of another run: to begin again is for the user to say.
        """
        out = self.world.decide(self.abandoned)
        skipped: list[tuple[Path, str]] = []
        while True:
            without = [path for path, _ in skipped]
            found, damaged = store.newest(
                self.run.checkpoints, self.world, self.told, [*out, *without], self.identity[RUN]
            )
            skipped += [one for one in damaged if one[0] not in without]
            if found is None or not (problem := self._load(found)):
                break
            skipped.append((found.path, problem))
        if found is None and skipped:
            reasons = [f"{path.name}: {reason}" for path, reason in skipped]
            raise UserError(
                "\n  - ".join([f"{self.run.checkpoints}: every checkpoint is damaged or of another run", *reasons]),
                fix="restore one, or start another: lumina train … --fresh",
            )
        self.world.decide(lambda: self._leave_in_order(found, [path for path, _ in skipped]))
        if found is None:
            setup.load_origin(self.parts)
            return self.world.decide(lambda: self._lost(out))
        return skipped

    def abandoned(self) -> list[Path]:
        """The checkpoints that the run went back before; for the main process."""
        return catalogue.abandoned(self.run.checkpoints, self.lineage.counts)

    def _leave_in_order(self, found: store.Checkpoint | None, damaged: list[Path]) -> None:
        """Names, notes and links as they would be if nobody had been killed."""
        root = self.run.checkpoints
        if found and found.path.suffix == store.OLD:
            places.set_aside(final := found.path.with_suffix(""))
            places.put_back(root)
            damaged = [path for path in damaged if path != final]
        retention.note_damaged(root, damaged)
        self.link()

    def _lost(self, undone: list[Path]) -> list[tuple[Path, str]]:
        """What was there to go on from, by the log, of a run that has to begin again."""
        saved = [e["step"] for e in self.run.events() if e["t"] == "checkpoint" and e.get("verified", True)]
        if not saved:
            return []
        gone = store.folder(self.run.checkpoints, saved[-1])
        return [(gone, "gone: it was saved"), *((path, "the run went back before it") for path in undone)]

    def overlays(self) -> tuple[Overlay, ...]:
        """What lay over the plan in the newest checkpoint that counts: for a run whose log does not say."""
        out = self.world.decide(self.abandoned)
        found, _ = store.newest(self.run.checkpoints, self.world, self.told, out, self.identity[RUN])
        return overlay.unpack(found.state.get("overlays", ()), str(found.path)) if found else ()

    def saved(self) -> list[int]:
        """The steps of the checkpoints that count, newest first; for the main process."""
        out = {*self.abandoned(), *self.damaged}
        there = [path for path in retention.counting(self.run.checkpoints) if path not in out]
        return [store.step_of(path) for path in there if path.suffix != store.OLD]

    def keep_ways_back(self, ahead: int) -> None:
        """Pins the newest checkpoint before each overlay that begins `ahead` steps from here at the latest.

        For the main process. A save under way counts.
        """
        saved = {*self.saved(), *([] if self.saved_step is None else [self.saved_step])}
        before: dict[int, list[str]] = {}
        for one in self.state.overlays:
            points = [step for step in saved if step < one.begin]
            if points and one.begin <= self.state.progress.step + ahead:
                before.setdefault(max(points), []).append(one.id)
        retention.pin(self.run.checkpoints, {step: f"before {', '.join(ids)}" for step, ids in before.items()})

    def find(self, step: int) -> store.Checkpoint:
        """The checkpoint of `step`. Raises `UserError` if there is none that counts, or if it is damaged."""

        def look(tell: Tell) -> store.Checkpoint:
            out = self.abandoned()
            there = [path for path in store.checkpoints(self.run.checkpoints) if path not in out]
            for path in there:
                if store.step_of(path) == step:
                    return store.read(path, tell, own=self.identity[RUN])
            steps = ", ".join(str(store.step_of(path)) for path in reversed(there))
            raise UserError(
                f"{self.run.path}: no checkpoint of step {step} to go back to",
                fix=f"there are those of {steps}; and 0 is the start" if there else "0 is the start; there is no other",
            )

        return self.world.follow(look, self.told)

    def load(self, found: store.Checkpoint) -> None:
        """Writes a verified checkpoint into the state. Raises `UserError` if it is none of this run, or not sound."""
        if problem := self._load(found):
            raise UserError(f"{found.path}: {problem}", fix="go back to another step")

    def link(self) -> None:
        """Points `latest` and `best` at what counts, or at nothing; for the main process."""
        root, saved, best = self.run.checkpoints, self.saved(), self.state.progress.best_step
        retention.check_links(root)
        for name, wanted in (("latest", saved[:1]), ("best", [step for step in saved if step == best])):
            if wanted:
                store.point(root, name, wanted[0])
            else:
                store.remove(root / name)

    def _load(self, found: store.Checkpoint) -> str:
        """Writes a checkpoint into the state; or says why nobody can go on from it."""
        retention.check_links(self.run.checkpoints)
        if problems := self.state.problems(found.state, self.identity, found.step) or self._foreign(found):
            return "; ".join(problems)
        optim = self.state.optim_tensors()
        recast = self.recast and found.state.get("precision") != self.config.precision.mode
        if recast:
            optim = _with_the_loss_scale_of(found, optim, self.precision.device)
        try:
            with whole(f"reading step {found.step}", self.told):
                store.load(found, self.state.model_tensors(), optim, self.world, cast=recast)
        except store.Unsound as error:
            return error.message.partition(": ")[2]
        self.state.unpack(found.state)
        self.saved_step, self.judged = found.step, found.state[LOSS] is not None
        return ""

    def _foreign(self, found: store.Checkpoint) -> list[str]:
        """What shows that a checkpoint is of another run. One of an earlier format does not say of which it is."""
        return [
            f"saved with another {what} ({found.state[what]}) than the run now has ({value})"
            for what, value in self.identity.items()
            if found.state[what] != value and (what != RUN or found.state[RUN])
        ]


def _with_the_loss_scale_of(found: store.Checkpoint, optim: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """What to load: without a loss scale where none was saved, for it begins anew; one to throw away where one was."""
    scale = LossScale(device).tensors()
    saved = set[str]()
    for path in (found.path / store.OPTIM).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            saved |= scale.keys() & set(file.keys())
    return {name: tensor for name, tensor in (scale | optim).items() if name not in scale or name in saved}
