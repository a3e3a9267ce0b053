"""What trials of this run and of earlier ones say of an action against a fault: a Beta posterior. Pure; no I/O.

    `trial` events, and outcomes that undid a winner -> verdicts -> Confidence -> the order in which arms are tried

It puts arms in order and never leaves one out: what lost elsewhere may win here, and only a trial can tell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lumina.errors import UserError
from lumina.events import as_plain

# The fields of a `trial` event that are read here, and of each of its `arms`.
TRIAL, STEP, ID, FAULT, ARMS, WINNER = "trial", "step", "id", "fault", "arms", "winner"
NAME, ACTION, GAIN, LOW, NOISE, WON = "name", "action", "gain", "low", "noise", "won"
# Of the evidence of the decision that says whether what won a trial held.
EVIDENCE, PROBATION, HELD = "evidence", "probation", "held"

PRIOR = 0.5  # of either end: Jeffreys'
# All that an action did against other faults counts as so many of its verdicts on this one, at most. Two is little:
# with the third of its own these outweigh it. But what lost everywhere is not tried first where it is new.
ELSEWHERE = 2.0
LEVEL = 0.9  # of the credible interval
HALVINGS = 60  # of an interval of 1: beyond the digits of a float
TINY, EXACT, TERMS = 1e-300, 1e-14, 10_000  # of the continued fraction

Key = tuple[str, int, str, str]


@dataclass(frozen=True)
class Verdict:
    """What became of one arm of a trial. Gain, low and noise are nats a token; NaN where nothing was measured."""

    fault: str  # its class: see `candidates.fault`
    action: str  # the family of what was tried: "lr.scale back", "bias_rate + router.reset"
    won: bool  # it beat the control, and was not undone by its probation; another may have been taken
    gain: float  # mean of the paired improvements over the control
    low: float  # lower bound of that
    noise: float  # sigma of a pair
    kind: str  # of the model
    run: str  # its name
    step: int  # of the trial
    id: str = ""  # of the run: the same if its folder is renamed or copied

    @property
    def key(self) -> Key:
        """Which experiment it is. Made again, after a kill or a way back, it teaches nothing new: the last counts."""
        return self.id or self.run, self.step, self.fault, self.action

    def pack(self) -> dict[str, Any]:
        """As plain values that JSON keeps."""
        plain: dict[str, Any] = as_plain(asdict(self))
        return plain

    @classmethod
    def unpack(cls, values: Mapping[str, Any]) -> Verdict:
        """The inverse. Raises `UserError` for what `pack` does not give."""
        try:
            given = {field.name: _read(str(field.type), values[field.name]) for field in fields(cls)}
        except (LookupError, TypeError, ValueError) as error:
            fix = "delete the line that holds it: the others are read without"
            raise UserError(f"{str(values)[:80]}: not a verdict: {type(error).__name__}: {error}", fix) from None
        return cls(**given)


def _read(kind: str, value: Any) -> Any:
    """A value of the type that is written `kind`; a float may be written as "nan", "inf", "-inf"."""
    wanted = {"str": (str,), "bool": (bool,), "int": (int,), "float": (float, int, str)}[kind]
    if type(value) not in wanted:
        raise TypeError(f"{value!r} is no {kind}")
    return float(value) if kind == "float" else value


class Confidence:
    """Of (fault class, action). A deterministic function of its verdicts: the order of arms draws nothing."""

    def __init__(self, verdicts: Iterable[Verdict] = ()) -> None:
        self._verdicts: dict[Key, Verdict] = {}
        for verdict in verdicts:
            self.add(verdict)

    @classmethod
    def of(cls, packed: Iterable[Mapping[str, Any]]) -> Confidence:
        """From packed verdicts; what is none, as of another version or a person's hand, is passed over."""
        confidence = cls()
        for values in packed:
            with suppress(UserError):
                confidence.add(Verdict.unpack(values))
        return confidence

    def add(self, verdict: Verdict) -> None:
        """One more, or a later word on one that is known."""
        self._verdicts[verdict.key] = verdict

    @property
    def verdicts(self) -> list[Verdict]:
        return list(self._verdicts.values())

    def posterior(self, fault: str, action: str) -> tuple[float, float]:
        """Alpha and beta of the probability that the action wins its trial against the fault, and is kept.

        A Jeffreys prior, its own verdicts, and those on other faults, discounted to `ELSEWHERE` in all. An arm that is
        new everywhere stands at 1/2, before those that lost more often than they won: it is worth finding out. (A prior
        with the action's mean over other faults and no floor was tried first: of one that always won elsewhere it was
        certain without a trial.)
        """
        of = [verdict for verdict in self.verdicts if verdict.action == action]
        own, others = ([one.won for one in of if (one.fault == fault) is here] for here in (True, False))
        share = min(1.0, ELSEWHERE / len(others)) if others else 0.0
        won, lost = (own.count(which) + share * others.count(which) for which in (True, False))
        return PRIOR + won, PRIOR + lost

    def mean(self, fault: str, action: str) -> float:
        alpha, beta = self.posterior(fault, action)
        return alpha / (alpha + beta)

    def interval(self, fault: str, action: str, level: float = LEVEL) -> tuple[float, float]:
        """Within which the probability lies with that of `level`, as likely below it as above."""
        alpha, beta = self.posterior(fault, action)
        return quantile((1 - level) / 2, alpha, beta), quantile((1 + level) / 2, alpha, beta)

    def order(self, fault: str, actions: Sequence[str]) -> list[str]:
        """All of them, the best posterior mean first; of equal ones the one that was given first."""
        return sorted(actions, key=lambda action: -self.mean(fault, action))

    def table(self) -> list[dict[str, Any]]:
        """What is known of each (fault, action), as plain values: by fault, the best action first."""
        rows = [self._row(*pair) for pair in {(v.fault, v.action): None for v in self.verdicts}]
        return sorted(rows, key=lambda row: (row["fault"], -row["mean"], row["action"]))

    def _row(self, fault: str, action: str) -> dict[str, Any]:
        of = [verdict for verdict in self.verdicts if (verdict.fault, verdict.action) == (fault, action)]
        gains = [verdict.gain for verdict in of if math.isfinite(verdict.gain)]
        return {
            "fault": fault,
            "action": action,
            "tried": len(of),
            "won": sum(verdict.won for verdict in of),
            "mean": self.mean(fault, action),
            "interval": list(self.interval(fault, action)),
            "gain": statistics.median(gains) if gains else None,
            "runs": sorted({verdict.run for verdict in of}),
            "verdicts": [verdict.pack() for verdict in of],
        }


