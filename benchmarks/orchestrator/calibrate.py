"""What each detector costs in false alarms on recorded healthy runs, and how soon it hears faults put into them.

    python benchmarks/orchestrator/calibrate.py            # prints the tables of calibration.md; 2 minutes

Beside them stand the rules of OLMo-core's SkipStep (mean + 6 standard deviations of the last 128 losses or gradient
norms) and of ZClip (2.5 standard deviations of a moving average of the gradient norm, 0.97; Kumar et al. 2025) on the
same curves. What was not recorded is held constant: update ratio, Adam's RMS, log Z, the golden batch, contents; rules
that judge it are left out, and others count the steps of runs that have what they judge.
"""

from __future__ import annotations

import json
import lzma
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lumina.config.resolve import resolve
from lumina.model.cost import depth_stages
from lumina.orchestrator.detectors.table import DETECTORS
from lumina.orchestrator.protocol import Look, Observation, Stage
from lumina.orchestrator.signals import Facts, Signals

FIXTURE = Path(__file__).parents[2] / "tests" / "orchestrator" / "healthy.json.xz"
AT = 0.45  # of a run, where faults are put in: behind the warm-up, before any decay
QUIET = 200  # steps after a finding in which the same one is not new
CONSTANT = (
    "invariant",
    "looked",
    "off_plan",
    "loader",
    "golden",
    "attention",
    "router_gradient",
)  # what these judge was not recorded
EXPERTS, DEPTH = ("moe", "hybrid"), ("mod", "hybrid")
KINDS = {
    "starvation": EXPERTS,
    "collapse": EXPERTS,
    "over_balance": EXPERTS,
    "mod_capacity": DEPTH,
    "mod_agreement": DEPTH,
}
Recorded = dict[str, Any]


@dataclass
class Curve:
    """A recorded run as it would have been fed to the orchestrator."""

    name: str
    facts: Facts
    steps: list[Observation]
    looks: dict[int, Look]
    forecasts: dict[int, dict[str, Any]]
    phases: list[dict[str, Any]] = field(default_factory=list)

    @property
    def at(self) -> int:
        """The step that faults begin with."""
        first = self.phases[0]
        return int(AT * (first["end"] - first["begin"]))


def recorded(path: Path = FIXTURE) -> list[Curve]:
    runs = json.loads(lzma.decompress(path.read_bytes()))["runs"]
    return [curve(run) for run in runs]


def curve(run: Recorded) -> Curve:
    config = resolve("tiny", run["keys"]).config
    values, steps = run["step"], len(run["step"]["loss"])
    moe, mod = _spread(run, "moe", steps), _spread(run, "mod", steps)
    ends, end = set(), 0
    if config.model.mod:
        for _, length in depth_stages(config.model.mod, steps):
            end += length
            ends.add(end)
    seen = [
        Observation(
            step=i + 1,
            tokens=(i + 1) * config.train.batch_tokens,
            loss=values["loss"][i],
            acc=values["acc"][i],
            lr=values["lr"][i],
            clip=1.0,
            stage=_stage(run["phases"], i + 1),
            changed=_changed(run["phases"], ends, i + 1),
            grad_norm=values["grad_norm"][i],
            grad_embed=0.0,
            grad_head=None,
            grad_router=None,
            update_ratio=1e-3,
            adam_rms=1.0,
            log_z=1.0,
            skipped=False,
            batch=i,
            content=f"{i:x}",
            load=tuple(map(tuple, moe[i]["load"])) if moe else (),
            entropy=tuple(moe[i]["entropy"]) if moe else (),
            capacity=tuple(mod[i]["taken"]) if mod else (),
            agreement=values["agree"][i],
        )
        for i in range(steps)
    ]
    looks = {e["step"]: Look(e["step"], e["loss"], e["loss"], 1.0, tuple(e["churn"] or ())) for e in run["probe"]}
    forecasts = {event["step"]: event for event in run["forecast"]}
    return Curve(run["name"], Facts.of(config), seen, looks, forecasts, run["phases"])


