"""What `lumina.planner.prior.SHIPPED` holds, and how often forecasts held the end: from the recorded curves.

    python benchmarks/planner/forecasts.py constants | coverage | memory

`constants` are measured on the runs marked so; `coverage` replays forecasts of all other runs; `memory` compares
lengths of the annealing area's memory.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lumina.planner.curve import Curve, Evaluated
from lumina.planner.deviation import deviation
from lumina.planner.findings import findings
from lumina.planner.forecast import NEWEST, Aim, Forecast, View, forecast, window
from lumina.planner.prior import EXPONENTS, SHIPPED, Prior
from lumina.planner.schedule import Schedule

CURVES = Path(__file__).with_name("curves.json")
SHARES = (0.3, 0.5, 0.7, 0.9)  # of a run, at which its end is forecast
EVEN = 0.3  # of the weight of exponents, spread evenly: a small collection excludes none
Recorded = dict[str, Any]


class Row(NamedTuple):
    """A forecast of a final held-out loss, and what it came to."""

    run: str
    share: float
    low: float
    mid: float
    high: float
    final: float

    @property
    def inside(self) -> bool:
        return self.low <= self.final <= self.high


def recorded(use: str) -> list[Recorded]:
    """The runs for `constants`, or for `coverage`."""
    found: list[Recorded] = json.loads(CURVES.read_text())["runs"]
    return [run for run in found if run["use"] == use]


def curve_of(run: Recorded, until: int | None = None) -> Curve:
    """What was known of it behind step `until`."""
    steps = np.minimum(run["width"] * np.arange(1.0, len(run["losses"]) + 1), run["steps"])
    curve = Curve(
        run["width"],
        steps,
        np.array(run["losses"]),
        np.diff(steps, prepend=0.0),
        tuple(Evaluated(*one) for one in run["heldout"]),
    )
    return curve if until is None else curve.until(until)


def aim_of(run: Recorded) -> Aim:
    return Aim(Schedule.of(run["schedule"], run["phases"]), epochs=run["epochs"])


def constants(runs: Sequence[Recorded]) -> Prior:
    """The prior that these runs show, but for `ahead`, which is SHIPPED's."""
    found = [findings(curve_of(run), aim_of(run), 1.0) for run in runs]
    weights = np.mean([[one[f"exponent_{i}"] for i in range(len(EXPONENTS))] for one in found], axis=0)
    gains, drifts, repeats = ([one[name] for one in found if name in one] for name in ("gain", "drift", "repeat"))
    return replace(
        SHIPPED,
        exponents=tuple(float(weight) for weight in (1 - EVEN) * weights + EVEN / len(EXPONENTS)),
        gain=statistics.mean(gains),
        gain_spread=statistics.stdev(gains),
        drift=math.sqrt(statistics.mean(drift**2 for drift in drifts)),
        repeat=math.sqrt(statistics.mean(repeat**2 for repeat in repeats)) if repeats else SHIPPED.repeat,
        wobble=statistics.median(one["wobble"] for one in found),
        runs=len(found),
    )


def replay(runs: Sequence[Recorded], prior: Prior = SHIPPED) -> Iterator[Row]:
    """The forecasts of each run at `SHARES`."""
    for run in runs:
        for share in SHARES:
            found = forecast(curve_of(run, int(share * run["steps"])), aim_of(run), prior)
            if isinstance(found, Forecast) and found.heldout:
                yield Row(run["name"], share, *found.heldout, run["heldout"][-1][1])


