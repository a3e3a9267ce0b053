"""What is read: batches that come again, and text that training reads otherwise than it is."""

from __future__ import annotations

from lumina.orchestrator.finding import Finding
from lumina.orchestrator.robust import MAD, median
from lumina.orchestrator.signals import Signals

AGAIN = 3  # batches in a row that came the same number of steps before
AGAIN_FEW = (
    12  # the same where no more than `FEW` others came: epochs of three windows have six orders, drawn anew each
)
FEW = 32
APART = 0.3  # nats
SIGMAS = 8.0
LEAST = 4  # looks


def loader(signals: Signals) -> Finding | None:
    """Batches of equal content one after another, or a few that go round. Not if nothing else ever came: then that is
    all the data there is."""
    contents, seen = signals.contents, signals.seen
    least = AGAIN if contents.distinct > FEW else AGAIN_FEW
    if seen is None or contents.again < least or contents.distinct <= contents.period:
        return None
    period = contents.period
    begin = seen.step - contents.again - period + 1
    what = "the same batch comes" if period == 1 else f"the same {period} batches come"
    text = f"{what} again and again, {contents.again} times by now, under other numbers"
    values = {"period": period, "again": contents.again, "batch": seen.batch, "content": seen.content}
    return Finding("loader", seen.step, begin + period, text, True, values | {"threshold": least})


def golden(signals: Signals) -> Finding | None:
    """The fixed batch as training reads it has left the held-out text: what is read is no longer what is there."""
    *before, now = [apart for _, apart in signals.apart] or [0.0]
    if signals.look is None or len(before) < LEAST:
        return None
    usual = median(before)
    limit = max(APART, SIGMAS * MAD * median([abs(value - usual) for value in before]))
    if now - usual <= limit:
        return None
    text = f"the golden batch costs {now - usual:.2f} nats more against held-out text than it did"
    values = {"golden": signals.look.golden, "heldout": signals.look.loss, "apart": now, "usual": usual}
    return Finding("golden", signals.step, signals.look.step, text, False, values | {"threshold": limit})
