"""A run in the hands of a person: what it does now, what was decided about it, and what it is asked to do. No torch.

    import lumina

    run = lumina.open_run("runs/debug-20261126-k3xq")
    run.get_current_metrics()["loss"]
    run.adjust_learning_rate(0.5, steps=200)    # done before the next step, or when the run goes on
    run.undo("lr.scale")                        # back to before it, and on without it

Whatever is asked is checked here, waits in the run's inbox, and is done and journalled by the process that trains.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from lumina.config.overlay import Overlay, unpack
from lumina.config.resolve import read
from lumina.errors import UserError
from lumina.events import Event, read_events
from lumina.orchestrator import actions, ledger
from lumina.orchestrator.actions import ACTIONS, Request
from lumina.orchestrator.confidence import Confidence
from lumina.run import index, lineage, verdicts
from lumina.run.folder import Run
from lumina.run.inbox import Inbox
from lumina.run.lock import is_held

AFTER_THE_END = ("rewind", "undo")  # what a finished run can still be asked


class OpenRun:
    """A run, trained by this process, by another one or by none. Every method that asks returns the request's text.

    They raise `UserError`, with nothing asked, for what is out of bounds or of another kind of model.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, read(run.config).config

    # -- asking ------------------------------------------------------------------------------------------------------

    def act(self, name: str, value: actions.Asked = None, steps: int | None = None, skip: bool = False) -> str:
        """Asks for an action of `lumina.orchestrator.actions`."""
        return self.ask(Request(name, value, steps, skip))

    def ask(self, request: Request) -> str:
        request = actions.checked(request, self.config)
        if request.name in actions.NAMED:
            actions.named(self.overlays, str(request.value))
        if request.name == "rewind":
            actions.require_before(request, self.step)
        again = f"lumina resume {shlex.quote(str(self.run.path))}"
        if self.run.finished and request.name not in AFTER_THE_END:
            wrong = f"{self.run.path}: is finished, so that {request.name} would do nothing"
            raise UserError(wrong, fix=f"go back first: {again} --from STEP, or ask for rewind or undo")
        if request.name == "stop" and not self.running:
            raise UserError(f"{self.run.path}: is not running", fix=f"nothing is to stop; it goes on with {again}")
        Inbox(self.run).put(request.pack())
        return request.text

    def undo(self, *names: str) -> str:
        """Back to before what was laid over the plan, by name or the beginning of it, and on without it."""
        return self.act("undo", " ".join(names))

    @property
    def running(self) -> bool:
        """Whether somebody trains it now; what is asked of another one waits until it goes on."""
        return is_held(self.run.lock)

    @property
    def step(self) -> int:
        """The last step taken, as far as the log tells: what a step did is told with the next one."""
        told = max((int(event["step"]) for event in self.run.events() if "step" in event), default=0)
        return told + self.running

    @property
    def overlays(self) -> tuple[Overlay, ...]:
        """What lies over the plan, ended ones included, as the log has it."""
        return unpack(lineage.overlays(self.run) or [], str(self.run.event_log))

    # -- the interventions by their names ------------------------------------------------------------------------------

    def adjust_learning_rate(self, scale: float, steps: int | None = None) -> str:
        """Multiplies the planned learning rate, by 0.01 to 100."""
        return self.act("lr.scale", scale, steps)

    def emergency_lr_reduction(self, factor: float = 10.0) -> str:
        """Divides the planned learning rate, by 20 at most."""
        if not factor > 1:
            raise UserError(f"emergency_lr_reduction({factor}): no reduction", fix="give a factor above 1")
        return self.act("lr.scale", 1 / factor)

    def rollback_steps(self, steps: int, skip: bool = False) -> str:
        """Goes back so many steps, to the newest restore point at or before; `skip` leaves out what was read since."""
        if steps < 1:
            raise UserError(f"rollback_steps({steps}): not back", fix="give 1 or more")
        return self.act("rewind", -steps, skip=skip)

    def adjust_weight_decay(self, weight_decay: float, steps: int | None = None) -> str:
        return self.act("weight_decay", weight_decay, steps)

    def adjust_batch_size(self, micro_batch: int, steps: int | None = None) -> str:
        """Sequences that each process computes at once; the global batch, which is the plan's, stays."""
        return self.act("micro_batch", micro_batch, steps)

    def adjust_capacity_factor(self, factor: float, steps: int | None = None) -> str:
        """The most of a sequence's fair share that an expert takes in training; the others are counted as dropped."""
        return self.act("capacity_factor", factor, steps)

    def adjust_routing_temperature(self, temperature: float, steps: int | None = None) -> str:
        return self.act("temperature", temperature, steps)

    def enable_expert_dropout(self, probability: float = 0.1, steps: int | None = None) -> str:
        """Hides each expert from a token with this probability, in training."""
        return self.act("expert_dropout", probability, steps)

    def adjust_mod_capacity(self, capacity: float, steps: int | None = None) -> str:
        """The share of a sequence that depth-routed blocks compute."""
        return self.act("mod_capacity", capacity, steps)

    # -- looking -------------------------------------------------------------------------------------------------------

    def get_current_metrics(self) -> dict[str, Any]:
        """The fields of the newest `step` event; empty before there is one."""
        return self._newest("step")

    def get_expert_statistics(self) -> dict[str, Any]:
        """The fields of the newest `moe` event: load, entropy, drops …, one entry a layer; empty before there is one.

        Raises `UserError` for a model without experts.
        """
        if self.config.model.moe is None:
            raise UserError(f"{self.run.path}: a {self.config.model.kind} model has no experts", "ask a moe or hybrid")
        return self._newest("moe")

    def get_mod_statistics(self) -> dict[str, Any]:
        """The fields of the newest `mod` event: capacity, agreement …, one entry a routed block, likewise."""
        if self.config.model.mod is None:
            wrong = f"{self.run.path}: a {self.config.model.kind} model has no depth routing"
            raise UserError(wrong, fix="ask a mod or hybrid")
        return self._newest("mod")

    def decisions(self) -> list[dict[str, Any]]:
        """All that was decided, in order, with evidence and what undoes it."""
        return [entry.fields() for entry in self.entries()]

    def entries(self) -> list[ledger.Entry]:
        """The same, as `lumina.orchestrator.ledger` tells it."""
        return ledger.entries(read_events(self.run.event_log)) if self.run.event_log.exists() else []

    def _newest(self, type: str) -> Event:
        found = [event for event in self.run.events() if event["t"] == type]
        return found[-1] if found else {}


def open_run(run: Run | str | Path, root: str | Path = "runs") -> OpenRun:
    """A run (a `Run`, a folder, or a name below `root`) to look at and to act on, whether it trains or not."""
    return OpenRun(run if isinstance(run, Run) else index.find(Path(root), str(run)))


def table() -> list[tuple[str, str, str, str]]:
    """Name, values, what it does, how it is undone: of every action."""
    return [(one.name, actions.asks(one), one.does, one.undone) for one in ACTIONS.values()]


def history(root: str | Path = "runs") -> list[dict[str, Any]]:
    """What trials of all runs below `root` taught: a row for each architecture, fault and action, as plain values.

    `used` says whether this version of the code still goes by it. Raises `UserError` if a store cannot be read.
    """
    rows = []
    for version, packed in verdicts.stores(Path(root)).items():
        code, _, architecture = version.partition("-")
        known = {"architecture": architecture, "code": code, "used": code == verdicts.code()}
        rows += [known | row for row in Confidence.of(packed).table()]
    return sorted(rows, key=lambda row: (not row["used"], row["architecture"]))
