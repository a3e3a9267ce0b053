"""What went wrong in a run and was dealt with, as sentences."""

from __future__ import annotations

from lumina.events import Event
from lumina.telemetry.figures import duration

SHORTAGES = {
    "micro_batch": "the batch stays, but is computed in micro-batches of {after} sequences, not {before}",
    "eval_tokens": "held-out text is evaluated {after} tokens at once, not {before}",
}


def sentence(event: Event) -> str:
    """What an `incident` event says to a person."""
    kind = event["kind"]
    if kind == "log lost":
        return str(event["error"])
    where = f"step {event['step']}: "
    if kind == "log refused":
        return f"{event['error']}; its lines wait in memory until the disk takes them"
    if kind == "save refused":
        goes_on = "" if event["ends"] else "; training goes on, and each save tries again"
        return f"{where}{event['error']}{goes_on}"
    if kind == "out of memory":
        what = next(name for name in SHORTAGES if name in event)
        before, after = event[what]
        return f"{where}out of memory; {SHORTAGES[what].format(before=before, after=after)}"
    if kind == "restart":
        how = event["signal"] or f"exit code {event['code']}"
        lost = f"{duration(event['seconds_lost'])} of work and waiting are lost"
        return f"restart {event['restarts']}: the attempt before ended by {how}; {lost}"
    if kind == "act refused":
        return f"{where}{event['asked']} was not done: {event['error']}"
    if kind == "not kept":
        return f"{where}what plans to come could learn of this run is not kept: {event['error']}"
    if kind == "verdicts not kept":
        return f"{where}what later runs could learn of this one's trials is not kept: {event['error']}"
    if kind == "verdicts not known":
        return f"{where}what earlier runs learned of their trials is not known: {event['error']}"
    return f"{where}{kind}"
