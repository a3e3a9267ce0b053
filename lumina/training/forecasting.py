"""Forecasts of a run: when it begins (`plan.json`), on the way (`forecast` events), and what is kept of it at its end.

    step, eval, … events -> planner.curve -> planner.outlook -> forecast events

Nothing here changes what is trained: it listens, and a fault in it ends the forecasts, not the run.
"""

from __future__ import annotations

import math
from typing import Any

from lumina.config.overlay import DECAY
from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.events import Event
from lumina.model.cost import count, state_bytes
from lumina.planner import calibration, keeping, outset
from lumina.planner.curve import Recorder
from lumina.planner.hardware import CPU, OTHER, Device, Fleet, device_called, known_as
from lumina.planner.laws import DEFAULT, LAWS, Law, law, params_of
from lumina.planner.outlook import Optimum, aim_of, outlook
from lumina.run.folder import Run, write_json
from lumina.training import machine
from lumina.training.memory import usable
from lumina.training.observer import Emit
from lumina.training.setup import Parts

FORECASTS = 50  # of a run, about: each takes milliseconds


class Forecaster:
    """Listens to the events of a run and emits forecasts; in the main process only.

    They are a function of the events that count: a run that goes on says what it would have said.
    """

    def __init__(self, run: Run, parts: Parts, rate: float, emit: Emit, apart: bool = False) -> None:
        """`rate` is that of one process's matmuls, in FLOP/s; a run that stands `apart` learns nothing of finished
        ones, and teaches later ones nothing."""
        self.run, self.parts, self.rate, self.emit = run, parts, rate, emit
        self.every = every(parts.steps, parts.config.telemetry.log_every)
        self.before = _held_before(parts)
        self.view: _View | None = None
        self.apart = apart
        self.broken = self.shortened = False

    def __call__(self, event: Event) -> None:
        if self.broken:
            return
        try:
            told = self._hear(event)
        except Exception as error:  # a forecast is not worth a run
            self.broken = True
            why = f"a fault of ours, and no forecast any more: {type(error).__name__}: {error}"
            told = {"step": event.get("step", 0), "refused": why, "early": False}
        if told:
            self.emit("forecast", **told)

    def keep(self) -> None:
        """Keeps what a finished run teaches; called before its last event."""
        try:
            if not (self.broken or self.shortened or self.apart):
                keeping.keep(self.run.path)
        except (UserError, OSError, ValueError, LookupError, TypeError) as error:
            why = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.emit("incident", step=self.parts.steps, kind="not kept", error=why)

    def _hear(self, event: Event) -> dict[str, Any] | None:
        if event["t"] == "run" and event["parent_step"] is None:
            self._write_plan(event)
        if self.view is None:
            if event["t"] != "run":
                return None
            self.view = _View(self.run, self.parts, event)
        else:
            self.view.recorder.hear(event)
        if any(one["key"] == DECAY for one in event.get("overlays", ())):
            self.shortened = True
        elif "overlays" in event:
            self.shortened = False
        if self.shortened:  # the plan's end is not the run's
            return None
        if event["t"] != "step" or event["step"] % self.every or event["step"] == self.parts.steps:
            return None
        return {"step": event["step"], **self.view.outlook()}

    def _write_plan(self, begun: Event) -> None:
        config, facts = self.parts.config, begun["machine"]
        fleet = Fleet(_device(config.parallel.device, facts, config.precision.mode, self.rate), self.parts.world.size)
        known = calibration.Store() if self.apart else calibration.load()
        plan = outset.outset(config, begun, fleet, known, law_in_use(), self.before)
        try:
            write_json(self.run.path / outset.NAME, plan)
        except OSError as error:
            self.emit("incident", step=0, kind="not kept", error=f"{outset.NAME}: {error.strerror}")


class _View:
    """What forecasts are made of: the curve, where the run is going, and what was known when it began."""

    def __init__(self, run: Run, parts: Parts, begun: Event) -> None:
        """`begun` is the newest `run` event, which is in the log already."""
        config, plan = parts.config, outset.read(run.path)
        self.aim, self.prior = aim_of(config, begun), outset.prior(plan)
        self.batch_tokens = config.train.batch_tokens
        self.reference = outset.reference(plan)
        self.optimum = None if self.aim.never else outset.optimum(plan) or _optimum(config)
        self.recorder = Recorder.of(self.aim.schedule, run.events())

    def outlook(self) -> dict[str, Any]:
        return outlook(self.recorder.curve, self.aim, self.prior, self.optimum, self.batch_tokens, self.reference)


def every(steps: int, log_every: int) -> int:
    """Steps between forecasts: a multiple of those between lines of the log."""
    return log_every * max(1, round(steps / FORECASTS / log_every))


def _optimum(config: Config) -> Optimum:
    """Of a run that has no `plan.json` to say it."""
    scaling = law_in_use()
    return Optimum(scaling.name, scaling.tokens_for(params_of(count(config.model), scaling)))


def law_in_use() -> Law:
    """The user's own scaling law or the default: also if their own is damaged, which is no reason not to train."""
    try:
        return law()
    except UserError:
        return LAWS[DEFAULT]


def _held_before(parts: Parts) -> int:
    """Bytes that the process holds beside the model: on a CPU whatever libraries and earlier work left resident."""
    config = parts.config
    if config.parallel.device == "cuda":
        return 0
    weights = state_bytes(config.model, config.train.optimizer, config.precision.mode, config.train.lora.rank).weights
    return max(0, machine.memory_used(config.parallel.device) - weights // parts.world.size)


def _device(device: str, facts: dict[str, Any], precision: str, rate: float) -> Device:
    """This machine's, at the rate that was just measured; of a known GPU the data sheet's."""
    known = device_called(facts["device_name"]) if device == "cuda" else None
    if known is not None:
        return known
    name = known_as(device, facts["device_name"], facts["cores"])
    peak = dict.fromkeys({"fp32", precision.removesuffix("_pure")}, rate)
    reached, source = (CPU if device == "cpu" else OTHER), "its matmul, measured when the run began"
    inf = math.inf
    return Device(name, usable(device), inf, inf, inf, peak, reached, source, is_cpu=device != "cuda")
