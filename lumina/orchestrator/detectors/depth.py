"""Depth routing whose causal rule leaves what training chooses: what is evaluated is no longer what is trained."""

from __future__ import annotations

from lumina.orchestrator.finding import Finding
from lumina.orchestrator.signals import Signals

MEAN = 50  # steps
LEARNS = 200  # steps in which a predictor that begins with nothing takes and agrees on anything
FALLS = 0.10  # of agreement, below its best
BAND = 0.5, 2.0  # of the planned capacity: outside, evaluations are not comparable


def capacity(signals: Signals) -> Finding | None:
    """A layer's realised capacity outside half to twice the planned one, on average."""
    planned, taken = signals.facts.capacity, signals.taken[-MEAN:]
    if planned is None or len(taken) < MEAN or not _learned(signals):
        return None
    low, high = BAND[0] * planned, BAND[1] * planned
    for layer, values in enumerate(zip(*taken, strict=True)):
        mean = sum(values) / MEAN
        if not low <= mean <= high:
            text = f"routed layer {layer} computes {mean:.3f} of the tokens where {planned:g} is planned"
            found = {"layer": layer, "capacity": mean, "planned": planned, "threshold": [low, high]}
            return Finding("mod_capacity", signals.step, signals.step - MEAN + 1, text, False, found)
    return None


def agreement(signals: Signals) -> Finding | None:
    """The causal rule agrees with the choice on fewer tokens than it did."""
    now, best = signals.smoothed("agreement"), signals.agreed
    if now is None or best is None or now > best - FALLS or not _learned(signals):
        return None
    text = f"the causal depth rule agrees with the choice on {now:.3f} of the tokens; it was {best:.3f}"
    values = {"agreement": now, "best": best, "threshold": best - FALLS}
    return Finding("mod_agreement", signals.step, signals.step - MEAN + 1, text, False, values)


def _learned(signals: Signals) -> bool:
    """Whether the predictor had time, since the run began, its capacity settled, or the plan changed."""
    return signals.step - max(signals.first - 1, signals.facts.settles, signals.changed) > LEARNS
