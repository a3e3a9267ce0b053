"""How long a step and a run take, and what that costs.

A step takes as long as the slowest of four things: its arithmetic at the utilisation that trainers reach, its bytes to
and from memory, its bytes between devices, and the operations that the host launches one by one. The last is what a
small model on a large GPU waits for, so that no time is ever independent of the model's size, and none goes to zero.

The interval's low end takes the highest utilisation and everything else hidden behind the slowest; its high end takes
the lowest utilisation and nothing hidden. It covers what trainers differ in, not a machine that others use, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.model.cost import count, mean_flops
from lumina.planner import work
from lumina.planner.hardware import Fleet
from lumina.planner.laws import Interval

# Seconds of an operation that is launched from Python, eager. On a GPU: 33.2, 56.1, 42.7 and 61.9 ms for 1,771 to
# 2,745 operations of a step (shape P, H200, 2026-11-26: benchmarks/planner/time.md): 18.7 to 23.1 us. On a CPU: tiny on
# one core of an AMD EPYC whose other core was busy took 21 and 24 us beside its arithmetic; an idle one half (assumed).
LAUNCH_GPU = (18e-6, 24e-6)
LAUNCH_CPU = (10e-6, 24e-6)
# Of a block's operations, what is left when it is compiled: 0.55, 0.62 and 0.51 for the forward and backward passes of
# 125M dense, MoE and MoD on the same GPU, at 21 us each. `auto` may become either.
COMPILED = {"on": (0.5, 0.65), "off": (1.0, 1.0), "auto": (0.5, 1.0)}
OF_BANDWIDTH = 0.6  # assumed: what a stream of many small tensors reaches at least of a memory's or a link's rate
SPREAD = 1.3  # assumed: factor by which one shape's actual / forecast differs from another's on the same device
Figures = Mapping[str, float]
BOUNDS = ("arithmetic", "memory", "exchange", "launches")


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, what bounds it, what each bound would be alone, and where that is from."""

    seconds: Interval
    bound: str
    parts: Mapping[str, Interval] = field(default_factory=dict)
    source: str = ""
    measured: bool = False

    def mfu(self, config: Config, fleet: Fleet) -> Interval:
        """Counted FLOPs over the peak of all devices: of the slowest, the middle and the fastest."""
        flops = work.of(config, fleet.count).flops
        peak = fleet.count * fleet.device.rate(config.precision.mode)
        return Interval(*(flops / (seconds * peak) for seconds in reversed(self.seconds)))


@dataclass(frozen=True)
class RunTime:
    """Seconds of a whole run, and of its parts at their middle; `uncounted` names what is in none of them."""

    total: Interval
    parts: Mapping[str, float]
    uncounted: tuple[str, ...] = ()


def step_seconds(config: Config, fleet: Fleet, measured: Figures | None = None) -> Interval:
    """Seconds of a step of a settled configuration; `measured` are figures of just this, from the calibration."""
    return step_time(config, fleet, measured).seconds


def step_time(
    config: Config, fleet: Fleet, measured: Figures | None = None, ratios: Mapping[str, Sequence[float]] | None = None
) -> StepTime:
    """As `step_seconds`, with what bounds it. `ratios` are actual / forecast of other shapes here, by what bound those.

    Raises `UserError` if the device has no units for the precision.
    """
    if measured and "step" in measured:
        step = measured["step"]
        seconds = Interval(measured.get("step_low", step), step, measured.get("step_high", step))
        return StepTime(seconds, "measured", {}, "measured here, of this configuration", measured=True)
    forecast = _forecast(config, fleet)
    if ratios and (known := ratios.get(forecast.bound)):
        middle = forecast.seconds.mid * math.exp(sum(map(math.log, known)) / len(known))
        low, high = (forecast.seconds.mid * edge for edge in (min(known) / SPREAD, max(known) * SPREAD))
        shapes = "another shape" if len(known) == 1 else f"{len(known)} other shapes"
        source = f"corrected by what {shapes} took here"
        return StepTime(Interval(low, middle, high), forecast.bound, forecast.parts, source)
    return forecast


