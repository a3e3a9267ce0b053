"""Loss or gradients that are not finite. The guard on the device has kept the step from moving anything."""

from __future__ import annotations

import math

from lumina.orchestrator.finding import Finding
from lumina.orchestrator.signals import Signals, not_finite

AGAIN = 10  # steps, of which three say that the state itself is not sound, as do two in a row
TIMES = 3


def non_finite(signals: Signals) -> Finding | None:
    """Loss or gradient norm NaN or infinite. One is skipped; two in a row, or three soon, are the state's."""
    seen = signals.seen
    if seen is None or not not_finite(seen):
        return None
    near = [step for step in signals.refused if step > seen.step - AGAIN]
    lasting = len(near) >= TIMES or seen.step - 1 in near
    what = "the gradient norm" if math.isfinite(seen.loss) else "the loss"
    text = f"{what} is not finite"
    if lasting:
        text += f", {len(near)} times in {seen.step - near[0] + 1} steps: the state is not sound"
    begin = seen.step
    while begin - 1 in signals.refused:
        begin -= 1
    values = {"loss": seen.loss, "grad_norm": seen.grad_norm, "skipped": seen.skipped, "times": len(near)}
    return Finding("non_finite", seen.step, min(begin, near[0]), text, True, values | {"lasting": lasting})
