"""A run's checkpoints: when one is saved, which are kept, and where an attempt goes on from."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lumina.checkpoint import retention, store
from lumina.checkpoint.catalogue import LOSS
from lumina.errors import DiskRefused, UserError
from lumina.progress import Tell, whole
from lumina.run.folder import Run
from lumina.run.lineage import Lineage, abandoned, lineage
from lumina.training import setup
from lumina.training.evaluate import Evaluation
from lumina.training.precision import LossScale
from lumina.training.setup import Parts
from lumina.training.state import State


class Saver:
    """Saves and restores the `state` of a run; every process calls, the main one decides."""

    def __init__(self, run: Run, parts: Parts, state: State, told: Tell, recast: bool = False) -> None:
        """`recast`: the user asked for another precision than the run began with."""
        self.recast, self.precision = recast, parts.precision
        self.run, self.config, self.world, self.state, self.told = run, parts.config, parts.world, state, told
        self.parts, self.lineage = parts, Lineage()
        self.identity = {
            "tokenizer": parts.corpus.tokenizer.fingerprint,
            "data": parts.corpus.fingerprint,
            "kind": self.config.model.kind,
        }
        self.saved_step: int | None = None

    def save(self, evaluated: tuple[int, Evaluation] | None) -> store.Receipt:
        """Publishes a checkpoint of this step and points `latest` at it, and `best` if it was evaluated as the best.

        Raises `DiskRefused` if the disk does not take it; whatever was saved before is untouched then.
        """
        progress, best = self.state.progress, (self.state.progress.best_loss, self.state.progress.best_step)
        loss = None
        if evaluated and evaluated[0] == progress.step and evaluated[1].comparable:
            loss = evaluated[1].loss if math.isfinite(evaluated[1].loss) else None
        if loss is not None and (progress.best_loss is None or loss < progress.best_loss):
            progress.best_loss, progress.best_step = loss, progress.step
        try:
            self.world.decide(self._require_folder)
            with whole(f"saving step {progress.step}", self.told):
                receipt = store.save(
                    self.run.checkpoints,
                    progress.step,
                    self.state.model_tensors(),
                    self.state.optim_tensors(),
                    self.identity | {LOSS: loss} | self.state.pack(),
                    self.world,
                )
        except DiskRefused:
            progress.best_loss, progress.best_step = best  # the best of those that were saved
            raise
        self.saved_step = progress.step
        self.world.decide(self._tidy)
        return receipt

    def restore(self) -> list[tuple[Path, str]]:
        """Loads the newest complete checkpoint that counts; returns those it had to pass over, with the reason.

        Raises `UserError` if there are some and all are damaged: to begin again is for the user to say.
        """
        self.lineage = self.world.decide(lambda: lineage(self.run))
        out = self.world.decide(lambda: abandoned(self.run, self.lineage))
        found, skipped = store.newest(self.run.checkpoints, self.world, self.told, out)
        if found is None and skipped:
            reasons = [f"{path.name}: {reason}" for path, reason in skipped]
            raise UserError(
                "\n  - ".join([f"{self.run.checkpoints}: every checkpoint is damaged", *reasons]),
                fix="restore one, or start another: lumina train … --fresh",
            )
        if found is None:
            setup.load_origin(self.parts)
        else:
            self.load(found)
        self.world.decide(lambda: retention.note_damaged(self.run.checkpoints, [path for path, _ in skipped]))
        return skipped

    def find(self, step: int) -> store.Checkpoint:
        """The checkpoint of `step`. Raises `UserError` if there is none that counts, or if it is damaged."""

        def look() -> store.Checkpoint:
            out = abandoned(self.run, self.lineage)
            there = [path for path in store.checkpoints(self.run.checkpoints) if path not in out]
            for path in there:
                if store.step_of(path) == step:
                    return store.read(path)
            steps = ", ".join(str(store.step_of(path)) for path in reversed(there))
            raise UserError(
                f"{self.run.path}: no checkpoint of step {step} to go back to",
                fix=f"there are those of {steps}; and 0 is the start" if there else "0 is the start; there is no other",
            )

        return self.world.decide(look)

    def load(self, found: store.Checkpoint) -> None:
        """Writes a verified checkpoint into the state. Raises `UserError` if it is of another run."""
        retention.check_links(self.run.checkpoints)
        for what, value in self.identity.items():
            if found.state[what] != value:
                raise UserError(
                    f"{found.path}: saved with another {what} ({found.state[what]}) than the run now has ({value})",
                    fix=f"restore the run's {what}, or start another: lumina train … --fresh",
                )
        optim = self.state.optim_tensors()
        if self.recast:
            optim = _with_the_loss_scale_of(found, optim, self.precision.device)
        store.load(found, self.state.model_tensors(), optim, self.world, cast=self.recast)
        self.state.unpack(found.state)
        self.world.decide(self._link_best)
        self.saved_step = found.step

    def went_back(self, lineage: Lineage) -> None:
        """Points `latest` and `best` at what counts after the run went back, or at nothing; for the main process."""
        self.lineage = lineage
        out = abandoned(self.run, lineage)
        there = [path for path in store.checkpoints(self.run.checkpoints) if path not in out]
        progress = self.state.progress
        steps = [store.step_of(path) for path in there]
        for name, wanted in (("latest", steps[:1]), ("best", [step for step in steps if step == progress.best_step])):
            if wanted:
                store.point(self.run.checkpoints, name, wanted[0])
            else:
                store.remove(self.run.checkpoints / name)

    def _tidy(self) -> None:
        self._link_best()
        keep = self.config.checkpoint
        out = {store.step_of(path) for path in abandoned(self.run, self.lineage) if path.suffix != store.OLD}
        retention.prune(self.run.checkpoints, keep.keep_last, keep.keep_best, keep.keep_every, out)

    def _require_folder(self) -> None:
        """Where the folder of the run was moved or deleted, no second one is begun that lacks all but checkpoints."""
        if not self.run.config.is_file():
            fix = "bring the folder back to where it was"
            raise DiskRefused(f"{self.run.path}: checkpoint not written: the folder of the run is gone", fix)

    def _link_best(self) -> None:
        """Points `best` where the state says it is: also after a crash between a save and its link."""
        best = self.state.progress.best_step
        if best is not None and store.folder(self.run.checkpoints, best).is_dir():
            store.point(self.run.checkpoints, "best", best)


def _with_the_loss_scale_of(found: store.Checkpoint, optim: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """What to load: without a loss scale where none was saved, for it begins anew; one to throw away where one was."""
    scale = LossScale(device).tensors()
    saved = set[str]()
    for path in (found.path / store.OPTIM).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            saved |= scale.keys() & set(file.keys())
    return {name: tensor for name, tensor in (scale | optim).items() if name not in scale or name in saved}
