"""Which documents are held out: whole families, chosen by hash, or the ends of what there is if those are few.

Decided from one number a document and 65,536 sums, whatever the size of the corpus. Files may move, be renamed or come
in another order: the same documents are always split the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lumina.data.records import KINDS, Kind, Record

RULE = 2  # raise it when the split of some corpus changes
SHARE = 0.03  # of each kind's bytes that families hold out
MOST = 0.05  # no group of families may bring the share of a kind above this
TAIL = 0.05  # of each text, or of the conversations, if no families make up at least half of SHARE
BUCKETS = 1 << 16  # groups of families, by the first bits of their hash
CHUNK = 1 << 20  # rows looked at once

Rule = Literal["families", "tails"]


@dataclass(frozen=True)
class Split:
    """`heldout` says of each bucket whether it is held out; `tails`, of which kinds the ends are instead.

    Of conversations those from number `border` on are held out.
    """

    heldout: NDArray[np.bool_]
    tails: frozenset[Kind]
    border: int

    @property
    def rule(self) -> Rule:
        return "tails" if self.tails else "families"

    def parts(
        self, record: Record, key: int, before: int, chars: int, number: int
    ) -> tuple[Record | None, Record | None]:
        """What of a record is trained on and what is held out.

        `before` characters of its document came earlier, of `chars` in all; `number` counts the conversations.
        """
        if record.kind not in self.tails:
            return (None, record) if self.heldout[key >> 48] else (record, None)
        if record.kind == "chat":
            return (record, None) if number < self.border else (None, record)
        cut, end = _cut(record.text, chars, before), int(chars * (1 - TAIL)) - before
        head, tail = record.text[:cut], record.text[cut:]
        return (
            Record(record.where, head, last=end <= len(record.text) or record.last) if head else None,
            Record(record.where, tail, last=record.last) if tail else None,
        )


def decide(rows: NDArray[Any]) -> Split:
    """The split of documents with the columns `key`, `bytes`, `kind` (of `KINDS`)."""
    sizes = {kind: _sizes(rows, number) for number, kind in enumerate(KINDS)}
    chosen = _choose(list(sizes.values()))
    tails: set[Kind] = {kind for kind in KINDS if sizes[kind][chosen].sum() < SHARE / 2 * sizes[kind].sum()}
    conversations = int((rows["kind"] == KINDS.index("chat")).sum())
    border = max(1, min(conversations - 1, int(conversations * (1 - TAIL))))
    return Split(chosen, frozenset(tails), border)


def _sizes(rows: NDArray[Any], kind: int) -> NDArray[np.float64]:
    """Bytes in each bucket."""
    total = np.zeros(BUCKETS)
    for start in range(0, len(rows), CHUNK):
        some = rows[start : start + CHUNK]
        some = some[some["kind"] == kind]
        total += np.bincount((some["key"] >> np.uint64(48)).astype(np.int64), some["bytes"], BUCKETS)
    return total


def _choose(sizes: Sequence[NDArray[np.float64]]) -> NDArray[np.bool_]:
    """Groups in the order of their hash, until each kind has `SHARE`; none may bring a kind above `MOST`."""
    totals, held = np.array([kind.sum() for kind in sizes]), np.zeros(len(sizes))
    table = np.stack(sizes)
    chosen = np.zeros(BUCKETS, dtype=np.bool_)
    for bucket in np.flatnonzero(table.sum(0)).tolist():
        group = table[:, bucket]
        lacking = held < SHARE * totals
        if not lacking.any():
            break
        if group[lacking].any() and (held + group <= MOST * totals).all():
            chosen[bucket] = True
            held += group
    return chosen


def _cut(text: str, chars: int, before: int) -> int:
    """Where in `text` the document's tail begins: after a line if one ends nearby, else after a word, else anywhere."""
    nearby, cut = int(chars * (1 - 2 * TAIL)) - before, int(chars * (1 - TAIL)) - before
    if cut >= len(text) or cut <= 0:
        return max(0, min(cut, len(text)))
    for mark in "\n ":
        border = text.rfind(mark, max(0, nearby), cut) + 1
        if border:
            return border
    return cut
