"""A run's checkpoints: when one is saved, which are kept, and where an attempt goes on from."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lumina.checkpoint import retention, store
from lumina.errors import UserError
from lumina.progress import Tell, whole
from lumina.run.folder import Run
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
        self.identity = {
            "tokenizer": parts.corpus.tokenizer.fingerprint,
            "data": parts.corpus.fingerprint,
            "kind": self.config.model.kind,
        }
        self.saved_step: int | None = None

    def save(self, evaluated: tuple[int, Evaluation] | None) -> store.Receipt:
        """Publishes a checkpoint of this step and points `latest` at it, and `best` if it was evaluated as the best."""
        progress = self.state.progress
        if evaluated and evaluated[0] == progress.step and evaluated[1].comparable:
            loss = evaluated[1].loss
            if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
                progress.best_loss, progress.best_step = loss, progress.step
        with whole(f"saving step {progress.step}", self.told):
            receipt = store.save(
                self.run.checkpoints,
                progress.step,
                self.state.model_tensors(),
                self.state.optim_tensors(),
                self.identity | self.state.pack(),
                self.world,
            )
        self.world.decide(self._tidy)
        self.saved_step = progress.step
        return receipt

    def restore(self) -> list[tuple[Path, str]]:
        """Loads the newest complete checkpoint; returns those it had to pass over, with the reason.

        Raises `UserError` if there are some and all are damaged: to begin again is for the user to say.
        """
        found, skipped = store.newest(self.run.checkpoints, self.world, self.told)
        if found is None and skipped:
            reasons = [f"{path.name}: {reason}" for path, reason in skipped]
            raise UserError(
                "\n  - ".join([f"{self.run.checkpoints}: every checkpoint is damaged", *reasons]),
                fix="restore one, or start another: lumina train … --fresh",
            )
        if found is None:
            return []
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
        return skipped

    def _tidy(self) -> None:
        self._link_best()
        retention.prune(self.run.checkpoints, self.config.checkpoint.keep_last)

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
