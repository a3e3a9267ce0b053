"""What must hold of every step, and does not: told by whoever can see it, each a sentence that begins with its name.

Slow and silent faults are found by invariants, not by statistics (TrainCheck: 18 of 20 within a step, against 2).
"""

from __future__ import annotations

from lumina.orchestrator.finding import Finding
from lumina.orchestrator.signals import Signals

HARD = frozenset({"schedule", "optimizer step", "batch", "data", "config", "replicas"})  # acted on; others are told


def invariant(signals: Signals) -> Finding | None:
    """An invariant of a step is broken."""
    seen = signals.seen
    return _found(signals, "invariant", seen.step, seen.broken) if seen is not None and seen.broken else None


def looked(signals: Signals) -> Finding | None:
    """An invariant is broken that only a look can see."""
    look = signals.look
    since = signals.look_before + 1
    return _found(signals, "looked", since, look.broken) if look is not None and look.broken else None


def name(sentence: str) -> str:
    """Of the invariant that a sentence is about."""
    return sentence.partition(": ")[0]


def _found(signals: Signals, rule: str, since: int, broken: tuple[str, ...]) -> Finding:
    values = {"broken": [name(sentence) for sentence in broken], "sentences": list(broken)}
    return Finding(rule, signals.step, since, "; ".join(broken), not HARD.isdisjoint(values["broken"]), values)
