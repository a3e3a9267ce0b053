"""Losses that are not what the run's forecasts expect: `forecast` events' deviations, two looks in a row.

Of healthy runs |z| was beyond 2 in 21 % of looks and beyond 4 in 2.3 % (benchmarks/planner/forecasts.md), and looks of
one run are not independent: so the deviation must be large in deviations and in nats, both registered here beforehand.
"""

from __future__ import annotations

import math

from lumina.orchestrator.finding import Finding
from lumina.orchestrator.robust import line, scale
from lumina.orchestrator.signals import Deviation, Signals

Z = 5.0
NATS = 0.10
LOOKS = 2
FLAT = 2.0  # standard errors of a slope


def drift(signals: Signals) -> Finding | None:
    """Above the forecast for two looks, and rising or shifted."""
    found = _above(signals)
    if found is None or _stands_still(signals):
        return None
    text = f"the loss is {found.nats:.3f} nats above its forecast, {found.z:.1f} deviations, in {LOOKS} looks in a row"
    return _finding("drift", signals, found, text)


def plateau(signals: Signals) -> Finding | None:
    """Above the forecast for two looks at one learning rate, because it stopped falling."""
    found = _above(signals)
    if found is None or not _stands_still(signals):
        return None
    rates = {one.lr for one in signals.deviations[-LOOKS:]}
    if max(rates) - min(rates) > 1e-9 * max(rates):
        return None
    text = f"the loss stands still where the forecast falls: {found.nats:.3f} nats above it, {found.z:.1f} deviations"
    return _finding("plateau", signals, found, text)


def _above(signals: Signals) -> Deviation | None:
    last = signals.deviations[-LOOKS:]
    if len(last) < LOOKS or any(one.z < Z or one.nats < NATS for one in last):
        return None
    return last[-1]


def _stands_still(signals: Signals) -> bool:
    """Whether the losses between the looks have no trend beyond noise."""
    steps = signals.deviations[-1].step - signals.deviations[-LOOKS].step
    losses = [value for value in signals.series["loss"][-max(16, steps) :] if value is not None]
    if len(losses) < 16:
        return False
    slope, start = line(losses)
    error = scale(losses, slope, start) * math.sqrt(12 / len(losses) ** 3)
    return abs(slope) <= FLAT * error


def _finding(rule: str, signals: Signals, found: Deviation, text: str) -> Finding:
    first = signals.deviations[-LOOKS]
    values = {"nats": found.nats, "z": found.z, "threshold": Z, "least": NATS, "lr": found.lr}
    return Finding(rule, signals.step, first.step, text, False, values)
