"""What the runs of a gauntlet came to: excess over healthy runs, and the measures that whoever watches is judged by."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lumina.verify.gauntlet.arms import Result
from lumina.verify.gauntlet.cases import CASES, SOUND, SUITES, WITHIN, Case, Heard
from lumina.verify.gauntlet.policies import FIXED

SIGMAS, HURTS = 2.0, 4.0
CONFIDENCE = 1.96  # standard normal quantile of 95 %
Share = tuple[int, int]  # so many of so many


@dataclass(frozen=True)
class Score:
    """Of one case and kind in one mode, over its seeds. Excess: final loss above the healthy run's of the same seed."""

    case: Case
    kind: str
    mode: str
    runs: list[Result]
    alone: list[float]  # loss of the run that nobody watched, nats
    healthy: list[float]  # of the one that nothing was done to; of a trap that is another run: alone
    sigma: float  # standard deviation of healthy runs over seeds, nats; NaN if too few are known

    @property
    def nats(self) -> list[float]:
        """Excess."""
        return [run.loss - base for run, base in zip(self.runs, self.healthy, strict=True)]

    @property
    def excess(self) -> list[float]:
        """In sigma."""
        return [value / self.sigma for value in self.nats]

    @property
    def away(self) -> list[float]:
        """In sigma, of the run that nobody watched."""
        return [(value - base) / self.sigma for value, base in zip(self.alone, self.healthy, strict=True)]

    @property
    def hurt(self) -> list[bool]:
        """Whether the fault hurts the run alone, of which one that is not finite is hurt; empty if nobody knows."""
        return [self.case.fault and not value <= HURTS for value in self.away] if self.sigma > 0 else []

    @property
    def hurts(self) -> bool:
        """Whether it is a fault: it hurts most runs alone. Else it is one of the healthy set, whatever it is called."""
        return 2 * sum(self.hurt) > len(self.runs)

    @property
    def good(self) -> list[bool]:
        """Of a fault: within `SIGMAS`, or stopped with a right diagnosis where nothing else mends it. Of a trap: left
        alone, to the bit."""
        if self.case.stops:
            return [bool(run.stopped) and run.last_cause in self.case.causes for run in self.runs]
        if self.case.fault:
            return [value <= SIGMAS and not run.failed for value, run in zip(self.excess, self.runs, strict=True)]
        pairs = zip(self.runs, self.healthy, strict=True)
        return [not run.acted and not run.failed and run.loss == healthy for run, healthy in pairs]

    @property
    def rescued(self) -> list[bool]:
        """Of the runs that are hurt alone, whether they were good."""
        return [good for good, hurt in zip(self.good, self.hurt, strict=False) if hurt]

    @property
    def avoided(self) -> list[float]:
        """Share of the damage that was avoided, where there was any: 1 is none of it left."""
        pairs = (
            [pair for *pair, hurt in zip(self.excess, self.away, self.hurt, strict=True) if hurt] if self.hurt else []
        )
        return [1 - excess / away if math.isfinite(away) else float(excess <= HURTS) for excess, away in pairs]

    @property
    def causes(self) -> list[str]:
        """That were named: the one acted on, if any was; of what is to be stopped, the last."""
        return [run.last_cause if self.case.stops else run.cause for run in self.runs]

    @property
    def right(self) -> int:
        """Diagnoses that name a right cause."""
        return sum(cause in self.case.causes for cause in self.causes)

    @property
    def delays(self) -> list[int]:
        return [run.delay for run in self.runs if run.delay is not None]

    @property
    def acted(self) -> list[str]:
        return [one["action"] for run in self.runs for one in run.acted]

    @property
    def refused(self) -> list[str]:
        """Why trials were not held."""
        return [one["reason"] for run in self.runs for one in run.trials if one["kind"] == "refused"]


def scores(results: Sequence[Result]) -> list[Score]:
    """One for each case, kind and mode that watches."""
    of = {(r.arm.case, r.arm.kind, r.arm.seed, r.arm.mode): r for r in results}
    watched = dict.fromkeys((r.arm.case, r.arm.kind, r.arm.mode) for r in results if r.arm.mode != "off")
    spread, found = sigmas(results), []
    for name, kind, mode in watched:
        case = CASES[name]
        mine = [r for r in results if (r.arm.case, r.arm.kind, r.arm.mode) == (name, kind, mode)]
        alone = [_loss(of.get((name, kind, r.arm.seed, "off"))) for r in mine]
        healthy = [_loss(of.get((case.against, kind, r.arm.seed, "off"))) for r in mine]
        healthy = healthy if case.fault or case.undone else alone
        found.append(Score(case, kind, mode, mine, alone, healthy, spread.get((case.against, kind), math.nan)))
    return found


def _loss(result: Result | None) -> float:
    """NaN where it was not taken."""
    return result.loss if result else math.nan


def sigmas(results: Sequence[Result]) -> dict[tuple[str, str], float]:
    """Standard deviation of the final losses of the healthy runs of each case and kind, over seeds, in nats.

    That of their set, where it takes too few to tell.
    """
    found = {}
    for (case, kind), losses in sound(results).items():
        known = {SUITES[r.arm.suite].sigma.get(kind) for r in results if r.arm.case == case}
        given = next((value for value in known if value is not None), None)
        if given is not None or len(losses) > 1:
            found[case, kind] = statistics.stdev(losses) if given is None else given
    return found


