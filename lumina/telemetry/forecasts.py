"""What a run is told of its end, as lines: now and then, for each forecast differs little from the one before."""

from __future__ import annotations

from typing import Any

from lumina.events import Event
from lumina.telemetry.figures import duration

EVERY = 0.1  # share of the run between two lines
LOUD = 4.0  # standard deviations from which on a deviation is told at once; docs/planning.md says how often that is


class Forecasts:
    """Remembers what was said last."""

    def __init__(self) -> None:
        self.said = -1.0  # share of the run
        self.refused = ""
        self.loud = False

    def lines(self, event: Event, steps: int, step_seconds: float | None) -> list[str]:
        """What a `forecast` event is worth saying; `step_seconds` turn steps into time."""
        if event["refused"]:
            new = event["refused"] != self.refused and not event["early"]
            self.refused = event["refused"]
            return [f"[Forecast {event['step']}] none: {event['refused']}"] if new else []
        lines = []
        if event["share"] - self.said >= EVERY - 1e-9 or self.refused:
            self.said, self.refused = event["share"], ""
            lines.append(f"[Forecast {event['step']}] {' | '.join(_parts(event, steps, step_seconds))}")
        off = event["deviation"]
        loud = off is not None and abs(off["z"]) >= LOUD
        if loud and not self.loud:
            by = f"{abs(off['nats']):.3f} nats {'above' if off['nats'] > 0 else 'below'}"
            how = f"{abs(off['z']):.1f} standard deviations"
            lines.append(f"! step {event['step']}: the newest losses are {by} what {off['against']} lead to, {how}")
        self.loud = loud
        return lines


def _parts(event: Event, steps: int, step_seconds: float | None) -> list[str]:
    kind = "held-out" if event["heldout"] else "training"
    loss: dict[str, Any] = event["heldout"] or event["train"]
    level = f"{event['level']:.0%}"
    parts = [f"final {kind} loss {loss['mid']:.3f} ({loss['low']:.3f} to {loss['high']:.3f}, {level})"]
    if now := event["decay_now"]:
        cost, half = now["cost"]["mid"], (now["cost"]["high"] - now["cost"]["low"]) / 2
        saved = f"{now['saved']} steps" if step_seconds is None else duration(now["saved"] * step_seconds)
        verb = "lose" if cost >= 0 else "gain"
        parts.append(f"start the decay now and {verb} {abs(cost):.3f} ± {half:.3f} nats, {saved} sooner")
    if best := event["optimum"]:
        parts.append(f"{best['share']:.0%} of the tokens that are optimal by {best['law']}")
    return parts
