"""A learning rate that is not what it was, though no change was planned: the plan itself may be wrong.

What moves the weights otherwise than planned breaks an invariant; a plan that is wrong breaks none.
"""

from __future__ import annotations

from lumina.orchestrator.finding import Finding
from lumina.orchestrator.robust import median
from lumina.orchestrator.signals import Signals
from lumina.orchestrator.windows import JUMPS

LASTS = 20  # steps: one at 10 times the rate heals (H6 of the gauntlet)


def pace(signals: Signals) -> Finding | None:
    """The rate jumped by more than `JUMPS` in a stable stretch of the schedule, and did not come back."""
    seen, found = signals.seen, signals.pace
    if seen is None or found.steps < LASTS:
        return None
    since = signals.step - found.steps + 1
    text = f"the learning rate is {found.times:.3g} times what it was before step {since}, and no change was planned"
    values = {"lr": seen.lr, "times": found.times, "threshold": JUMPS, "steps": found.steps}
    moved = [value for value in signals.series["update_ratio"] if value]
    if len(moved) >= found.steps + LASTS:  # evidence that the weights feel it
        before = moved[-found.steps - LASTS : -found.steps]
        values |= {"update_ratio": median(moved[-LASTS:]), "update_ratio_before": median(before)}
    return Finding("pace", signals.step, since, text, False, values)