# -- from the log of a run ---------------------------------------------------------------------------------------------


def verdicts(events: Iterable[Mapping[str, Any]], kind: str, run: str, id: str = "") -> list[Verdict]:
    """Those of a run's log: of all its attempts, for what was measured was measured, also where it was undone.

    An arm is tried if it was judged, and arms could be compared at all. The winner has won until a decision says that
    it has not held. Events may be of older versions, or of a person's hand: what is no trial is passed over.
    """
    found: dict[Key, Verdict] = {}
    won: dict[Any, Key] = {}  # by the trial's id
    for event in events:
        if event.get("t") == TRIAL and type(event.get(STEP)) is int and isinstance(event.get(ARMS), list):
            for arm in [] if event.get("void") else event[ARMS]:
                if (new := _tried(event, arm, kind, run, id)) is not None:
                    found[new.key] = new
                    won |= {event.get(ID): new.key} if arm.get(NAME) == event.get(WINNER) else {}
        elif (key := won.get(fallen_trial(event))) is not None:
            found[key] = replace(found[key], won=False)
    return list(found.values())


def _tried(event: Mapping[str, Any], arm: Any, kind: str, run: str, id: str) -> Verdict | None:
    """What an arm of a trial came to; None if it was none to be judged."""
    if not isinstance(arm, Mapping) or not arm.get(ACTION) or type(arm.get(WON)) is not bool or not event.get(FAULT):
        return None
    figures: list[Any] = [arm.get(name) for name in (GAIN, LOW, NOISE)]
    gain, low, noise = (float(value) if type(value) in (int, float) else math.nan for value in figures)
    return Verdict(str(event[FAULT]), str(arm[ACTION]), arm[WON], gain, low, noise, kind, run, event[STEP], id)


def fallen_trial(event: Mapping[str, Any]) -> str | None:
    """The trial whose winner has not held, as this decision says, alone or with the way back that it led to."""
    why = event if event.get("t") == "decision" else event.get("why") if event.get("t") == "run" else None
    evidence = why.get(EVIDENCE) if isinstance(why, Mapping) else None
    found = evidence.get(PROBATION) if isinstance(evidence, Mapping) and evidence.get(HELD) is False else None
    trial = found.get(TRIAL) if isinstance(found, Mapping) else None
    return trial if isinstance(trial, str) else None


# -- the Beta distribution ---------------------------------------------------------------------------------------------


def quantile(p: float, alpha: float, beta: float) -> float:
    """The x below which a Beta variable lies with probability `p`, by halving: within 1e-15."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle, alpha, beta) < p else (low, middle)
    return (low + high) / 2


def below(x: float, alpha: float, beta: float) -> float:
    """The probability that a Beta variable is below `x`: the regularised incomplete beta function (DLMF 8.17.22)."""
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (alpha + 1) / (alpha + beta + 2):  # where the other side's fraction converges faster
        return 1 - below(1 - x, beta, alpha)
    log_factor = math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta)
    log_factor += alpha * math.log(x) + beta * math.log1p(-x)
    return math.exp(log_factor) / alpha / _fraction(x, alpha, beta)


def _fraction(x: float, alpha: float, beta: float) -> float:
    """1 + d1 / (1 + d2 / (1 + ...)), by Lentz's method."""
    value, c, d = 1.0, 1.0, 0.0
    for n in range(1, TERMS):
        m = n // 2
        if n % 2:
            term = -(alpha + m) * (alpha + beta + m) * x / ((alpha + 2 * m) * (alpha + 2 * m + 1))
        else:
            term = m * (beta - m) * x / ((alpha + 2 * m - 1) * (alpha + 2 * m))
        d = 1 / (1 + term * d or TINY)
        c = 1 + term / c or TINY
        value *= c * d
        if abs(c * d - 1) < EXACT:
            break
    return value
