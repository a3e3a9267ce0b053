"""Spikes of loss and gradient norm, one step each, by robust deviations from a local trend.

Thresholds are those that another group found on six healthy runs of 130M to 1.2B parameters (science of stability:
largest |z| seen 4.5): 8 for the loss alone, 6 if loss and gradient norm leave together. `calibrate.py` has what they
cost here.
"""

from __future__ import annotations

import math

from lumina.orchestrator.finding import Finding
from lumina.orchestrator.robust import median
from lumina.orchestrator.signals import Signals

ALONE = 8.0
TOGETHER = 6.0
EXPLODES = 10.0  # times the expected norm
LASTS = 3  # steps of 5: one large gradient is clipped, and heals by itself


def spike(signals: Signals) -> Finding | None:
    """The loss of one step far above its trend: alone, or with the gradient norm."""
    seen = signals.seen
    if seen is None or not signals.judged or not math.isfinite(seen.loss):
        return None
    loss, grad = signals.judged[-1]
    if loss is None:
        return None
    together = grad is not None and grad > TOGETHER and loss > TOGETHER
    if not (loss > ALONE or together):
        return None
    with_ = f", the gradient norm {grad:.1f}" if grad is not None and math.isfinite(grad) else ""
    text = f"the loss is {seen.loss:.3f}, {loss:.1f} robust deviations above its trend{with_}"
    values = {"loss": seen.loss, "z": round(loss, 2), "grad_norm": seen.grad_norm, "grad_z": _short(grad)}
    return Finding("spike", seen.step, seen.step, text, False, values | {"threshold": TOGETHER if together else ALONE})


def explosion(signals: Signals) -> Finding | None:
    """Gradient norms `EXPLODES` times what is expected, beyond noise, in `LASTS` of 5 steps."""
    seen, last = signals.seen, [one.grad for one in signals.judged[-5:]]
    if seen is None or sum(z is not None and z > ALONE for z in last) < LASTS:  # else nothing costly is asked
        return None
    expected = signals.grad.expected()
    if expected is None:
        return None
    norm, spread = math.exp(expected[0]), expected[1]
    recent = [value for value in signals.series["grad_norm"][-5:] if value is not None]
    limit = norm * max(EXPLODES, math.exp(ALONE * spread))
    over = [value for value in recent if value > limit]
    if len(over) < LASTS:
        return None
    text = f"the gradient norm is {median(over):.3g} where {norm:.3g} was expected, in {len(over)} of 5 steps"
    values = {"grad_norm": seen.grad_norm, "expected": norm, "threshold": limit, "grad_router": seen.grad_router}
    values |= {"grad_embed": seen.grad_embed, "grad_head": seen.grad_head}
    return Finding("explosion", seen.step, seen.step - 4, text, False, values)


def _short(z: float | None) -> float | None:
    return round(z, 2) if z is not None and math.isfinite(z) else None