def _spread(run: Recorded, kind: str, steps: int) -> list[dict[str, Any]]:
    """What a `moe` or `mod` event tells of `every` steps together, for each of them."""
    events = run[kind]
    return [events[min(i // run["every"], len(events) - 1)] for i in range(steps)] if events else []


def _stage(phases: list[dict[str, Any]], step: int) -> Stage:
    phase = next(phase for phase in reversed(phases) if step > phase["begin"])
    if step - phase["begin"] <= phase["warmup"]:
        return "warmup"
    return "decay" if step > phase["end"] - phase["decay"] else "stable"


def _changed(phases: list[dict[str, Any]], ends: set[int], step: int) -> str:
    if any(step == phase["begin"] + 1 for phase in phases[1:]):
        return "phase"
    return "capacity" if step - 1 in ends else ""


# -- what is heard -----------------------------------------------------------------------------------------------------


@dataclass
class Heard:
    """Of one run: steps at which each rule spoke anew, and in how many it was armed."""

    alarms: dict[str, list[int]]
    armed: dict[str, int]


def listen(run: Curve, only: str = "") -> Heard:
    signals, last = Signals(run.facts), dict[str, int]()
    heard = Heard({one.name: [] for one in DETECTORS}, {one.name: 0 for one in DETECTORS})
    chosen = [one for one in DETECTORS if only in ("", one.name)]
    for seen in run.steps:
        signals.observe(seen)
        on = {"step"}
        if look := run.looks.get(seen.step):
            signals.looked(look)
            on.add("look")
        if said := run.forecasts.get(seen.step):
            signals.forecast(said)
            on.add("forecast")
        for detector in chosen:
            heard.armed[detector.name] += detector.armed(signals)
            if detector.on in on and detector(signals):
                if seen.step - last.get(detector.name, -QUIET) >= QUIET:
                    heard.alarms[detector.name].append(seen.step)
                last[detector.name] = seen.step
    return heard


def olmo(run: Curve) -> list[int]:
    """Steps that OLMo-core's SkipStep would skip: loss or gradient norm above mean + 6 standard deviations of the last
    128, from 64 on (`optim/skip_step_optimizer.py`); a NaN in the window makes both NaN, and every comparison false,
    which there skips the step."""
    skipped, windows = [], ([], [])  # type: tuple[list[int], tuple[list[float], list[float]]]
    for seen in run.steps:
        now = seen.loss, seen.grad_norm
        if not all(_within(*pair) for pair in zip(now, windows, strict=True) if len(pair[1]) >= 64):
            skipped.append(seen.step)
        for value, window in zip(now, windows, strict=True):
            window.append(value)
            del window[:-128]
    return skipped


def _within(value: float, window: list[float]) -> bool:
    mean = math.fsum(window) / len(window) if all(map(math.isfinite, window)) else math.nan
    spread = math.sqrt(math.fsum((one - mean) ** 2 for one in window) / (len(window) - 1))
    return value <= mean + 6 * spread


def zclip(run: Curve) -> list[int]:
    """Steps whose gradient ZClip would clip beyond 1: z above 2.5 of moving mean and variance with 0.97, after 25."""
    clipped: list[int] = []
    first = [seen.grad_norm for seen in run.steps[:25]]
    mean, variance = statistics.fmean(first), statistics.pvariance(first)
    for seen in run.steps[25:]:
        spread, norm = math.sqrt(variance), seen.grad_norm
        z = (norm - mean) / (spread + 1e-6)
        if z > 2.5:
            clipped.append(seen.step)
            norm = mean + 2.5**2 / z * spread
        mean, variance = 0.97 * mean + 0.03 * norm, 0.97 * variance + 0.03 * (norm - mean) ** 2
    return clipped


def anew(steps: list[int]) -> list[int]:
    """Alarms with `QUIET` steps of silence before them."""
    return [step for i, step in enumerate(steps) if not i or step - steps[i - 1] >= QUIET]


# -- what is put in ----------------------------------------------------------------------------------------------------

Put = Callable[[Observation, int, list[Observation]], Observation]  # a step, steps since the fault, those before


def shift(nats: float) -> Put:
    return lambda seen, n, past: replace(seen, loss=seen.loss + nats, grad_norm=2 * seen.grad_norm)


def rise(nats: float) -> Put:
    return lambda seen, n, past: replace(seen, loss=seen.loss + nats * n)


def spike(nats: float) -> Put:
    def put(seen: Observation, n: int, past: list[Observation]) -> Observation:
        return seen if n else replace(seen, loss=seen.loss + nats, grad_norm=10 * seen.grad_norm)

    return put


def nan(seen: Observation, n: int, past: list[Observation]) -> Observation:
    return seen if n else replace(seen, grad_norm=math.nan, skipped=True)


def again(period: int) -> Put:
    def put(seen: Observation, n: int, past: list[Observation]) -> Observation:
        return replace(seen, content=past[-n - period + n % period].content)

    return put


def explode(seen: Observation, n: int, past: list[Observation]) -> Observation:
    return replace(seen, grad_norm=100 * seen.grad_norm)


def rate(factor: float) -> Put:
    return lambda seen, n, past: replace(seen, lr=factor * seen.lr)


def die(seen: Observation, n: int, past: list[Observation]) -> Observation:
    def layer(load: tuple[float, ...]) -> tuple[float, ...]:
        first, *rest = load
        return (0.0, *(value * len(load) / (len(load) - first) for value in rest))

    return replace(seen, load=tuple(map(layer, seen.load)))


def starve(seen: Observation, n: int, past: list[Observation]) -> Observation:
    def layer(load: tuple[float, ...]) -> tuple[float, ...]:
        first, *rest = load
        return (0.001, *(value * (len(load) - 0.001) / (len(load) - first) for value in rest))

    return replace(seen, load=tuple(map(layer, seen.load)))


def collapse(seen: Observation, n: int, past: list[Observation]) -> Observation:
    return replace(seen, load=tuple((len(one) / 2, len(one) / 2, *(0.0,) * (len(one) - 2)) for one in seen.load))


def nearly(seen: Observation, n: int, past: list[Observation]) -> Observation:
    return replace(seen, load=tuple((0.49 * len(one), 0.49 * len(one), *_rest(len(one))) for one in seen.load))


def _rest(experts: int) -> tuple[float, ...]:
    return (0.02 * experts / (experts - 2),) * (experts - 2)


def even(seen: Observation, n: int, past: list[Observation]) -> Observation:
    return replace(seen, load=tuple((1.0,) * len(one) for one in seen.load))


def wide(seen: Observation, n: int, past: list[Observation]) -> Observation:
    return replace(seen, capacity=tuple(3 * value for value in seen.capacity))


def disagree(seen: Observation, n: int, past: list[Observation]) -> Observation:
    assert seen.agreement is not None
    return replace(seen, agreement=seen.agreement - 0.2)


FAULTS: list[tuple[str, str, str, Put]] = [  # fault, who should hear it, the kinds it is for, what it does to a step
    ("a gradient is NaN, one step", "non_finite", "", nan),
    ("the loss 4 nats higher, one step", "spike", "", spike(4.0)),
    ("the loss 1 nat higher, for good", "divergence", "", shift(1.0)),
    ("the loss rises by 0.01 nats a step", "divergence", "", rise(0.01)),
    ("the loss 1 nat higher, for good", "drift plateau", "", shift(1.0)),
    ("the gradient norm 100 times, for good", "explosion", "", explode),
    ("one batch again and again", "loader", "", again(1)),
    ("four batches again and again", "loader", "", again(4)),
    ("ten times the learning rate", "pace", "", rate(10.0)),
    ("a fiftieth of the learning rate", "pace", "", rate(0.02)),
    ("an expert gets nothing", "starvation", "moe hybrid", die),
    ("an expert gets 0.001 of the mean", "starvation", "moe hybrid", starve),
    ("two experts get all", "collapse", "moe hybrid", collapse),
    ("two experts get nearly all", "collapse", "moe hybrid", nearly),
    ("every load the mean", "over_balance", "moe hybrid", even),
    ("depth capacity three times", "mod_capacity", "mod hybrid", wide),
    ("depth agreement 0.2 lower", "mod_agreement", "mod hybrid", disagree),
]


def faulty(run: Curve, put: Put, nats: float = 0.0) -> Curve:
    """The run with a fault from `run.at` on; its forecasts see so many nats more, at the noise that they had."""
    steps: list[Observation] = []
    for seen in run.steps:
        steps.append(put(seen, seen.step - run.at, steps) if seen.step >= run.at else seen)
    forecasts = deepcopy(run.forecasts)
    for event in forecasts.values():
        if nats and event["step"] > run.at:
            found = event["deviation"]
            noise = abs(found["nats"] / found["z"]) if found["z"] else 1.0
            found["nats"] += nats
            found["z"] = found["nats"] / noise
    return replace(run, steps=steps, forecasts=forecasts)


def delay(run: Curve, rules: str, put: Put) -> int | None:
    """Steps from the fault to the first finding of one of the rules; None if none comes while the phase lasts."""
    nats = 1.0 if rules.startswith("drift") else 0.0
    broken = faulty(run, put, nats)
    alarms = [step for rule in rules.split() for step in listen(broken, rule).alarms[rule] if step >= run.at]
    return min(alarms) - run.at if alarms else None


def meant(runs: list[Curve], kinds: str) -> list[Curve]:
    """Runs that a fault is put into: of these kinds, and long enough after it for routers to be judged."""
    if not kinds:
        return runs
    return [run for run in runs if run.name.split()[0] in kinds.split() and len(run.phases) == 1]


def later(run: Curve, put: Put, rule: Callable[[Curve], list[int]]) -> int | None:
    """Steps from the fault to the first that another rule acts on, within `QUIET`, and would not without the fault."""
    healthy = set(rule(run))
    alarms = [step for step in rule(faulty(run, put)) if 0 <= step - run.at < QUIET and step not in healthy]
    return alarms[0] - run.at if alarms else None


# -- the tables --------------------------------------------------------------------------------------------------------


def false_alarms(runs: list[Curve]) -> Iterator[tuple[str, int, int]]:
    """Of each rule: its name, false alarms, and the steps in which it was armed."""
    heard = [(run.name.split()[0], listen(run)) for run in runs]
    for name in (one.name for one in DETECTORS if one.name not in CONSTANT):
        mine = [one for kind, one in heard if kind in KINDS.get(name, (kind,))]
        yield name, sum(len(one.alarms[name]) for one in mine), sum(one.armed[name] for one in mine)
    for name, rule, least in (("SkipStep", olmo, 64), ("ZClip", zclip, 25)):
        yield name, sum(len(anew(rule(run))) for run in runs), sum(len(run.steps) - least for run in runs)
        yield f"{name}, every step", sum(len(rule(run)) for run in runs), sum(len(run.steps) - least for run in runs)


def main() -> None:
    runs = recorded(*map(Path, sys.argv[1:]))
    steps = sum(len(run.steps) for run in runs)
    print(f"{len(runs)} runs, {steps:,} steps\n")
    print("| rule | false alarms | armed steps | in 10,000 |\n|---|---|---|---|")
    for name, alarms, armed in false_alarms(runs):
        print(f"| {name} | {alarms} | {armed:,} | {1e4 * alarms / max(1, armed):.2f} |")
    print("\n| fault | heard by | runs | heard in | median delay | longest | SkipStep | ZClip |")
    print("|---|---|---|---|---|---|---|---|")
    for fault, rules, kinds, put in FAULTS:
        chosen = meant(runs, kinds)
        delays = [delay(run, rules, put) for run in chosen]
        others = " | ".join(_briefly([later(run, put, rule) for run in chosen]) for rule in (olmo, zclip))
        print(f"| {fault} | {rules.replace(' ', ' or ')} | {len(chosen)} | {_said(delays)} | {others} |")


def _briefly(delays: list[int | None]) -> str:
    found = [one for one in delays if one is not None]
    return f"{len(found)}, after {statistics.median(found):g}" if found else "0"


def _said(delays: list[int | None]) -> str:
    """How many there are, their median and the longest."""
    found = sorted(one for one in delays if one is not None)
    return f"{len(found)} | {statistics.median(found):g} | {found[-1]}" if found else "0 | – | –"


if __name__ == "__main__":
    main()