def deviations(runs: Sequence[Recorded], prior: Prior = SHIPPED) -> list[float]:
    """The z of every tenth of each of these healthy runs."""
    found = []
    for run in runs:
        aim = aim_of(run)
        for tenth in range(3, 11):
            curve = curve_of(run, tenth * run["steps"] // 10)
            points = View(aim.schedule, window(curve, aim)[0]).points(curve)
            one = deviation(points, round(NEWEST * run["steps"] / curve.width), aim.prior(prior))
            found += [one.z] if one else []
    return found


def left_out(runs: Sequence[Recorded], ahead: float) -> list[Row]:
    """Each run's forecasts with constants of the others: what `ahead` was chosen by."""
    return [
        row
        for i, run in enumerate(runs)
        for row in replay([run], replace(constants([*runs[:i], *runs[i + 1 :]]), ahead=ahead))
    ]


def table(rows: Sequence[Row]) -> list[dict[str, float]]:
    """For each share, and for all: how many, how many inside, the median width and error in nats."""
    groups = [(share, [row for row in rows if row.share == share]) for share in SHARES] + [(0.0, list(rows))]
    return [
        {
            "share": share,
            "n": len(mine),
            "inside": sum(row.inside for row in mine),
            "width": round(statistics.median(row.high - row.low for row in mine), 3),
            "error": round(statistics.median(abs(row.final - row.mid) for row in mine), 3),
        }
        for share, mine in groups
    ]


def as_lines(rows: Sequence[Row]) -> list[str]:
    lines = ["| at | forecasts | inside | median width, nats | median error, nats |", "|---|---|---|---|---|"]
    for one in table(rows):
        at = f"{one['share']:.0%} of the run" if one["share"] else "all"
        held = f"{one['inside']} ({one['inside'] / one['n']:.0%})"
        lines.append(f"| {at} | {one['n']} | {held} | {one['width']:.3f} | {one['error']:.3f} |")
    return lines


def said_of_deviations(runs: Sequence[Recorded]) -> str:
    zs = np.abs(deviations(runs))
    beyond = ", ".join(f"{np.mean(zs > z):.1%} beyond {z}" for z in (2, 3, 4))
    return f"{len(zs)} deviations of healthy runs: {beyond} standard deviations."


def off_by(run: Recorded, memory: float) -> float:
    """How far the held-out losses behind the warm-up are from the form, in nats (root mean square), with the S2 of this
    lambda; the best of the exponents."""
    schedule = aim_of(run).schedule
    steps = np.arange(1.0, schedule.steps + 1)
    falls = np.diff(schedule.fallen(steps), prepend=0.0)
    momentum, areas = 0.0, []
    for fall in falls:
        momentum = memory * momentum + fall
        areas.append(momentum)
    S2 = np.cumsum(areas)
    seen = [one for one in run["heldout"] if one[0] > schedule.warm + 0.1 * schedule.steps]
    at, losses = np.array([one[0] for one in seen]) - 1, np.array([one[1] for one in seen])
    x = schedule.area(steps) / schedule.area(steps[-1:])
    best = math.inf
    for exponent in EXPONENTS:
        X = np.stack([np.ones(len(at)), x[at] ** -exponent, -S2[at] / S2[-1]], axis=1)
        left = losses - X @ np.linalg.lstsq(X, losses, rcond=None)[0]
        best = min(best, math.sqrt(float(left @ left) / (len(at) - 4)))
    return best


def memory_lines() -> list[str]:
    runs = [run for use in ("constants", "coverage") for run in recorded(use)]
    runs = [run for run in runs if run["schedule"] == "wsd" and run["epochs"] <= 1 and len(run["heldout"]) > 7]
    lines = [f"| λ | median of {len(runs)} runs, nats | mean |", "|---|---|---|"]
    for memory in (0.999, 0.99, 0.95, 0.9, 0.0):
        off = [off_by(run, memory) for run in runs]
        lines.append(f"| {memory:g} | {statistics.median(off):.4f} | {statistics.mean(off):.4f} |")
    return lines


if __name__ == "__main__":
    match sys.argv[1]:
        case "constants":
            print(constants(recorded("constants")))
            for ahead in (0.1, 0.15, 0.2, 0.25, 0.3):
                rows = left_out(recorded("constants"), ahead)
                print(f"ahead {ahead}: {sum(row.inside for row in rows)} of {len(rows)}, each run left out once")
        case "coverage":
            print("\n".join([*as_lines(list(replay(recorded("coverage")))), said_of_deviations(recorded("coverage"))]))
        case "memory":
            print("\n".join(memory_lines()))