def _forecast(config: Config, fleet: Fleet) -> StepTime:
    device, does = fleet.device, work.of(config, fleet.count)
    rate = device.rate(config.precision.mode) * fleet.count
    mfu, efficiency = device.mfu(config.model.kind), fleet.efficiency
    # What published runs reach of a GPU is alike with recomputation and without (`hardware.HOPPER`), so it is in there;
    # none of the dense ones orthogonalised. What is known of CPUs was measured without either.
    flops = does.flops + does.muon_flops + (does.recomputed_flops if device.is_cpu else 0.0)
    launch = [
        seconds * (does.launches + left * does.block_launches)
        for seconds, left in zip(
            LAUNCH_CPU if device.is_cpu else LAUNCH_GPU, COMPILED[config.train.compile], strict=True
        )
    ]
    best = {
        "arithmetic": flops / (rate * mfu[1] * efficiency[1]),
        "memory": does.memory_bytes / (fleet.count * device.bandwidth),
        "exchange": does.exchanged_bytes / fleet.link,
        "launches": launch[0],
    }
    worst = {
        "arithmetic": flops / (rate * mfu[0] * efficiency[0]),
        "memory": best["memory"] / OF_BANDWIDTH,
        "exchange": best["exchange"] / OF_BANDWIDTH,
        "launches": launch[1],
    }
    parts = {name: Interval(low, math.sqrt(low * worst[name]), worst[name]) for name, low in best.items()}
    bound = max(parts, key=lambda name: parts[name].mid)
    # A CPU launches and computes in turn; a GPU computes while the host launches.
    overlapped = (
        worst["launches"] + worst["arithmetic"] if device.is_cpu else max(worst["launches"], worst["arithmetic"])
    )
    high = overlapped + worst["memory"] + worst["exchange"]
    seconds = Interval(max(best.values()), parts[bound].mid, high)
    source = f"{device.name}: {device.source}; utilisation {mfu[0]:.0%} to {mfu[1]:.0%}"
    return StepTime(seconds, bound, parts, source)


def run_time(
    config: Config, step: StepTime, fleet: Fleet, heldout: float | None = None, measured: Figures | None = None
) -> RunTime:
    """Seconds of a run of a settled configuration, from its start to its end.

    `heldout` are the tokens that an evaluation reads, if that is known. Without `measured`, starting, compiling, saving
    and looking are not counted, and `uncounted` says so.
    """
    steps = steps_of(config)
    falling = mean_flops(config.model, steps, config.train.lora.rank)
    longer = falling / count(config.model, rank=config.train.lora.rank).flops_per_token
    counts = {
        "evaluation": evaluations(config, steps),
        "probe": _times(config.orchestrator.probe_every, steps - 1),
        "save": saves(config, steps, step.seconds.mid, measured or {}),
    }
    parts = {"steps": steps * longer * step.seconds.mid}
    if measured and "start" in measured:
        parts |= {name: measured[name] for name in ("start", "end") if name in measured}
        parts |= {f"{name}s": number * measured.get(name, 0.0) for name, number in counts.items()}
        aside = sum(parts.values()) - parts["steps"]
        low, high = (steps * longer * edge + aside for edge in (step.seconds.low, step.seconds.high))
        return RunTime(Interval(low, sum(parts.values()), high), parts)
    share = 0.0  # of a step, an evaluation: a third of the FLOPs of a trained token
    uncounted = ["starting", "compiling", "saving"]
    if heldout is None:
        uncounted.insert(0, "evaluating")
    else:
        share = counts["evaluation"] * heldout / 3 / config.train.batch_tokens
        parts["evaluations"] = share * step.seconds.mid
    whole = Interval(*((steps * longer + share) * edge for edge in step.seconds))
    return RunTime(whole, parts, tuple(uncounted))


def steps_of(config: Config) -> int:
    """Steps of a settled run. Raises `UserError` if its length is a time, which only a measurement turns into steps."""
    if config.train.steps is None:
        raise UserError("the plan needs a number of steps", fix="give train.tokens or train.steps")
    return config.train.steps


def steps_in(config: Config, step: float, seconds: float, measured: Figures | None = None) -> int:
    """Steps that fit into so many seconds, at `step` seconds each, less what starting and evaluating take; may be 0.

    `DEADLINE_RESERVE` is kept for those that are not measured, as `train.time` does.
    """
    fixed = sum((measured or {}).get(name, 0.0) for name in ("start", "end", "evaluation", "save"))
    left = max(0.0, seconds - fixed) * (1 if fixed else 1 - DEADLINE_RESERVE)
    return int(left / step)


DEADLINE_RESERVE = 0.05  # of the time, as in training.setup


def lasting(seconds: float) -> str:
    """`10 seconds`, `24 hours`, `35.7 days`."""
    units = ("second", 1, 180), ("minute", 60, 10800), ("hour", 3600, 3 * 86400), ("day", 86400, 1000 * 86400)
    unit, size = next(((unit, size) for unit, size, most in units if seconds < most), ("year", 365.25 * 86400))
    value = f"{seconds / size:.3g}"
    return f"{value} {unit}{'s' * (value != '1')}"


def price(seconds: Interval, fleet: Fleet, an_hour: float) -> Interval:
    """What a time costs at `an_hour` of each device."""
    return Interval(*(edge / 3600 * fleet.count * an_hour for edge in seconds))


def evaluations(config: Config, steps: int) -> int:
    """How often a run evaluates: every so often, and at its end."""
    return _times(config.train.eval_every, steps - 1) + 1


def saves(config: Config, steps: int, step: float, measured: Figures) -> int:
    """How often a run saves: every so often (`auto`: Young's interval for the measured stall), and at its end."""
    if config.checkpoint.every != "auto":
        return _times(config.checkpoint.every, steps - 1) + 1
    stall = measured.get("save", 0.0)
    every = max(1, round(math.sqrt(2 * config.checkpoint.mtbf * stall) / step)) if stall else 0
    return _times(every, steps - 1) + 1


def _times(every: int, steps: int) -> int:
    return steps // every if every else 0
