"""What the runs of a gauntlet came to: excess over healthy runs, and the measures that whoever watches is judged by."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lumina.errors import UserError
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
    alone: list[Result | None]  # that nobody watched; None: not taken
    healthy: list[Result | None]  # that nothing was done to; of a trap that is another run: alone
    sigma: float  # standard deviation of healthy runs over seeds, nats; NaN if too few are known
    hurts: bool | None  # whether it is a fault: on average it hurts runs alone; None: nobody knows

    @property
    def nats(self) -> list[float]:
        """Excess; NaN where there is nothing to hold it against."""
        return [_less(run, healthy) for run, healthy in zip(self.runs, self.healthy, strict=True)]

    @property
    def excess(self) -> list[float]:
        """In sigma."""
        return [value / self.sigma for value in self.nats]

    @property
    def away(self) -> list[float]:
        """In sigma, of the run that nobody watched."""
        pairs = zip(self.alone, self.healthy, strict=True)
        return [_less(alone, healthy) / self.sigma for alone, healthy in pairs]

    @property
    def hurt(self) -> list[bool]:
        """Whether the fault hurts the run alone."""
        return [self.case.fault and value > HURTS for value in self.away]

    @property
    def good(self) -> list[bool | None]:
        """Of a fault: within `SIGMAS`, or stopped with a right diagnosis where nothing else mends it. Of a trap: left
        alone, to the bit. None where there is nothing to hold it against."""
        if self.case.stops:
            return [bool(run.stopped) and run.last_cause in self.case.causes for run in self.runs]
        if self.case.fault:
            pairs = zip(self.excess, self.runs, strict=True)
            return [None if math.isnan(value) else value <= SIGMAS and not run.failed for value, run in pairs]
        both = zip(self.runs, self.healthy, strict=True)
        return [
            None if base is None else not (run.acted or run.failed or run.stopped) and run.same(base)
            for run, base in both
        ]

    @property
    def rescued(self) -> list[bool]:
        """Of the runs that are hurt alone, whether they were good."""
        return [bool(good) for good, hurt in zip(self.good, self.hurt, strict=True) if hurt]

    @property
    def avoided(self) -> list[float]:
        """Share of the damage that was avoided, where there was any: 1 is none of it left.

        Of a run that alone comes to no end: 1 if it is within `SIGMAS`, else 0.
        """
        pairs = [pair for *pair, hurt in zip(self.excess, self.away, self.hurt, strict=True) if hurt]
        return [1 - excess / away if math.isfinite(away) else float(excess <= SIGMAS) for excess, away in pairs]

    @property
    def touched(self) -> list[bool | None]:
        """Whether anything was done to it: decided, or seen by its losses. None if neither can be known."""
        return [_touched(run, alone) for run, alone in zip(self.runs, self.alone, strict=True)]

    @property
    def causes(self) -> list[str]:
        """That were named: the one acted on, if any was; of what is to be stopped, the last."""
        return [run.last_cause if self.case.stops else run.cause for run in self.runs]

    @property
    def right(self) -> int:
        """Diagnoses that name a right cause."""
        return sum(cause in self.case.causes for cause in self.causes)

    @property
    def delays(self) -> list[float]:
        """Infinite where it was never heard."""
        return [math.inf if run.delay is None else run.delay for run in self.runs]

    @property
    def acted(self) -> list[str]:
        return [one["action"] for run in self.runs for one in run.acted]

    @property
    def refused(self) -> list[str]:
        """Why trials were not held."""
        return [one["reason"] for run in self.runs for one in run.trials if one["kind"] == "refused"]


def _touched(run: Result, alone: Result | None) -> bool | None:
    if run.acted or run.stopped or run.crashed:
        return True
    if alone is None:
        return False if run.told else None
    return not run.same(alone)


def _less(run: Result | None, base: Result | None) -> float:
    return run.loss - base.loss if run and base else math.nan


def scores(results: Sequence[Result], alone: bool = False) -> list[Score]:
    """One for each case, kind and mode that watches, and with `alone` of those that nobody does.

    What crashed alone is no result; what crashed while it was watched has an infinite loss.

    Raises `UserError` if they are of several sets.
    """
    if len(suites := {result.arm.suite for result in results}) > 1:
        raise UserError(f"results of the sets {', '.join(sorted(suites))}: not to be mixed", fix="score each by itself")
    of = {r.arm: r for r in results if not (r.crashed and r.arm.mode == "off")}
    spread, found = sigmas(results), []
    known: dict[tuple[str, str], bool | None] = {}
    if alone:  # of a trap in which nothing is done it is the healthy run
        for arm in [arm for arm in of if CASES[arm.case].sound and arm.case not in SOUND]:
            if base := of.get(replace(arm, mode="off", case=CASES[arm.case].against)):
                of[replace(arm, mode="off")] = replace(base, arm=replace(arm, mode="off"))
    watched = dict.fromkeys((arm.case, arm.kind, arm.mode) for arm in of if alone or arm.mode != "off")

    def score(runs: list[Result], mode: str, hurts: bool | None) -> Score:
        case, kind = CASES[runs[0].arm.case], runs[0].arm.kind
        base = [of.get(replace(run.arm, mode="off", case=case.against)) for run in runs]
        off = base if case.sound else [of.get(replace(run.arm, mode="off")) for run in runs]
        sigma = spread.get((case.against, kind), math.nan)
        return Score(case, kind, mode, runs, off, base if case.fault or case.undone else off, sigma, hurts)

    for name, kind, mode in watched:
        case, sigma = CASES[name], spread.get((CASES[name].against, kind), math.nan)
        if alone and mode == "off" and name in SOUND:
            continue
        if (name, kind) not in known:
            every = [r for arm, r in of.items() if (arm.case, arm.kind, arm.mode) == (name, kind, "off")]
            away = score(every, "off", None).away if every and sigma > 0 else []
            away = [value for value in away if not math.isnan(value)]
            known[name, kind] = statistics.fmean(away) > HURTS if away else None  # once, for whoever watches
        hurts = False if not case.fault else known[name, kind]
        found.append(score([r for a, r in of.items() if (a.case, a.kind, a.mode) == (name, kind, mode)], mode, hurts))
    return found


def sigmas(results: Sequence[Result]) -> dict[tuple[str, str], float]:
    """Standard deviation of the final losses of the healthy runs of each case and kind, over seeds, in nats.

    That of their set, where it takes too few to tell.
    """
    found = {}
    for (case, kind), losses in sound(results).items():
        known = {SUITES[r.arm.suite].sigma.get(kind) for r in results if r.arm.case == case}
        given = next((value for value in known if value is not None), None)
        if given is not None or len(losses) > 2:
            found[case, kind] = statistics.stdev(losses) if given is None else given
    return {of: value for of, value in found.items() if value > 0}


def sound(results: Sequence[Result]) -> dict[tuple[str, str], list[float]]:
    """Final losses of the healthy runs of each case and kind that came to an end."""
    losses: dict[tuple[str, str], list[float]] = {}
    for result in {result.arm: result for result in results}.values():
        if result.arm.case in SOUND and result.arm.mode == "off" and math.isfinite(result.loss):
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
    restored: Share  # of harmless faults that were acted on, how many were set right, with a right diagnosis
    touched: Share  # of healthy runs, how many were acted on
    by_letter: Share  # the same, harmless faults among them
    exact: Share  # of traps, how many are to the bit the run that nobody watched
    kept: Share  # of trials that were held in traps, how many kept something
    right: Share  # of the diagnoses of runs that faults hurt, as all that follows
    named: Mapping[tuple[str, str], int]  # right causes, the named one: how often
    delays: Mapping[Heard, list[float]]  # steps until the first decision; infinite: never
    extra: list[float] = field(default_factory=list)  # steps computed beyond the run's own


def measures(found: Sequence[Score]) -> list[Measures]:
    """Of each mode."""
    modes = dict.fromkeys(one.mode for one in found)
    return [_measures(mode, [one for one in found if one.mode == mode]) for mode in modes]


def _measures(mode: str, mine: Sequence[Score]) -> Measures:
    faults = [one for one in mine if one.hurts]
    mended = [one for one in faults if not one.case.stops]
    rescued = [good for one in mended for good in one.rescued]
    avoided = [share for one in mended for share in one.avoided]
    hurt = [(one, run) for one in faults for run, known in enumerate(one.hurt) if known]
    healthy = [one for one in mine if not one.case.fault and not one.case.undone]
    told = [(one, run) for one, run in hurt if one.runs[run].told]
    trials = [trial for one in healthy for run in one.runs for trial in run.trials if trial["kind"] == "verdict"]
    stopped = [bool(one.good[run]) for one, run in hurt if one.case.stops]
    harmless = [one for one in mine if one.hurts is False and one.case.fault]
    ends = [(one, *end) for one in harmless for end in zip(one.runs, one.touched, one.good, one.causes, strict=True)]
    restored = [bool(good) and cause in one.case.causes for one, run, hit, good, cause in ends if hit and run.told]
    touched = [run for one in healthy for run in one.touched if run is not None]
    by_letter = [*touched, *(hit for _, _, hit, *_ in ends if hit is not None)]
    exact = [good for one in mine if not one.case.fault for good in one.good if good is not None]
    named = Counter((" or ".join(sorted(one.case.causes)), one.causes[run] or "none") for one, run in told)
    delays: dict[Heard, list[float]] = {}
    for one, run in told:
        delays.setdefault(one.case.heard, []).append(one.delays[run])
    return Measures(
        mode=mode,
        rescued=(sum(rescued), len(rescued)),
        avoided=statistics.median(avoided) if avoided else None,
        stopped=(sum(stopped), len(stopped)),
        restored=(sum(restored), len(restored)),
        touched=(sum(touched), len(touched)),
        by_letter=(sum(by_letter), len(by_letter)),
        exact=(sum(exact), len(exact)),
        kept=(sum(bool(trial.get("winner")) for trial in trials), len(trials)),
        right=(sum(one.causes[run] in one.case.causes for one, run in told), len(told)),
        named=named,
        delays=delays,
        extra=[extra for one, run in hurt if (extra := one.runs[run].extra) is not None],
    )


def soon(measured: Measures, heard: Heard) -> Share:
    """How many faults were heard as soon as they have to be."""
    delays = measured.delays.get(heard, [])
    return sum(delay <= WITHIN[heard] for delay in delays), len(delays)


@dataclass(frozen=True)
class Regret:
    """Of `mode` against fixed policies, best in hindsight: excess in sigma, of each run that a fault hurts."""

    mode: str
    best: str  # the policy that rescues most, and of equal ones the one with the least median excess
    against: list[float]
    least: list[float]  # against the best policy for each run


def regret(found: Sequence[Score], mode: str = "act") -> Regret | None:
    """None where no fixed policy was taken."""
    fixed = [name for name in FIXED if name == "off" or any(one.mode == name for one in found)]
    table: dict[str, dict[tuple[str, str, int], float]] = {name: {} for name in (*fixed, mode)}
    for one in found:
        if one.hurts and not one.case.stops and one.mode in table:
            for run, value, away, hurt in zip(one.runs, one.excess, one.away, one.hurt, strict=True):
                of = run.arm.run
                if hurt and not math.isnan(value):
                    table[one.mode][of], table["off"][of] = value, away
    shown = sorted(set.intersection(*(set(rows) for rows in table.values())))
    if len(fixed) < 2 or not shown:
        return None
    columns = {name: [rows[of] for of in shown] for name, rows in table.items()}

    def quality(name: str) -> tuple[int, float]:
        return -sum(value <= SIGMAS for value in columns[name]), statistics.median(columns[name])

    best, own = min(fixed, key=quality), columns[mode]
    least = [min(values) for values in zip(*(columns[name] for name in fixed), strict=True)]
    return Regret(mode, best, _beyond(own, columns[best]), _beyond(own, least))


def _beyond(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Differences; where the other one is infinite there is nothing to regret."""
    return [value - other if math.isfinite(other) else 0.0 for value, other in zip(values, base, strict=True)]


def wilson(good: int, of: int) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % (Wilson 1927)."""
    share, z = good / of, CONFIDENCE
    middle = (share + z**2 / (2 * of)) / (1 + z**2 / of)
    half = z / (1 + z**2 / of) * math.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))
    return max(0.0, middle - half), min(1.0, middle + half)
