"""The Python interface: a `Trainer` that prints its progress, and `load` to use what it made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lumina.inference import engine
from lumina.run import index
from lumina.run.folder import Run
from lumina.telemetry.console import Console
from lumina.training import trainer


class Trainer(trainer.Trainer):
    """The trainer of `lumina.training`, printing progress like the command line; `quiet` prints problems only."""

    def __init__(self, *args: Any, quiet: bool = False, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.console = Console(self.resolved.config.telemetry.log_every, quiet=quiet)
        self.listeners = [*self.listeners, self.console]
        self.progress = self.console.progress

    def fit(self) -> Run:
        """Trains to the end, going on with an unfinished run of the same request unless `fresh`."""
        with self.console:
            return super().fit()


def load(run: Run | str | Path, root: str | Path = "runs") -> engine.Model:
    """The newest complete checkpoint of a run (a `Run`, a folder, or a name below `root`), ready to generate."""
    return engine.load(run if isinstance(run, Run) else index.find(Path(root), str(run)))
