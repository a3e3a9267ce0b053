"""Loss or gradients that are not finite. The guard on the device has kept the step from moving anything."""

from __future__ import annotations

from lumina.orchestrator.finding import Finding
from lumina.orchestrator.signals import Signals, not_finite

AGAIN = 10  # steps within which a second one says that the state itself is not sound
TIMES = 3


def non_finite(signals: Signals) -> Finding | None:
    """A loss or a gradient norm that is NaN or infinite: 1 or 2 are skipped, `TIMES` in `AGAIN` steps are the state."""
    seen = signals.seen
    if seen is None or not not_finite(seen):
        return None
    near = [step for step in signals.refused if step > seen.step - AGAIN]
    lasting = len(near) >= TIMES
    what = "the loss" if seen.loss - seen.loss != 0 else "the gradient norm"
    text = f"{what} is not finite" + (f", {len(near)} times in {AGAIN} steps: the state is not sound" if lasting else "")
    values = {"loss": seen.loss, "grad_norm": seen.grad_norm, "skipped": seen.skipped, "times": len(near)}
    return Finding("non_finite", seen.step, near[0], text, True, values | {"lasting": lasting})
