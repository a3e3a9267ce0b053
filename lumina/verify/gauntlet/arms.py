"""The arms of the gauntlet: each is forked from a healthy run, something is done to it, and somebody watches.

    lead(root) -> a healthy run that stopped just before the case begins      take(arm, lead) -> Result

The healthy run is watched in `act`, so that whoever goes on with it knows what came before; nobody acts in it, which is
checked. A case that is another run from its first step on (another schedule, another text) is taken from there.
"""

from __future__ import annotations

import importlib
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xxhash import xxh3_64_hexdigest

from lumina.errors import UserError
from lumina.events import Event, Listener, merged, read_events
from lumina.orchestrator.confidence import fallen_trial
from lumina.verify.gauntlet.cases import CASES, SUITES, TUNED, Case, Suite
from lumina.verify.gauntlet.policies import MODES, POLICIES, Policy

if TYPE_CHECKING:
    from lumina.training.session import Session

PRESET, STEPS, TOKENS = "tiny", 600, 512
KEYS: dict[str, Any] = {
    "train.steps": STEPS, "train.batch_tokens": TOKENS, "train.warmup": 0.05, "train.decay": 0.2,
    "train.eval_every": 0, "checkpoint.every": 250, "telemetry.log_every": 50, "data.train": ["sample"],
    "orchestrator.snapshot_every": 100,  # what it is where memory has room
    "orchestrator.trial.budget": 1,  # of a run as short as this; what trials took of it is reported
}  # fmt: skip
FORK = "fork"  # who stops the healthy run


class Root(NamedTuple):
    """A healthy run, as far as several arms share it."""

    suite: str
    settings: str  # the healthy case whose keys it has
    kind: str
    seed: int
    steps: int  # that it takes; 0: there is nothing to share


