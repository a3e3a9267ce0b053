"""Checkpoints of earlier versions, read as if they were saved today. No torch.

COMPLETE says in which format a checkpoint was written. `MIGRATIONS[n]` makes the plain values of one of format n, in
place, into those of format n + 1. Whoever adds, renames or removes a value of `state.json`, or changes what a tensor
is called or holds, adds one, and beside it a run of the version before in tests/checkpoint/.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lumina.checkpoint.catalogue import LOSS, RUN

State = dict[str, Any]


def _to_2(state: State) -> None:
    """A checkpoint did not say of which run it is, had no held-out loss, precision, attempt or overlays; its files were
    those of torch's distributed checkpoint, and known by their SHA-256."""
    state |= {RUN: "", LOSS: None, "precision": None, "attempt": 0, "overlays": []}
    state["progress"]["eval_tokens"] = 16384


def _to_3(state: State) -> None:
    """There was no orchestrator, nothing remembered what invariants need, and the metrics not yet observed were 8."""
    state["orchestrator"] = None
    progress, pending = state["progress"], state["progress"]["pending"]
    last = bool(pending and pending[4])
    if pending:
        nats, correct, count, norm, skipped, _, _, scale, *rows = pending
        nan, taken = math.nan, float(state["optimizer_steps"])
        figures = [nats, correct, count, nan, norm, nan, nan, nan, skipped, nan, nan, nan, nan, taken, scale]
        progress["pending"] = figures + rows
    progress |= {
        "skipped": progress["step"] - state["optimizer_steps"] - last, "batch": -1,
        "content": "", "broken": [], "contents": [], "golden": "", "sums": None, "looked": 0, "rates": 0.0,
        "travel": 0.0,
    }  # fmt: skip


MIGRATIONS: dict[int, Callable[[State], None]] = {1: _to_2, 2: _to_3}
FORMAT = 1 + len(MIGRATIONS)  # that this version writes


def migrate(state: State, format: int) -> State:
    """The plain values of a checkpoint of this `format`, brought up to date in place."""
    for version in range(format, FORMAT):
        MIGRATIONS[version](state)
    return state


def unreadable(format: object) -> str:
    """Why a checkpoint of this format cannot be read, in a sentence; nothing if it can."""
    if type(format) is int and 1 <= format <= FORMAT:
        return ""
    newer = type(format) is int and format > FORMAT
    writer = "a newer lumina" if newer else "something else"
    return f"written by {writer}, in format {format!r:.20}; this one reads formats 1 to {FORMAT}"
