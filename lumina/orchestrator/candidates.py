"""What is tried for which fault: a few candidates, mild ones first; where none of them won, stronger ones.

A candidate is what it lays over the plan from the next step on. It may only be what `orchestrator.actions` and the
bounds of `lumina.config.overlay` allow, and be of no use: the trial says whether it helps. Where the run itself shows
what was usual (a rate that it trained well with, an expert's load), the candidate goes back to that.

To add one: a line in the list of a cause, and the fault in the gauntlet that it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lumina.config.overlay import KEYS, Overlay, Value
from lumina.orchestrator.detectors.attention import TAU
from lumina.orchestrator.diagnosis import Diagnosis
from lumina.orchestrator.finding import Finding
from lumina.orchestrator.signals import Signals
from lumina.orchestrator.windows import STARVED, entropy

FAST = 1e-2  # bias rate, the upper bound: 50 steps bring a score back by 0.5
USUAL = 1e-3  # bias rate of the aux-free balance (Wang et al. 2024, 2408.15664)
BALANCE = 1e-2  # weight of the balance loss (Switch Transformers, 2101.03961)
OVER = ("over_balance", "router_gradient")  # rules by which a balance that costs the loss shows
HOT = 1.5  # of the mean load: an expert that takes more from the others


@dataclass(frozen=True)
class Candidate:
    """`laid`: keys and values, all from the next step on, edits once."""

    name: str  # of a file's characters
    action: str  # the family that it is remembered as, over runs
    laid: tuple[tuple[str, Value], ...]
    since: int = 0  # step from which on it is needed, if that is still to come

    def overlays(self, begin: int, decay: int = 0) -> list[Overlay]:
        """As they lie over the plan from step `begin` on; `decay` is the first step of the last decay, 0 without.

        Biases rest in that, as planned: nothing was tried of what moving them does there.
        """
        begin = max(begin, self.since)
        rests = decay - 1 if decay > begin else None

        def end(key: str) -> int | None:
            return begin if KEYS[key].once else rests if key == "bias_rate" else None

        return [
            Overlay(f"{key}={value}@{begin}".replace(" ", ""), key, value, begin, end(key)) for key, value in self.laid
        ]

    @property
    def text(self) -> str:
        """As a person would ask for it."""
        of = {key: [_short(value) for other, value in self.laid if other == key] for key, _ in self.laid}
        return " + ".join(f"{key}={v[0]}" if len(v) == 1 else f"{key} of {len(v)}" for key, v in of.items())


def fault(finding: Finding, why: Diagnosis) -> str:
    """The class of faults that a finding is of: what helped one of them may help another."""
    if finding.rule in OVER:
        return OVER[0]
    if finding.rule == "attention":
        return finding.rule
    return finding.rule if why.cause == "none" else why.cause


def candidates(fault: str, finding: Finding, signals: Signals, tried: Sequence[str] = ()) -> list[Candidate]:
    """What a trial is made of, the most promising first; empty if nothing is known that may help.

    `tried`: actions that were tried for this fault before, and did not mend it. Stronger ones come when all milder ones
    were.
    """
    for rung in _LADDERS.get(fault, ()):
        if left := [one for one in rung(finding, signals) if one.action not in tried]:
            return left
    return []


# -- the learning rate, the optimizer ----------------------------------------------------------------------------------


def _scale(factor: float, name: str = "") -> Candidate:
    low, high = KEYS["lr.scale"].low, KEYS["lr.scale"].high
    value = float(f"{min(high, max(low, factor)):.3g}")
    return Candidate(f"lr-{value:g}", f"lr.scale {name or f'{value:g}'}", (("lr.scale", value),))


def _rates(finding: Finding, signals: Signals) -> list[Candidate]:
    """Back to the pace that the run had, where it is known; else down, or up where the loss stands still."""
    times = finding.values.get("times")
    if isinstance(times, float) and times > 0:
        return [replace(_scale(1 / times, "back"), since=int(finding.values.get("from", 0)))]
    return [_scale(0.5), _scale(2.0) if finding.rule == "plateau" else _scale(0.1)]


def _rates_again(finding: Finding, signals: Signals) -> list[Candidate]:
    """Further down, or with moments that know nothing of what was; up, where it stood still."""
    return [_scale(0.1), _scale(0.25), *_fresh(signals)]


def _fresh(signals: Signals) -> list[Candidate]:
    """New moments with a re-warm: works on healthy runs, and is no more than a candidate (science of stability)."""
    steps = round(1 / (1 - signals.facts.beta2))
    return [Candidate("reset", "optimizer.reset", (("optimizer.reset", 1), ("lr.warmup", steps)))]


def _state(finding: Finding, signals: Signals) -> list[Candidate]:
    return [*_clipped(finding, signals), *_fresh(signals), _scale(0.5)]


def _logits(finding: Finding, signals: Signals) -> list[Candidate]:
    return [Candidate("qk-clip", "qk_clip", (("qk_clip", TAU),))]


def _clipped(finding: Finding, signals: Signals) -> list[Candidate]:
    """Where an attention logit is beyond what is usual, its gains are the state that is out of order."""
    return _logits(finding, signals) if signals.look and signals.look.attention > TAU else []


# -- routers -----------------------------------------------------------------------------------------------------------


def _even(finding: Finding, signals: Signals) -> list[Candidate]:
    """Balanced by biases alone, which cost no loss, or by a usual weight."""
    off = Candidate("balance-0", "balance off", (("balance", 0.0), ("bias_rate", USUAL)))
    return [off, _balance(BALANCE), _balance(BALANCE / 100)]


def _routers(finding: Finding, signals: Signals) -> list[Candidate]:
    """Experts that nobody asks are opened again, those that all ask are closed, and biases move faster.

    What died did so by its own row; where all want a few, it is their rows.
    """
    starved, hot = _experts(finding, signals)
    first = [_opened("router.reset", starved), _closed(hot)]
    first = first if finding.rule == "starvation" else first[::-1]
    fast = Candidate("bias-fast", "bias_rate up", (("bias_rate", FAST),))
    return [*(one for one in first if one), fast, *(one for one in [_opened("expert.reseed", starved)] if one)]


def _opened(key: str, experts: Sequence[list[int]]) -> Candidate | None:
    """Experts that nobody asks: their rows anew, or copies of those that all ask."""
    laid = tuple((key, pair) for pair in experts)
    return Candidate(key.replace(".", "-"), f"{key} starved", (*laid, ("bias_rate", FAST))) if experts else None


def _closed(experts: Sequence[list[int]]) -> Candidate | None:
    laid = tuple(("router.reset", pair) for pair in experts)
    return Candidate("hot-reset", "router.reset hot", (*laid, ("bias_rate", FAST))) if experts else None


def _routers_again(finding: Finding, signals: Signals) -> list[Candidate]:
    """The same for all of them together, and a balance loss beside."""
    starved, hot = _experts(finding, signals)
    laid = tuple(("router.reset", pair) for pair in [*starved, *hot])
    balanced = ("bias_rate", FAST), ("balance", BALANCE)
    every = [Candidate("all-reset", "router.reset all", (*laid, *balanced))] if laid else []
    return [*every, Candidate("balance-up", "bias_rate and balance up", balanced)]


def _balance(weight: float) -> Candidate:
    return Candidate(f"balance-{weight:g}", f"balance {weight:g}", (("balance", weight),))


def _experts(finding: Finding, signals: Signals) -> tuple[list[list[int]], list[list[int]]]:
    """[layer, expert] of those that starve, or that died, and of those that take most now, in layers that are not even.

    Who starves a window says, for few tokens are no sign of it; who takes most, a block does, and a window may be of
    before that began.
    """
    if dead := finding.values.get("dead"):
        return [list(pair) for pair in dead], []
    starved, hot = [], []
    for layer, load in enumerate(signals.loads.last):
        starved += [[layer, expert] for expert, value in enumerate(load) if value < STARVED]
    for layer, load in enumerate(signals.loads.recent):
        if entropy(load) < 1:
            hot += [[layer, expert] for expert, value in enumerate(load) if value == max(load) and value > HOT]
    return starved, hot


# -- depth -------------------------------------------------------------------------------------------------------------


def _depth(finding: Finding, signals: Signals) -> list[Candidate]:
    return [Candidate("predictor", "predictor on", (("predictor", 1.0),))]


_Rung = Callable[[Finding, Signals], list[Candidate]]
_LADDERS: dict[str, Sequence[_Rung]] = {
    "learning rate": (_rates, _rates_again),
    "optimizer state": (_state, _rates_again),
    "drift": (_state, _rates_again),
    "attention": (_logits, _rates_again),
    "router": (_routers, _routers_again),
    "over_balance": (_even,),
    "depth": (_depth,),
}


def _short(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")