@dataclass(frozen=True)
class Arm:
    """One run."""

    case: str
    kind: str
    seed: int
    mode: str  # off, advise, act, or the name of another policy
    suite: str = TUNED.name

    @property
    def run(self) -> tuple[str, str, int]:
        """What it is, whoever watches."""
        return self.case, self.kind, self.seed

    @property
    def step(self) -> int:
        """At which the fault begins."""
        return SUITES[self.suite].begins(CASES[self.case], self.seed)

    @property
    def root(self) -> Root:
        """Up to the last restore point but one before the fault: a run that was never forked has both in memory."""
        case, every = CASES[self.case], int(KEYS["orchestrator.snapshot_every"])
        if not case.forked or not every:
            return Root(self.suite, self.case, self.kind, self.seed, 0)
        return Root(self.suite, case.against, self.kind, self.seed, max(0, ((self.step - 1) // every - 1) * every))

    @property
    def terms(self) -> str:
        """A hash of what is done to which run: results of other terms are of another arm."""
        case, suite = CASES[self.case], SUITES[self.suite]
        keys = sorted((KEYS | _own(suite, case, self.kind)).items())
        return xxh3_64_hexdigest(repr([keys, suite.size(case), self.step]).encode())[:8]


@dataclass(frozen=True)
class Result:
    """What became of an arm, plain values."""

    arm: Arm
    loss: float  # final, held-out, nats a token; infinite if it was stopped or is not finite
    steps: int = 0  # that it came to
    stopped: str = ""  # by whom; empty if it came to its end
    crashed: str = ""  # why there is no result
    failed: str = ""  # what ended the orchestrator itself
    decisions: list[dict[str, Any]] = field(default_factory=list)  # step, kind, rule, action, cause, reason, outcome
    trials: list[dict[str, Any]] = field(default_factory=list)  # verdicts and refusals, as the log has them
    taken: float = 0.0  # steps' worth that were computed since the fork: also twice, on trial, or to look at one again
    digest: str = ""  # of the loss and the gradient norm of every step that counts
    fault: int | None = None  # step at which it began, if not that of `arm`
    seconds: float = 0.0
    told: bool = True  # whether decisions, and so diagnoses, are known
    shared: int = 0  # steps before the fork, of those that it came to

    @property
    def began(self) -> int:
        return self.arm.step if self.fault is None else self.fault

    @property
    def acted(self) -> list[dict[str, Any]]:
        """Decisions that changed the state, or ended the run; the guard's own, in the step itself, changed nothing, and
        what was done by hand was not decided."""
        done = [one for one in self.decisions if one["kind"] == "act" and one["rule"] != "hand"]
        return [one for one in done if one["action"] != "skip_step"]

    @property
    def about(self) -> list[dict[str, Any]]:
        """Decisions since the fault, also behind a way back; a look is heard before the step that it is behind."""
        return list(dropwhile(lambda one: one["step"] < self.began - 1, self.decisions))

    @property
    def cause(self) -> str:
        """Of the first diagnosis since the fault that was acted on, or else of the first that there is."""
        done = [one for one in self.about if one in self.acted]
        return next((one["cause"] for one in [*done, *self.about] if one["cause"]), "")

    @property
    def last_cause(self) -> str:
        """Of the last diagnosis: of a run that was stopped, what a person was told."""
        return next((one["cause"] for one in reversed(self.about) if one["cause"]), "")

    @property
    def won(self) -> list[str]:
        """What won a trial and was not undone."""
        won = [trial for trial in self.trials if trial.get("winner") and not trial["undone"]]
        asked = ({arm["name"]: arm["asks"] for arm in one.get("arms", ())} for one in won)
        return [asks.get(one["winner"], one["winner"]) for asks, one in zip(asked, won, strict=True)]

    @property
    def spent(self) -> float:
        """On trials, but for their probations, steps' worth of compute over the steps of the run."""
        return sum(float(trial.get("spent", 0.0)) for trial in self.trials) / max(1, self.steps)

    @property
    def extra(self) -> float | None:
        """Steps that were computed beyond those of the run, over these: trials, replays, and what was taken again."""
        return (self.taken + self.shared - self.steps) / self.steps if self.taken else None

    @property
    def delay(self) -> int | None:
        """Steps from the fault to the first decision about it."""
        return max(0, self.about[0]["step"] - self.began) if self.about else None

    @property
    def met(self) -> int | None:
        """Steps from the fault to the first decision that did something about it."""
        return max(0, self.acted[0]["step"] - self.began) if self.acted else None

    def same(self, other: Result) -> bool:
        """Whether both are the same run, to the bit, as far as both say."""
        digests = {self.digest, other.digest} - {""}
        return self.loss == other.loss and len(digests) < 2

    def plain(self) -> dict[str, Any]:
        found = asdict(self)
        return {"t": "arm", **found.pop("arm"), "terms": self.arm.terms, **found, "fault": self.began}


def keys(suite: Suite, case: Case, kind: str, seed: int, folder: Path) -> dict[str, Any]:
    """The settings of a run; texts of its own are written below `folder`."""
    found = KEYS | {"model.kind": kind, "train.seed": seed, "orchestrator.mode": "act"}
    for files in (suite.files, case.files):
        found.update(files(folder, seed) if files else {})
    return found | _own(suite, case, kind)


def _own(suite: Suite, case: Case, kind: str) -> dict[str, Any]:
    """The settings of a case in a set, but for its texts."""
    return dict(case.keys) | dict(suite.keys) | dict(suite.of_kind.get(kind, {}))


# -- the healthy run ---------------------------------------------------------------------------------------------------


def lead(root: Root, folder: Path, listeners: Sequence[Listener] = ()) -> Path | None:
    """Trains it below `folder` as far as it is shared, and returns its run folder; None if there is nothing to share.

    Raises `UserError` if anything was done to it: what is forked from it would not be what nobody watched.
    """
    from lumina.orchestrator.ledger import entries
    from lumina.training.endings import Stopped
    from lumina.training.trainer import stand

    if not root.steps:
        return None
    suite, settings = SUITES[root.suite], CASES[root.settings]
    folder.mkdir(parents=True, exist_ok=True)
    wanted = keys(suite, settings, root.kind, root.seed, folder)
    session = stand(PRESET, wanted, folder)

    def stop(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == root.steps - 1:
            session.ending = FORK

    session.listeners = [*listeners, stop]
    try:
        session.train()
    except Stopped as stopped:
        if stopped.step != root.steps:
            raise UserError(
                f"the healthy run stopped at step {stopped.step}", f"it has to come to {root.steps}"
            ) from None
    if done := [one.action for one in entries(list(session.run.events())) if one.kind == "act"]:
        raise UserError(
            f"{root}: the healthy run was acted on ({done[0]})", "look at why; nothing can be forked from it"
        )
    return session.run.path


# -- an arm ------------------------------------------------------------------------------------------------------------


def take(arm: Arm, healthy: Path | None = None) -> Result:
    """Trains it in this process, from where the `healthy` run stopped, below a folder that goes with it."""
    start = time.perf_counter()
    try:
        return _take(arm, healthy, start)
    except Exception as error:  # one run that breaks is a result, and no reason to lose the others
        said = f"{type(error).__name__}: {error}"
        return Result(
            arm, math.inf, crashed=said, seconds=round(time.perf_counter() - start, 1), told=watches(arm.mode)
        )


def watcher(mode: str) -> Policy:
    """Whoever watches: one of `MODES` or `POLICIES`, or `module:name` of a `Policy`, or of a function of a session.

    Raises `UserError` if there is none of that name.
    """
    if mode in MODES:
        return Policy(None, mode)
    if mode in POLICIES:
        return POLICIES[mode]
    module, _, name = mode.partition(":")
    if not name:
        known = ", ".join([*MODES, *POLICIES])
        raise UserError(f"{mode}: there is no such policy", fix=f"known: {known}, or module:name of yours")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as of `python -m`
    fix = "name a function of a session and a seed, in a module that Python finds from here"
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever theirs raises
        raise UserError(f"{mode}: cannot be imported: {type(error).__name__}: {error}", fix) from error
    if not isinstance(found, Policy) and not callable(found):
        raise UserError(f"{mode}: is {type(found).__name__}, which is no policy", fix)
    return found if isinstance(found, Policy) else Policy(found)


def watches(mode: str) -> bool:
    """Whether it hears and decides, so that it has diagnoses."""
    return watcher(mode).mode != "off"


def begin(arm: Arm, healthy: Path | None, folder: Path, listeners: Sequence[Listener] = ()) -> Session:
    """The session of an arm below `folder`, before its first step: what is done to it is planted, and it is watched."""
    from lumina.run.folder import Run
    from lumina.training.trainer import stand, stand_again

    suite, case, policy = SUITES[arm.suite], CASES[arm.case], watcher(arm.mode)
    if healthy:
        run = Run(Path(shutil.copytree(healthy, folder / healthy.name, symlinks=True)))
        session = stand_again(run, {"orchestrator.mode": policy.mode}, listeners)
    else:
        wanted = keys(suite, case, arm.kind, arm.seed, folder)
        session = stand(PRESET, wanted | {"orchestrator.mode": policy.mode}, folder, listeners)
    if case.plant:
        case.plant(session, arm.step, arm.seed, suite.size(case))
    if policy.install:
        policy.install(session, arm.seed)
    return session


def _take(arm: Arm, healthy: Path | None, start: float) -> Result:
    from lumina.training.endings import Stopped

    stopped = ""
    with tempfile.TemporaryDirectory(prefix="lumina-gauntlet-") as folder:
        session = begin(arm, healthy, Path(folder))
        since, count = len(list(session.run.events())), counting(session)
        try:
            session.train()
        except Stopped as error:
            stopped = error.signal
        told = list(read_events(session.run.event_log))
    return result(arm, told, since, stopped, count(), time.perf_counter() - start)


def counting(session: Session) -> Callable[[], float]:
    """How many steps' worth of compute the fitting of a session has taken since: a loss of which the gradients are
    thrown away counts as a step, a token that an arm is evaluated on as a third of one that is trained."""
    fitting, config = session.course.fitting, session.config
    step, loss, evaluate, taken = fitting.step, fitting.loss, fitting.evaluate, 0.0

    def counted(work: Callable[..., Any]) -> Callable[..., Any]:
        def working(*args: Any) -> Any:
            nonlocal taken
            taken += 1
            return work(*args)

        return working

    def evaluating(kind: Any, capacity: Any, most: int | None = None) -> Any:
        nonlocal taken
        taken += (most or 0) / 3 / config.train.batch_tokens  # all of it: as every run is at its end
        return evaluate(kind, capacity, most)

    fitting.step, fitting.loss, fitting.evaluate = counted(step), counted(loss), evaluating  # type: ignore[method-assign]
    return lambda: round(taken, 1)


def result(arm: Arm, told: Sequence[Event], since: int, stopped: str, taken: float, seconds: float) -> Result:
    """What the log of a run says of it, which is forked behind its first `since` events."""
    from lumina.orchestrator.ledger import entries
    from lumina.training.oversight import KIND

    events = merged(told)
    loss = next((event["loss"] for event in reversed(events) if event["t"] == "eval"), math.inf)
    names = ("step", "kind", "rule", "action", "cause", "reason", "outcome")
    return Result(
        arm,
        loss if not stopped and loss is not None and math.isfinite(loss) else math.inf,
        max(event["step"] for event in events if event["t"] == "step"),
        stopped,
        "",
        next((event["error"] for event in told if event["t"] == "incident" and event["kind"] == KIND), ""),
        [{name: getattr(one, name) for name in names} for one in entries(told[since:])],
        _trials(told),
        taken,
        xxh3_64_hexdigest(repr([(e["step"], e["loss"], e["grad_norm"]) for e in events if e["t"] == "step"]).encode()),
        seconds=round(seconds, 1),
        told=watches(arm.mode),
        shared=arm.root.steps,
    )


def _trials(told: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Verdicts and refusals, each with whether a probation undid what won."""
    fallen = {fallen_trial(event) for event in told}
    tried = (event for event in told if event["t"] == "trial" and event["kind"] != "begin")
    return [dict(event) | {"undone": event.get("id") in fallen} for event in tried]
