"""What is forecast of a run when it begins, as it stands in its `plan.json`; docs/planning.md has the keys.

Nothing reads it but `lumina plan RUN` and the forecasts on the way: a run that lost it trains on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.events import Event
from lumina.model.cost import count
from lumina.planner import memory, time
from lumina.planner.calibration import Store
from lumina.planner.deviation import Reference
from lumina.planner.findings import prior_of, reference_of, sort_of, tokens_per_param
from lumina.planner.hardware import Fleet
from lumina.planner.laws import Interval, Law, params_of
from lumina.planner.outlook import Optimum, aim_of
from lumina.planner.prior import SHIPPED, Prior
from lumina.planner.traits import mismatch

VERSION = 1
NAME = "plan.json"


def outset(
    config: Config,
    begun: Event,
    fleet: Fleet,
    store: Store,
    law: Law,
    before: int = 0,
) -> dict[str, Any]:
    """All that is known of a settled run before its first step, as plain values.

    `begun` is its `run` event; `before` are the bytes that the process held before the model. A part that cannot be
    forecast is None, with the reason in `missing`.
    """
    tokens: Mapping[str, int] = begun["data"]["tokens"]
    trained, missing = time.steps_of(config) * config.train.batch_tokens, dict[str, str]()
    parts: dict[str, Any] = {"step_seconds": None, "seconds": None, "memory": None}
    for make in (_times, _memory):
        try:
            parts |= make(config, fleet, store, tokens)
        except UserError as error:
            missing[make.__name__.removeprefix("_")] = error.message
    params = params_of(count(config.model), law)
    return {
        "version": VERSION,
        "steps": time.steps_of(config),
        "tokens": trained,
        "unique_tokens": tokens["train"],
        "epochs": trained / tokens["train"],
        "device": fleet.device.name,
        "devices": fleet.count,
        **parts,
        "memory_before": before,
        "loss": {
            "law": law.name,
            "source": law.source,
            "counts": law.counts,
            "params": params,
            **law.interval(lambda one: one.loss(params, trained))._asdict(),
            "optimum_tokens": law.tokens_for(params),
            "notes": [note for note in (law.note, mismatch(law, config), *law.outside(params, trained)) if note],
        },
        "prior": asdict(prior_of([entry.figures for entry in store.entries])),
        "reference": _reference(config, begun, store),
        "missing": missing,
    }


def _reference(config: Config, begun: Event, store: Store) -> dict[str, Any] | None:
    """The newest own run of the same sort, whose curve this one is held against; None if there is none."""
    runs = [
        (f"a {entry.kind} run that ended {datetime.fromtimestamp(entry.at, UTC):%Y-%m-%d %H:%M} UTC", entry.figures)
        for entry in store.entries
        if entry.kind == config.model.kind
    ]
    found = reference_of(runs, sort_of(aim_of(config, begun), tokens_per_param(config, begun)))
    return None if found is None else asdict(found)


def _times(config: Config, fleet: Fleet, store: Store, tokens: Mapping[str, int]) -> dict[str, Any]:
    device, kind, precision = fleet.device.name, config.model.kind, config.precision.mode
    measured = store.lookup(device, config, fleet.count)
    ratios = {bound: store.figures(f"ratio_{bound}", device, kind, precision) for bound in time.BOUNDS}
    step = time.step_time(config, fleet, measured, ratios)
    run = time.run_time(config, step, fleet, tokens["heldout"], measured)
    told = {**step.seconds._asdict(), "bound": step.bound, "source": step.source, "measured": step.measured}
    bare = time.step_time(config, fleet)
    told["uncorrected"] = {"mid": bare.seconds.mid, "bound": bare.bound}  # without what was measured before
    return {
        "step_seconds": told,
        "seconds": {**run.total._asdict(), "parts": dict(run.parts), "uncounted": list(run.uncounted)},
    }


def _memory(config: Config, fleet: Fleet, store: Store, tokens: Mapping[str, int]) -> dict[str, Any]:
    needed = memory.memory(config, fleet.count, "cpu" if fleet.device.is_cpu else "cuda")
    return {"memory": {"total": needed.total, "moment": needed.moment, "parts": dict(needed.parts)}}


def read(run: Path) -> dict[str, Any] | None:
    """The `plan.json` of a run's folder; None if it has none, or one that is damaged or of another version."""
    try:
        found = json.loads((run / NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("version") == VERSION else None


def interval(values: Mapping[str, Any] | None) -> Interval | None:
    """What `outset` wrote as low, mid and high."""
    return None if values is None else Interval(values["low"], values["mid"], values["high"])


def prior(found: Mapping[str, Any] | None) -> Prior:
    """What forecasts on the way begin with: as it was when the run began, so that a resumed run goes on with it."""
    try:
        values = (found or {})["prior"]
        return Prior(**{**values, "exponents": tuple(values["exponents"])})
    except (KeyError, TypeError):
        return SHIPPED


def reference(found: Mapping[str, Any] | None) -> Reference | None:
    """The curve that the run is held against, likewise."""
    try:
        values = (found or {})["reference"]
        return values and Reference(values["name"], tuple(map(float, values["losses"])))
    except (KeyError, TypeError, ValueError):
        return None


def optimum(found: Mapping[str, Any] | None) -> Optimum | None:
    """The compute-optimal tokens of the model, by the law that the run began with."""
    try:
        loss = (found or {})["loss"]
        return Optimum(str(loss["law"]), float(loss["optimum_tokens"]))
    except (KeyError, TypeError, ValueError):
        return None
