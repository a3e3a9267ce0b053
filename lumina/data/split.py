"""Which documents are held out: whole families, chosen by hash, or the ends of what there is if those are few.

Decided from one number a document and 65,536 sums, whatever the size of the corpus. Files may move, be renamed or come
in another order: the same documents are always split the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
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

    Of conversations those from number `border` on are held out. A source of which nothing would be left to train on is
    `spared`: (source, kind).
    """

    heldout: NDArray[np.bool_]
    tails: frozenset[Kind]
    border: int
    spared: frozenset[tuple[int, Kind]]

    @property
    def rule(self) -> Rule:
        return "tails" if self.tails else "families"

    def parts(
        self, record: Record, source: int, key: int, before: int, chars: int, number: int
    ) -> tuple[Record | None, Record | None]:
        """What of a record is trained on and what is held out.

        `before` characters of its document came earlier, of `chars` in all; `number` counts the conversations.
        """
        if (source, record.kind) in self.spared:
            return record, None
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


def decide(rows: NDArray[Any], sources: int) -> Split:
    """The split of documents with the columns `key`, `bytes`, `kind` (of `KINDS`), `source` (of so many), `removed`."""
    sizes = np.zeros((len(KINDS), BUCKETS))
    for some in kept(rows):
        for number in range(len(KINDS)):
            mine = some[some["kind"] == number]
            sizes[number] += np.bincount(_bucket(mine), mine["bytes"], BUCKETS)
    chosen = _choose(sizes)
    tails = frozenset(k for k, size in zip(KINDS, sizes, strict=True) if size[chosen].sum() < SHARE / 2 * size.sum())
    conversations = sum(int((some["kind"] == KINDS.index("chat")).sum()) for some in kept(rows))
    border = max(1, min(conversations - 1, int(conversations * (1 - TAIL))))
    return Split(chosen, tails, border, _spared(rows, sources, chosen, tails, border))


def kept(rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The rows of documents that are not removed, some at a time: the table may be larger than memory."""
    for start in range(0, len(rows), CHUNK):
        some = rows[start : start + CHUNK]
        yield some[some["removed"] == 0]


def _bucket(rows: NDArray[Any]) -> NDArray[np.int64]:
    bucket: NDArray[np.int64] = (rows["key"] >> np.uint64(48)).astype(np.int64)
    return bucket


def _spared(
    rows: NDArray[Any], sources: int, chosen: NDArray[np.bool_], tails: frozenset[Kind], border: int
) -> frozenset[tuple[int, Kind]]:
    have = {kind: np.zeros(sources, np.int64) for kind in KINDS}
    left = {kind: np.zeros(sources, np.int64) for kind in KINDS}
    conversations = 0
    for some in kept(rows):
        for number, kind in enumerate(KINDS):
            mine = some[some["kind"] == number]
            out = chosen[_bucket(mine)]
            if kind in tails:  # of a text the head is always left
                out = conversations + np.arange(len(mine)) >= border if kind == "chat" else np.zeros(len(mine), bool)
            conversations += len(mine) if kind == "chat" else 0
            have[kind] += np.bincount(mine["source"], minlength=sources)
            left[kind] += np.bincount(mine["source"][~out], minlength=sources)
    empty = {kind: np.flatnonzero((have[kind] > 0) & (left[kind] == 0)).tolist() for kind in KINDS}
    return frozenset((source, kind) for kind, numbers in empty.items() for source in numbers)


def _choose(sizes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Groups in the order of their hash, until each kind has `SHARE`; none may bring a kind above `MOST`."""
    totals, held = sizes.sum(1), np.zeros(len(sizes))
    chosen = np.zeros(BUCKETS, dtype=np.bool_)
    for bucket in np.flatnonzero(sizes.sum(0)).tolist():
        group = sizes[:, bucket]
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
