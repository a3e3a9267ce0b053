"""What attention looks at: logits so large that it sees one token alone, and learns no more which."""

from __future__ import annotations

from lumina.orchestrator.finding import Finding
from lumina.orchestrator.signals import Signals

TAU = 100.0  # largest logit of a sound model (Kimi K2, 2507.20534, which clips there); of `tiny`, 500 steps: 9
JUMPS = 3.0  # times that of the look before: training moves it by less than a tenth between two looks


def attention(signals: Signals) -> Finding | None:
    """The largest attention logit is beyond `TAU`; hard if it came there since the last look, and not by growing.

    A look is heard before the step that it is behind, and a replay takes again what was observed last: so it is judged
    with that step.
    """
    *before, now = signals.logits or [0.0]
    if signals.look is None or signals.look.step != signals.step or not now > TAU:
        return None
    last = before[-1] if before else 0.0
    jumped = bool(before) and now > JUMPS * last
    since = signals.look_before + 1 if jumped else signals.look.step
    text = f"the largest attention logit is {now:.3g}" + (f", and was {last:.3g} at the last look" if before else "")
    return Finding("attention", signals.step, since, text, jumped, {"largest": now, "last": last, "threshold": TAU})
