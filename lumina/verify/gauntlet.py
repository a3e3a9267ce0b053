"""The gauntlet: runs that something is done to, alone and watched, and what became of them.

    cases x kinds x seeds x modes -> arms, one process each -> scores against healthy runs -> a dated report

Each case is run alone (`off`), too. A fault hurts if the run alone ends more than `HURTS` standard deviations of
healthy runs of its settings above the healthy run of the same seed, and is rescued if the watched one ends at most
`SIGMAS` above it. A trap is passed if nothing was done and the run is, to the bit, the one alone. A run that was
stopped, or whose orchestrator failed, is neither.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from lumina.events import merged, read_events
from lumina.orchestrator.confidence import fallen_trial
from lumina.verify.faults import CASES, SOUND, Case

PRESET, STEPS, TOKENS = "tiny", 600, 512
FIRST, WITHIN = 200, 80  # unless a case says otherwise, a fault begins at one of so many steps, drawn by the seed
SIGMAS, HURTS = 2.0, 4.0
HEALTHY_RUNS = 8  # of a kind, at least: their losses' standard deviation is sigma
KEYS: dict[str, Any] = {
    "train.steps": STEPS, "train.batch_tokens": TOKENS, "train.warmup": 0.05, "train.decay": 0.2,
    "train.eval_every": 0, "checkpoint.every": 250, "telemetry.log_every": 50, "data.train": ["sample"],
    "orchestrator.trial.budget": 1,  # of a run as short as this; what trials took of it is reported
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One run."""

    case: str
    kind: str
    seed: int
    mode: str  # of the orchestrator

    @property
    def step(self) -> int:
        """At which the fault begins."""
        return (CASES[self.case].first or FIRST) + self.seed * 37 % WITHIN


@dataclass(frozen=True)
class Result:
    """What became of an arm, plain values."""

    arm: Arm
    loss: float  # final, held-out, nats a token; infinite if it was stopped or is not finite
    steps: int = 0  # that it came to
    stopped: str = ""  # by whom; empty if it came to its end
    failed: str = ""  # what ended the orchestrator itself
    decisions: list[dict[str, Any]] = field(default_factory=list)  # step, kind, rule, action, cause, reason, outcome
    trials: list[dict[str, Any]] = field(default_factory=list)  # verdicts and refusals, as the log has them
    seconds: float = 0.0

    @property
    def acted(self) -> list[dict[str, Any]]:
        """Decisions that changed the state, or ended the run; the guard's own, in the step itself, changed nothing."""
        return [one for one in self.decisions if one["kind"] == "act" and one["action"] != "skip_step"]

    @property
    def about(self) -> list[dict[str, Any]]:
        """Decisions since the fault; a look is heard before the step that it is behind."""
        return [one for one in self.decisions if one["step"] >= self.arm.step - 1]

    @property
    def cause(self) -> str:
        """Of the first diagnosis since the fault that was acted on, or else of the first that there is."""
        done = [one for one in self.about if one in self.acted]
        return next((one["cause"] for one in [*done, *self.about] if one["cause"]), "")

    @property
    def won(self) -> list[str]:
        """What won a trial and was not undone."""
        won = [trial for trial in self.trials if trial.get("winner") and not trial["undone"]]
        return [next(arm["asks"] for arm in one["arms"] if arm["name"] == one["winner"]) for one in won]

    @property
    def spent(self) -> float:
        """On trials, steps' worth of compute over the steps of the run."""
        return sum(float(trial.get("spent", 0.0)) for trial in self.trials) / max(1, self.steps)

    @property
    def delay(self) -> int | None:
        """Steps from the fault to the first decision about it."""
        return min((max(0, one["step"] - self.arm.step) for one in self.about), default=None)

    def plain(self) -> dict[str, Any]:
        found = asdict(self)
        return {"t": "arm", **found.pop("arm"), "fault": self.arm.step, **found}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Result:
        """The inverse of `plain`."""
        values = {name: value for name, value in row.items() if name not in ("t", "fault")}
        arm = Arm(**{one.name: values.pop(one.name) for one in fields(Arm)})
        return cls(arm, **values)


def arms(
    cases: Sequence[Case], kinds: Sequence[str], seeds: Sequence[int], modes: Sequence[str] = ("act",)
) -> list[Arm]:
    """All of them, each alone, too, and as many healthy runs of each kind as scoring faults needs."""
    more = range(1000, 1000 + max(0, HEALTHY_RUNS - len(set(seeds))))  # for sigma alone: they come last
    faulty = dict.fromkeys((case.against, kind) for case in cases if case.fault for kind in kinds if kind in case.kinds)
    wanted = [Arm(against, kind, seed, "off") for against, kind in faulty for seed in seeds]
    for case in cases:
        of = [kind for kind in kinds if kind in case.kinds]
        wanted += [Arm(case.name, kind, seed, mode) for kind in of for seed in seeds for mode in ("off", *modes)]
    wanted += [Arm(against, kind, seed, "off") for against, kind in faulty for seed in more]
    return list(dict.fromkeys(wanted))


def train(arm: Arm) -> Result:
    """Trains it in this process, below a folder that goes with it."""
    start = time.perf_counter()
    try:
        return _train(arm, start)
    except Exception as error:  # one run that breaks is a result, and no reason to lose the others
        said = f"crashed: {type(error).__name__}: {error}"
        return Result(arm, math.inf, stopped=said, seconds=round(time.perf_counter() - start, 1))


