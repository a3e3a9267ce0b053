"""The pilot's page: what its raw rows say of naive and probed trials. See `pilot.py`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lumina.bench.report import table
from lumina.orchestrator.trial import judge

CONTROL = "control"
Way = Literal["naive", "probed"]
WAYS: tuple[Way, ...] = ("naive", "probed")
SHARED = 5  # candidates among which the pilot would share the doubt of a commit
CHOSEN = (100, 100)  # h and m, of what the product does
TIE = 2.0  # truths within so many standard deviations over seeds say nothing


@dataclass
class Tried:
    """One run and its arms: losses by what was asked of an arm."""

    setting: str
    seed: int
    about: list[dict[str, Any]] = field(default_factory=list)
    fork: dict[str, Any] = field(default_factory=dict)
    truths: dict[str, float] = field(default_factory=dict)
    losses: dict[tuple[Way, str, int, int, int], float] = field(default_factory=dict)  # arm, order, h, m

    def truth(self, arm: str) -> float | None:
        """What the candidate did by the end of the run, in nats a token of all held-out text; above 0 is harm."""
        return self.truths[arm] - self.truths[CONTROL] if {arm, CONTROL} <= self.truths.keys() else None

    def effect(self, way: Way, arm: str, order: int, h: int, m: int) -> float | None:
        """The paired difference of a trial."""
        mine, control = (self.losses.get((way, name, order, h, m * (way == "probed"))) for name in (arm, CONTROL))
        return None if mine is None or control is None else mine - control


def read(files: Iterable[Path]) -> list[Tried]:
    """Every run in the raw files; processes that shared a run are put together."""
    runs: dict[tuple[str, str, int], Tried] = {}
    for path in files:
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            key = row["size"], row["optimizer"], row["seed"]
            one = runs.setdefault(key, Tried(f"{row['size']} {row['optimizer']}", row["seed"]))
            if row["t"] == "about":
                one.about.append(row)
            elif row["t"] == "fork":
                one.fork = row
            elif row["t"] == "truth":
                one.truths[row["arm"]] = row["loss"]
            elif row["t"] in ("naive", "probed"):
                one.losses[row["t"], row["arm"], row["order"], row["h"], row.get("m", 0)] = row["sample"]
    return [runs[key] for key in sorted(runs, key=lambda key: (float(key[0].removesuffix("M")), key[1:]))]


@dataclass(frozen=True)
class Trial:
    """Of one candidate in one run at one (h, m): the effects over data orders."""

    run: Tried
    arm: str
    h: int
    m: int
    naive: list[float]
    probed: list[float]
    alone: list[float]  # the candidate's own probed losses, which are paired with nothing

    def effects(self, way: Way) -> list[float]:
        return self.naive if way == "naive" else self.probed

    def commits(self, way: Way, candidates: int) -> bool:
        """Whether the product would believe all pairs together, if it tried so many candidates."""
        effects = self.effects(way)
        return judge(self.arm, [0.0] * len(effects), effects, candidates).won


class Found:
    """All trials, and what the ends of the runs say of the candidates."""

    def __init__(self, runs: Sequence[Tried]) -> None:
        self.runs = runs
        self.settings = list(dict.fromkeys(run.setting for run in runs))
        self.arms = list(dict.fromkeys(arm for run in runs for arm in run.truths if arm != CONTROL))
        self.grid = sorted({(h, m) for run in runs for way, _, _, h, m in run.losses if way == "probed"})
        self.trials = list(self._trials())

    def _trials(self) -> Iterator[Trial]:
        for run in self.runs:
            orders = sorted({order for _, _, order, _, _ in run.losses})
            for h, m in self.grid:
                for arm in self.arms:
                    naive = [run.effect("naive", arm, order, h, m) for order in orders]
                    probed = [run.effect("probed", arm, order, h, m) for order in orders]
                    pairs = [(n, p) for n, p in zip(naive, probed, strict=True) if n is not None and p is not None]
                    if pairs:
                        alone = [
                            run.losses["probed", arm, o, h, m]
                            for o, p in zip(orders, probed, strict=True)
                            if p is not None
                        ]
                        yield Trial(run, arm, h, m, [n for n, _ in pairs], [p for _, p in pairs], alone)

    def truths(self, setting: str, arm: str) -> list[float]:
        found = (run.truth(arm) for run in self.runs if run.setting == setting)
        return [value for value in found if value is not None]

    def verdict(self, setting: str, arm: str) -> int:
        """1: it harms, -1: it helps, 0: a tie, or too few seeds to say."""
        values = self.truths(setting, arm)
        if len(values) < 2 or abs(statistics.fmean(values)) < TIE * statistics.stdev(values):
            return 0
        return 1 if statistics.fmean(values) > 0 else -1

    def at(self, h: int, m: int, verdict: int | None = None) -> list[Trial]:
        """Trials of these steps, of candidates with that verdict."""
        here = [trial for trial in self.trials if (trial.h, trial.m) == (h, m)]
        if verdict is None:
            return here
        known = [one for one in here if len(self.truths(one.run.setting, one.arm)) > 1]
        return [one for one in known if self.verdict(one.run.setting, one.arm) == verdict]

    def long(self) -> list[Tried]:
        """The runs that have a probe as long as the steps before it."""
        return [run for run in self.runs if any(way == "probed" and m >= h for way, _, _, h, m in run.losses)]


def share(values: Sequence[bool]) -> str:
    return f"{sum(values)}/{len(values)}" if values else "-"


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "-"
    about = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.{digits}f}{about}"


def pooled(groups: Iterable[Sequence[float]]) -> float | None:
    """Standard deviation inside groups, together."""
    many = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in many)
    squares = sum((len(group) - 1) * statistics.variance(group) for group in many)
    return math.sqrt(squares / freedom) if freedom else None


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


VERDICTS = {1: "worse", -1: "better", 0: "tie"}
MEANING = (
    "Differences are in nats a token of held-out text, candidate less control of one pair; below 0 is better. *Naive*: "
    "after h steps. *Probed*: after m more, in which the rate falls linearly to 0 in both. *Truth*: both went on to "
    "the end of the run and its planned decay, on all of the held-out text; pair 1 alone has one. A candidate ends "
    f"worse or better where the mean of its truths over seeds is more than {TIE:g} of their standard deviations from "
    "0; otherwise it ties, and candidates with fewer than two truths are left out of what is counted. ± is a standard "
    "deviation over seeds. Processes stopped when their time was over: what they did not come to is missing."
)


def page(runs: Sequence[Tried], said: str) -> str:
    """The whole page, whose first sentence is `said`."""
    found = Found(runs)
    lines = ["# Short trials against the ends of runs", "", f"**{said}**", "", MEANING]
    parts = [
        table("The runs", *settings(found), machines(found)),
        table(
            "What each candidate did",
            *effects(found),
            "Naive and probed are means over the pairs of a run, then over the runs that have any.",
        ),
        table("Rates, by h and m", *sweep(found), "Naive / probed, means over seeds and pairs."),
        table("How often a trial has the sign of the truth", *signs(found, found.runs), SIGNS),
        table("The same, of the runs that have long probes", *signs(found, found.long()), LONG),
        table("Standard deviation of a pair", *sigmas(found), SIGMAS),
        table("What would have been committed", *commits(found), COMMITS),
        table("Which, at h = m = 100, alone", *committed(found)),
    ]
    return "\n".join(lines) + "\n" + "".join(parts)


def machines(found: Found) -> str:
    """Where the runs were made, in one line each."""
    said: dict[str, set[str]] = {}
    for run in found.runs:
        for one in run.about:
            code = f"lumina {one['lumina']} at {one['commit']}, torch {one['torch']}, Python {one['python']}"
            what = f"{one['date'][:10]}, {one['machine']}, on {one['device']}, one thread each, {code}"
            said.setdefault(what, set()).add(f"{run.setting} seed {run.seed}")
    return "\n\n".join(f"{what}: {', '.join(sorted(names))}." for what, names in said.items())


def settings(found: Found) -> tuple[list[str], list[list[str]]]:
    cells = []
    for setting in found.settings:
        runs = [run for run in found.runs if run.setting == setting]
        keys, one = runs[0].about[0]["keys"], runs[0]
        norms = "/".join(f"{value:.2f}" for value in one.fork["norms"])
        shape = (
            f"{one.about[0]['parameters'] / 1e6:.2f}M",
            f"{keys['train.steps']:,}",
            f"{keys['train.batch_tokens']:,}",
        )
        pace = f"{one.fork['step']}", f"{keys['train.lr']:g}", f"{one.fork['sample_tokens']:,}", norms
        cells.append([setting, str(len(runs)), *shape, *pace])
    norms = "gradient norm before the fork, 10/50/90 %"
    return ["run", "seeds", "parameters", "steps", "tokens a step", "fork", "lr", "held-out tokens", norms], cells


def effects(found: Found) -> tuple[list[str], list[list[str]]]:
    shown: list[tuple[Way, int, int]] = [("naive", 100, 25), ("probed", 100, 25), ("probed", 100, 100)]
    cells = []
    for setting in found.settings:
        for arm in found.arms:
            truths, row = found.truths(setting, arm), []
            for way, h, m in shown:
                here = [trial for trial in found.at(h, m) if (trial.run.setting, trial.arm) == (setting, arm)]
                runs = f" ({len(here)})" if here and (h, m) == CHOSEN else ""
                row.append(spread([statistics.fmean(trial.effects(way)) for trial in here]) + runs)
            ends = f"{spread(truths)} ({len(truths)})" if truths else "-"
            cells.append([f"{setting}, {arm}", ends, VERDICTS[found.verdict(setting, arm)] if truths else "-", *row])
    return ["candidate", "truth (seeds)", "it ends", "naive 100", "probed 100, 25", "probed 100, 100 (runs)"], cells


def sweep(found: Found) -> tuple[list[str], list[list[str]]]:
    arms = [arm for arm in found.arms if arm.startswith("lr")]
    cells = []
    for setting in found.settings:
        ends = [f"*{spread(found.truths(setting, arm))}*" for arm in arms]
        cells.append([f"{setting}, truth", "", *ends])
        for h, m in found.grid:
            here = [trial for trial in found.at(h, m) if trial.run.setting == setting]
            row = []
            for arm in arms:
                mine = [trial for trial in here if trial.arm == arm]
                means = [statistics.fmean([x for t in mine for x in t.effects(way)]) for way in WAYS if mine]
                row.append(" / ".join(f"{mean:+.4f}" for mean in means) or "-")
            if here:
                pairs = sum(len(trial.probed) for trial in here if trial.arm == arms[0])
                cells.append([f"{setting}, {h}, {m}", str(pairs), *row])
    return ["h, m", "pairs", *arms], cells


SIGNS = (
    "Each pair is one trial; candidates that tie are left out. Then, of candidates that end worse, how many a trial "
    "calls better, and of those that end better, how many it calls worse."
)


LONG = (
    "Probes longer than h / 2 were added when the others had not done: that m = 100 has the sign was found on 0.15M "
    "muon seed 5, then tried on the others. At (100, 100) most runs are taken twice, on one machine: one process tells "
    "the truths, a later one the trials. On a processor both come to the same losses to the last digit, so that the "
    "truth of one is that of the other. On a GPU they end up to 0.007 apart, and truths are of the first."
)


def signs(found: Found, runs: Sequence[Tried]) -> tuple[list[str], list[list[str]]]:
    cells = []
    for h, m in found.grid:
        row = [f"{h}, {m}"]
        for way in WAYS:
            right = [
                (value > 0) == (verdict > 0)
                for verdict in (1, -1)
                for trial in found.at(h, m, verdict)
                if trial.run in runs
                for value in trial.effects(way)
            ]
            row.append(share(right))
        for verdict in (1, -1):
            for way in WAYS:
                mine = [trial for trial in found.at(h, m, verdict) if trial.run in runs]
                values = [value for trial in mine for value in trial.effects(way)]
                row.append(share([(value > 0) != (verdict > 0) for value in values]))
        if set(row[1:]) != {"-"}:
            cells.append(row)
    header = ["h, m", "right, naive", "right, probed", "worse called better, naive", "probed"]
    return [*header, "better called worse, naive", "probed"], cells


SIGMAS = (
    "Of the probed difference over data orders, inside a run, pooled over runs. *Unpaired*: of the difference of a "
    "candidate and a control that did not see the same data (the standard deviation of a loss, times the root of two)."
)


def sigmas(found: Found) -> tuple[list[str], list[list[str]]]:
    cells = []
    for setting in found.settings:
        for h, m in found.grid:
            here = [trial for trial in found.at(h, m) if trial.run.setting == setting and len(trial.probed) > 1]
            if not here:
                continue
            of = [pooled(trial.probed for trial in here if trial.arm == arm) for arm in found.arms]
            alone = pooled(trial.alone for trial in here)
            every = pooled(trial.probed for trial in here)
            unpaired = None if alone is None else alone * math.sqrt(2)
            freedom = sum(len(trial.probed) - 1 for trial in here)
            cells.append([f"{setting}, {h}, {m}", *map(number, [*of, every, unpaired]), str(freedom)])
    return ["h, m", *found.arms, "all", "unpaired", "degrees of freedom"], cells


COMMITS = (
    "What the product asks (`lumina.orchestrator.trial.judge`: the lower bound of the mean gain above 0 at 0.05, the "
    "mean above 0.01 and above twice the standard deviation of a pair), if the candidate was the only one, and if it "
    f"was one of {SHARED} that share the 0.05: commits of all trials with three pairs or more, by what the candidate "
    "ends as. Without a probe: naive."
)


def commits(found: Found) -> tuple[list[str], list[list[str]]]:
    cells = []
    asked: tuple[tuple[Way, int], ...] = (("naive", 1), ("probed", 1), ("probed", SHARED))
    for h, m in found.grid:
        row = [f"{h}, {m}"]
        for verdict in (1, 0, -1):
            trials = [trial for trial in found.at(h, m, verdict) if len(trial.probed) > 2]
            row += [share([trial.commits(way, candidates) for trial in trials]) for way, candidates in asked]
        if set(row[1:]) != {"-"}:
            cells.append(row)
    ways = [f"{way}, {'alone' if candidates == 1 else f'one of {candidates}'}" for way, candidates in asked]
    return ["h, m", *(f"{name}: {way}" for name in ("worse", "tie", "better") for way in ways)], cells


def committed(found: Found) -> tuple[list[str], list[list[str]]]:
    """At the size that was chosen: which, and what they did by the end of their own run."""
    cells = []
    for trial in found.at(*CHOSEN):
        if len(trial.probed) > 2 and trial.commits("probed", 1):
            truths, own = found.truths(trial.run.setting, trial.arm), trial.run.truth(trial.arm)
            pairs = " ".join(f"{value:+.4f}" for value in trial.probed)
            ends = VERDICTS[found.verdict(trial.run.setting, trial.arm)] if truths else "-"
            shared = "yes" if trial.commits("probed", SHARED) else "no"
            name = [f"{trial.run.setting}, {trial.arm}", str(trial.run.seed), pairs, shared]
            cells.append([*name, "-" if own is None else f"{own:+.4f}", ends])
    return ["candidate", "seed", "pairs", f"also one of {SHARED}", "truth of this run", "it ends"], cells
