"""Divergence: severe, and lasting. A spike that heals by itself is neither."""

from __future__ import annotations

from lumina.orchestrator.finding import Finding
from lumina.orchestrator.signals import Signals
from lumina.orchestrator.windows import BRIEF, SMOOTH

LASTS = 50  # steps above the best, without a way back
PATIENCE = 100  # steps above, whatever the trend: 50 batches of junk heal in 94 (pilot of the gauntlet)
GUESSING = 20  # steps worse than a uniform guess: 5 batches of junk heal in 20, of which some are above


def divergence(signals: Signals) -> Finding | None:
    """The smoothed loss above its best by max(0.3 nats, 6 sigma) for 50 steps and not falling, or for 100; or worse
    than a uniform guess for 20 steps, once it was better."""
    seen, level = signals.seen, signals.level
    if seen is None:
        return None
    if level.unlearned >= GUESSING:
        text = f"for {level.unlearned} steps the loss is above {signals.facts.uniform:.2f}, a uniform guess"
        values = {"loss": seen.loss, "threshold": signals.facts.uniform, "steps": level.unlearned, "best": level.best}
        return Finding("divergence", seen.step, _begin(signals, level.unlearned, BRIEF), text, True, values)
    if level.above < LASTS or level.smoothed is None or level.best is None:
        return None
    slope = level.slope
    if level.above < PATIENCE and (slope is None or slope < 0):
        return None
    over = level.smoothed - level.best
    text = f"for {level.above} steps the loss, smoothed, is {over:.2f} nats above its best of {level.best:.3f}"
    values = {"smoothed": level.smoothed, "best": level.best, "threshold": level.margin, "steps": level.above}
    return Finding("divergence", seen.step, _begin(signals, level.above, SMOOTH), text, True, values | {"slope": slope})


def _begin(signals: Signals, steps: int, window: int) -> int:
    """The median of a window of losses crosses a level half as many steps after they did."""
    return max(1, signals.step - steps + 1 - window // 2)
