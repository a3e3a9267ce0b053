"""Which documents are held out: whole families, chosen by hash, or the ends of what there is if those are few.

Decided from one number a document and 65,536 sums, whatever the size of the corpus. Files may move, be renamed or come
in another order: the same documents are always split the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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

    Of the conversations of source i those from number `borders[i]` on are held out then.
    """

    heldout: NDArray[np.bool_]
    tails: frozenset[Kind]
    borders: tuple[int, ...]

    @property
    def rule(self) -> Rule:
        return "tails" if self.tails else "families"

    def parts(
        self, record: Record, source: int, key: int, before: int, chars: int, number: int
    ) -> tuple[Record | None, Record | None]:
        """What of a record is trained on and what is held out.

        `before` characters of its document came earlier, of `chars` in all; `number` counts its source's conversations.
        """
        if record.kind not in self.tails:
            return (None, record) if self.heldout[key >> 48] else (record, None)
        if record.kind == "chat":
            return (record, None) if number < self.borders[source] else (None, record)
        cut, end = _cut(record.text, chars, before), int(chars * (1 - TAIL)) - before
        head, tail = record.text[:cut], record.text[cut:]
        return (
            Record(record.where, head, last=end <= len(record.text) or record.last) if head else None,
            Record(record.where, tail, last=record.last) if tail else None,
        )


def decide(rows: NDArray[Any], weighted: Sequence[bool]) -> Split:
    """The split of documents with the columns `key`, `bytes`, `kind` (of `KINDS`), `source`, `removed`.

    `weighted` says which sources have a weight: something of each of those is left to train on.
    """
    sizes = np.zeros((len(KINDS), BUCKETS))
    guarded = {(i, k): np.zeros(BUCKETS, np.int64) for i, has in enumerate(weighted) if has for k in range(len(KINDS))}
    conversations = np.zeros(len(weighted), np.int64)
    for some in kept(rows):
        for number, kind in enumerate(KINDS):
            mine = some[some["kind"] == number]
            sizes[number] += np.bincount(_bucket(mine), mine["bytes"], BUCKETS)
            if kind == "chat":
                conversations += np.bincount(mine["source"], minlength=len(weighted))
        for (source, number), documents in guarded.items():
            mine = some[(some["source"] == source) & (some["kind"] == number)]
            documents += np.bincount(_bucket(mine), minlength=BUCKETS)
    chosen = _choose(sizes, [documents for documents in guarded.values() if documents.any()])
    tails = frozenset(k for k, size in zip(KINDS, sizes, strict=True) if size[chosen].sum() < SHARE / 2 * size.sum())
    return Split(chosen, tails, _borders(conversations.tolist()))


def kept(rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The rows of documents that are not removed, some at a time: the table may be larger than memory."""
    for start in range(0, len(rows), CHUNK):
        some = rows[start : start + CHUNK]
        yield some[some["removed"] == 0]


def _bucket(rows: NDArray[Any]) -> NDArray[np.int64]:
    bucket: NDArray[np.int64] = (rows["key"] >> np.uint64(48)).astype(np.int64)
    return bucket


def _choose(sizes: NDArray[np.float64], guarded: Sequence[NDArray[np.int64]]) -> NDArray[np.bool_]:
    """Groups in the order of their hash, until each kind has `SHARE`.

    None may bring a kind above `MOST`, or take the last documents of those that are `guarded`.
    """
    totals, held = sizes.sum(1), np.zeros(len(sizes))
    left = np.array([documents.sum() for documents in guarded], np.int64)
    chosen = np.zeros(BUCKETS, dtype=np.bool_)
    for bucket in np.flatnonzero(sizes.sum(0)).tolist():
        group, documents = sizes[:, bucket], np.array([own[bucket] for own in guarded], np.int64)
        lacking = held < SHARE * totals
        if not lacking.any():
            break
        if group[lacking].any() and (held + group <= MOST * totals).all() and (left > documents).all():
            chosen[bucket] = True
            held += group
            left -= documents
    return chosen


def _borders(conversations: Sequence[int]) -> tuple[int, ...]:
    """Where the held-out end of each source's conversations begins; the largest gives one if none would give any."""
    borders = [math.ceil(count * (1 - TAIL)) for count in conversations]
    if borders == list(conversations) and max(conversations, default=0) > 1:
        borders[conversations.index(max(conversations))] -= 1
    return tuple(borders)


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
