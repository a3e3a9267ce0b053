"""What a run is told of itself on the way: the fields of its `forecast` events, which docs/planning.md explains."""

from __future__ import annotations

from typing import Any, NamedTuple

from lumina.config.schema.config import Config
from lumina.config.units import span
from lumina.events import Event
from lumina.model.cost import depth_stages
from lumina.planner.curve import Curve
from lumina.planner.deviation import Reference, deviation
from lumina.planner.forecast import LEVEL, NEWEST, Aim, Forecast, Refusal, View, forecast, window
from lumina.planner.laws import Interval
from lumina.planner.prior import Prior
from lumina.planner.schedule import Schedule

DIGITS = 5  # significant ones: of more nothing is known


class Optimum(NamedTuple):
    """The tokens with which the model is the optimum of its compute, by which law."""

    law: str
    tokens: float


def aim_of(config: Config, begun: Event) -> Aim:
    """Where a settled run is going, by its configuration and its `run` event."""
    schedule = Schedule.of(config.train.schedule, begun["phases"])
    epochs = begun["steps"] * begun["batch_tokens"] / begun["data"]["tokens"]["train"]
    steps, data = schedule.steps, config.data
    settled = [(span(data.curriculum.until, steps), "the curriculum")] if data.curriculum.until else []
    if config.model.mod:
        stages = depth_stages(config.model.mod, steps)
        settled += [(sum(length for _, length in stages[:-1]), "the depth that settles")] if len(stages) > 1 else []
    never = ""
    if config.train.init_from:
        never = "the run began with weights of another: the form is of curves from the beginning"
    elif config.train.lora.rank:
        never = "adapters are trained: the form is of models that are trained whole"
    return Aim(schedule, *max(settled, default=(0, "")), never, epochs)


def outlook(
    curve: Curve, aim: Aim, prior: Prior, optimum: Optimum | None, batch_tokens: int, reference: Reference | None = None
) -> dict[str, Any]:
    """The fields, plain values; a pure function of what it is given."""
    said = forecast(curve, aim, prior)
    told: dict[str, Any] = {"share": round(curve.now / aim.schedule.steps, 4), "optimum": None}
    if optimum is not None:
        share = curve.now * batch_tokens / optimum.tokens
        told["optimum"] = {"law": optimum.law, "tokens": round(optimum.tokens), "share": _short(share)}
    if isinstance(said, Refusal):
        return told | {"refused": said.reason, "early": said.early}
    return (
        told
        | {"refused": None, "early": False}
        | _fields(said)
        | {"deviation": _deviation(curve, aim, prior, reference)}
    )


def _fields(said: Forecast) -> dict[str, Any]:
    now = said.decay_now
    return {
        "level": LEVEL,
        "train": _interval(said.train),
        "heldout": said.heldout and _interval(said.heldout),
        "decay_now": now and {"cost": _interval(now.cost), "end": now.end, "saved": now.saved},
        "exponent": _short(said.exponent),
        "begin": said.begin,
        "points": said.points,
    }


def _deviation(curve: Curve, aim: Aim, prior: Prior, reference: Reference | None) -> dict[str, Any] | None:
    begin, _ = window(curve, aim)
    points = View(aim.schedule, begin, curve.stretch).points(curve)
    newest = round(NEWEST * aim.schedule.steps / curve.width)
    found = deviation(points, newest, aim.prior(prior), reference)
    if found is None:
        return None
    return {"nats": _short(found.nats), "z": _short(found.z), "points": found.points, "against": found.against}


def _interval(value: Interval) -> dict[str, float]:
    return {name: _short(edge) for name, edge in value._asdict().items()}


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