def _train(arm: Arm, start: float) -> Result:
    from lumina.orchestrator.ledger import entries
    from lumina.training.endings import Stopped
    from lumina.training.oversight import KIND
    from lumina.training.trainer import stand

    case, stopped = CASES[arm.case], ""
    with tempfile.TemporaryDirectory(prefix="lumina-gauntlet-") as folder:
        keys = KEYS | {"model.kind": arm.kind, "train.seed": arm.seed, "orchestrator.mode": arm.mode} | dict(case.keys)
        keys.update(case.files(Path(folder), arm.seed) if case.files else {})
        session = stand(PRESET, keys, Path(folder) / "runs")
        if case.plant:
            case.plant(session, arm.step, arm.seed)
        try:
            session.train()
        except Stopped as error:
            stopped = error.signal
        told = list(read_events(session.run.event_log))
    events = merged(told)
    loss = next((event["loss"] for event in reversed(events) if event["t"] == "eval"), math.inf)
    names = ("step", "kind", "rule", "action", "cause", "reason", "outcome")
    return Result(
        arm,
        loss if not stopped and loss is not None and math.isfinite(loss) else math.inf,
        max(event["step"] for event in events if event["t"] == "step"),
        stopped,
        next((event["error"] for event in told if event["t"] == "incident" and event["kind"] == KIND), ""),
        [{name: getattr(one, name) for name in names} for one in entries(told)],
        _trials(told),
        round(time.perf_counter() - start, 1),
    )


def _trials(told: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Verdicts and refusals, each with whether a probation undid what won."""
    fallen = {fallen_trial(event) for event in told}
    tried = (event for event in told if event["t"] == "trial" and event["kind"] != "begin")
    return [dict(event) | {"undone": event.get("id") in fallen} for event in tried]


def train_all(
    wanted: Sequence[Arm], workers: int, tell: Callable[[Result], None], known: Sequence[Result] = ()
) -> list[Result]:
    """All arms but those `known`, in so many processes; `tell` hears of each that is done. In the order of `wanted`."""
    found = {result.arm: result for result in known}
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for done in as_completed([pool.submit(train, arm) for arm in wanted if arm not in found]):
            result = done.result()
            found[result.arm] = result
            tell(result)
    return [found[arm] for arm in wanted]


class Score(NamedTuple):
    """Of one case and kind in one mode, over its seeds. Excess: final loss above the healthy run's of the same seed, of
    faults."""

    case: str
    kind: str
    mode: str
    excess: list[float]  # in sigma
    nats: list[float]  # the same, in nats
    alone: list[float]  # in sigma, of the run that nobody watched
    good: list[bool]  # within `SIGMAS`, or left alone to the bit
    delays: list[int]
    causes: list[str]
    acted: list[str]
    won: list[list[str]]  # by trial, of each run
    spent: list[float]  # on trials, over the steps of the run
    refused: list[str]  # why trials were not held

    @property
    def hurt(self) -> list[bool]:
        """Whether the fault hurts the run alone."""
        return [value > HURTS for value in self.alone]

    @property
    def avoided(self) -> list[float]:
        """Share of the damage that was avoided, where there was any: 1 is none of it left."""
        pairs = [pair for *pair, hurt in zip(self.excess, self.alone, self.hurt, strict=True) if hurt]
        return [1 - excess / alone if math.isfinite(alone) else float(excess <= HURTS) for excess, alone in pairs]

    @property
    def right(self) -> int:
        """Diagnoses that name a right cause."""
        return sum(cause in CASES[self.case].causes for cause in self.causes)


def scores(results: Sequence[Result]) -> list[Score]:
    """One for each case, kind and mode that watches."""
    of = {(r.arm.case, r.arm.kind, r.arm.seed, r.arm.mode): r for r in results}
    watched = [key for key in dict.fromkeys((r.arm.case, r.arm.kind, r.arm.mode) for r in results) if key[2] != "off"]
    spread, found = sigmas(results), []
    for case, kind, mode in watched:
        mine = [r for r in results if (r.arm.case, r.arm.kind, r.arm.mode) == (case, kind, mode)]
        alone, nats, away = [of[case, kind, r.arm.seed, "off"].loss for r in mine], list[float](), list[float]()
        sigma = spread.get((CASES[case].against, kind), math.nan)
        if CASES[case].fault:
            healthy = [of[CASES[case].against, kind, r.arm.seed, "off"].loss for r in mine]
            nats = [r.loss - base for r, base in zip(mine, healthy, strict=True)]
            away = [(value - base) / sigma for value, base in zip(alone, healthy, strict=True)]
            good = [value <= SIGMAS * sigma and not r.failed for value, r in zip(nats, mine, strict=True)]
        else:
            good = [not r.acted and not r.failed and r.loss == base for base, r in zip(alone, mine, strict=True)]
        excess = [value / sigma for value in nats]
        delays = [r.delay for r in mine if r.delay is not None]
        acted = [one["action"] for r in mine for one in r.acted]
        won, spent = [r.won for r in mine], [r.spent for r in mine]
        refused = [one["reason"] for r in mine for one in r.trials if one["kind"] == "refused"]
        causes = [r.cause for r in mine]
        found.append(Score(case, kind, mode, excess, nats, away, good, delays, causes, acted, won, spent, refused))
    return found


def sigmas(results: Sequence[Result]) -> dict[tuple[str, str], float]:
    """Standard deviation of the final losses of the healthy runs of each case and kind, over seeds, in nats."""
    return {of: statistics.stdev(losses) for of, losses in sound(results).items()}


def sound(results: Sequence[Result]) -> dict[tuple[str, str], list[float]]:
    """Final losses of the healthy runs of each case and kind."""
    losses: dict[tuple[str, str], list[float]] = {}
    for result in results:
        if result.arm.case in SOUND and result.arm.mode == "off":
            losses.setdefault((result.arm.case, result.arm.kind), []).append(result.loss)
    return losses