def sound(results: Sequence[Result]) -> dict[tuple[str, str], list[float]]:
    """Final losses of the healthy runs of each case and kind."""
    losses: dict[tuple[str, str], list[float]] = {}
    for result in results:
        if result.arm.case in SOUND and result.arm.mode == "off":
            losses.setdefault((result.arm.case, result.arm.kind), []).append(result.loss)
    return losses


# -- whoever watches ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """Of one mode, over all that it watched."""

    mode: str
    rescued: Share  # of the runs that faults hurt alone, how many ended within `SIGMAS`
    avoided: float | None  # median share of the damage
    stopped: Share  # where nothing mends it, how many were stopped with a right diagnosis
    touched: Share  # of healthy runs, how many were acted on
    exact: Share  # of traps, how many are to the bit the run that nobody watched
    right: Share  # of the diagnoses of faults that hurt
    named: Mapping[tuple[str, str], int]  # right causes, the named one: how often
    delays: Mapping[Heard, list[int]]  # steps until the first decision, of faults that hurt
    unheard: int  # of these
    spent: list[float] = field(default_factory=list)  # on trials, over the steps of the run, of faults that hurt
    extra: list[float] = field(default_factory=list)  # steps computed beyond the run's own, likewise
    idle: list[float] = field(default_factory=list)  # the same of healthy runs


def measures(found: Sequence[Score]) -> list[Measures]:
    """Of each mode."""
    return [
        _measures(mode, [one for one in found if one.mode == mode]) for mode in dict.fromkeys(s.mode for s in found)
    ]


def _measures(mode: str, mine: Sequence[Score]) -> Measures:
    faults = [one for one in mine if one.hurts]
    mended = [one for one in faults if not one.case.stops]
    benign = [one for one in mine if not one.hurts and (one.hurt or not one.case.fault)]
    rescued = [good for one in mended for good in one.rescued]
    avoided = [share for one in mended for share in one.avoided]
    stopped = [good for one in faults if one.case.stops for good in one.good]
    touched = [bool(run.acted) for one in benign for run in one.runs]
    exact = [good for one in mine if not one.case.fault for good in one.good]
    named = Counter((" or ".join(sorted(one.case.causes)), cause or "none") for one in faults for cause in one.causes)
    runs = [run for one in faults for run in one.runs]
    delays: dict[Heard, list[int]] = {}
    for one in faults:
        delays.setdefault(one.case.heard, []).extend(one.delays)
    return Measures(
        mode,
        (sum(rescued), len(rescued)),
        statistics.median(avoided) if avoided else None,
        (sum(stopped), len(stopped)),
        (sum(touched), len(touched)),
        (sum(exact), len(exact)),
        (sum(one.right for one in faults), len(runs)),
        named,
        delays,
        sum(run.delay is None for run in runs),
        [run.spent for run in runs],
        [run.extra for run in runs],
        [run.extra for one in benign for run in one.runs],
    )


def soon(measured: Measures, heard: Heard) -> Share:
    """How many faults were heard as soon as they have to be."""
    delays = measured.delays.get(heard, [])
    return sum(delay <= WITHIN[heard] for delay in delays), len(delays)


@dataclass(frozen=True)
class Regret:
    """Of `mode` against fixed policies that are known to be best in hindsight: excess in sigma, of each run."""

    mode: str
    best: str  # the policy that rescues most, and of equal ones the one with the least median excess
    against: list[float]
    least: list[float]  # against the best policy for each run


def regret(found: Sequence[Score], mode: str = "act") -> Regret | None:
    """None where no fixed policy was taken."""
    fixed = [name for name in FIXED if name == "off" or any(one.mode == name for one in found)]
    mine = [one for one in found if one.mode == mode and one.hurts and not one.case.stops]
    theirs = {(one.case.name, one.kind, one.mode): one for one in found}
    shown = [one for one in mine if all((one.case.name, one.kind, name) in theirs for name in fixed[1:])]
    if len(fixed) < 2 or not shown:
        return None
    table: dict[str, list[float]] = {name: [] for name in (*fixed, mode)}
    for one in shown:
        rows = {run.arm.seed: value for run, value in zip(one.runs, one.excess, strict=True)}
        away = {run.arm.seed: value for run, value in zip(one.runs, one.away, strict=True)}
        others = {name: theirs[one.case.name, one.kind, name] for name in fixed[1:]}
        for seed in (run.arm.seed for run in next(iter(others.values())).runs if run.arm.seed in rows):
            table[mode].append(rows[seed])
            table["off"].append(away[seed])
            for name, other in others.items():
                table[name].append(next(v for r, v in zip(other.runs, other.excess, strict=True) if r.arm.seed == seed))

    def quality(name: str) -> tuple[int, float]:
        return -sum(value <= SIGMAS for value in table[name]), statistics.median(table[name])

    best = min(fixed, key=quality)
    least = [min(values) for values in zip(*(table[name] for name in fixed), strict=True)]
    own = table[mode]
    return Regret(mode, best, _less(own, table[best]), _less(own, least))


def _less(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Differences; where the other one is infinite there is nothing to regret."""
    return [value - other if math.isfinite(other) else 0.0 for value, other in zip(values, base, strict=True)]


def wilson(good: int, of: int) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % (Wilson 1927)."""
    share, z = good / of, CONFIDENCE
    middle = (share + z**2 / (2 * of)) / (1 + z**2 / of)
    half = z / (1 + z**2 / of) * math.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))
    return max(0.0, middle - half), min(1.0, middle + half)
