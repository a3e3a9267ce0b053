"""Streams to windows of one sequence: inputs, targets and the document of each input.

Texts are cut where a window is full, and nothing is left over: the last window is filled up. Conversations are packed
whole, several to a window, and each sees only itself; one that is longer than a window is cut where a user's turn
begins.

Legend: B windows of a batch, S tokens of a window.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.data.corpus import Shard
from lumina.data.template import COUNTED, TURN

Whole = NDArray[np.int64]
NOT_COUNTED = -1
LOOKAHEAD = 4096  # conversations that are packed together: more hardly fills windows better


class Rows(NamedTuple):
    """Inputs and targets (int64; -1 is not counted) and each input's document in its window (int32)."""

    ids_BS: NDArray[np.int64]
    targets_BS: NDArray[np.int64]
    segments_BS: NDArray[np.int32]


class TextWindows:
    """Window j is tokens[j·S : j·S + S + 1], inputs and targets in one. `padding` is the share that is filled up."""

    def __init__(self, shard: Shard, seq_len: int, end_id: int) -> None:
        self.shard, self.tokens, self.seq_len, self.end_id = shard, shard.tokens, seq_len, end_id
        self._count = -(-(len(self.tokens) - 1) // seq_len)
        self.padding = 1 - (len(self.tokens) - 1) / max(1, self._count * seq_len)

    def __len__(self) -> int:
        return self._count

    def fetch(self, windows: NDArray[np.int64]) -> Rows:
        where = windows[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        last = len(self.tokens) - 1
        tokens = self.tokens[np.minimum(where, last)].astype(np.int64)
        ids, targets = tokens[:, :-1], tokens[:, 1:].copy()
        if (where[:, -1] > last).any():
            ids = np.where(where[:, :-1] > last, self.end_id, ids)
            targets[where[:, 1:] > last] = NOT_COUNTED
        opened = np.cumsum(ids == self.end_id, axis=1, dtype=np.int32)
        return Rows(ids, targets, opened - opened[:, :1])

    def places(self) -> NDArray[np.int64]:
        """For each window the number of the document that fills its middle."""
        middle = np.arange(self._count, dtype=np.int64) * self.seq_len + self.seq_len // 2
        after: NDArray[np.int64] = np.searchsorted(np.asarray(self.shard.starts, np.int64), middle, side="right")
        return np.maximum(0, after - 1)


@dataclass
class Cuts:
    """What became of conversations that are longer than a window."""

    overlong: int = 0
    pieces: int = 0
    lost_tokens: int = 0  # of turns that alone are longer, and of pieces without an answer
    counted: int = 0  # targets of overlong ones that should count, and how many of those are lost
    lost_counted: int = 0


class ChatWindows:
    """Window j holds the pieces `first[j]` to `first[j + 1]`; piece i is tokens[start[i] : start[i] + length[i]]."""

    def __init__(self, shard: Shard, seq_len: int, end_id: int, train_on: str) -> None:
        self.tokens, self.marks, self.seq_len, self.end_id = shard.tokens, shard.marks, seq_len, end_id
        self.every_token = train_on == "all"
        self.cuts = Cuts()
        pieces = _pieces(shard, seq_len, self.every_token, self.cuts)
        order, self.first = pack(pieces[1] - 1, seq_len)
        self.start, self.length, self.document = (column[order] for column in pieces)
        used = int((self.length - 1).sum())
        self.padding = 1 - used / max(1, len(self) * seq_len)

    def __len__(self) -> int:
        return len(self.first) - 1

    def fetch(self, windows: NDArray[np.int64]) -> Rows:
        shape = (len(windows), self.seq_len)
        ids = np.full(shape, self.end_id, dtype=np.int64)
        targets = np.full(shape, NOT_COUNTED, dtype=np.int64)
        segments = np.empty(shape, dtype=np.int32)
        for row, window in enumerate(windows.tolist()):
            at = 0
            pieces = range(int(self.first[window]), int(self.first[window + 1]))
            for segment, i in enumerate(pieces):
                start, length = int(self.start[i]), int(self.length[i])
                here, there = slice(at, at + length - 1), slice(start, start + length)
                tokens = self.tokens[there].astype(np.int64)
                ids[row, here] = tokens[:-1]
                counted = self.every_token | (self.marks[there][1:] & COUNTED).astype(np.bool_)
                targets[row, here] = np.where(counted, tokens[1:], NOT_COUNTED)
                segments[row, here] = segment
                at += length - 1
            segments[row, at:] = len(pieces)
        return Rows(ids, targets, segments)

    def places(self) -> NDArray[np.int64]:
        """For each window the number of its first document."""
        document: NDArray[np.int64] = self.document[self.first[:-1]]
        return document


def windows_of(shard: Shard, seq_len: int, end_id: int, train_on: str) -> TextWindows | ChatWindows:
    if shard.kind == "text":
        return TextWindows(shard, seq_len, end_id)
    return ChatWindows(shard, seq_len, end_id, train_on)


def pack(lengths: Whole, room: int) -> tuple[Whole, Whole]:
    """Pieces to windows of `room` tokens: their order, and where in it each window begins (and the last one ends).

    The longest of the next `LOOKAHEAD` pieces first, each into the fullest window that has room (best fit decreasing:
    at most 11/9 of the fewest windows; Johnson 1973). Windows come in the order in which they were begun.
    """
    orders, first, packed = [], [np.zeros(1, np.int64)], 0
    for begin in range(0, len(lengths), LOOKAHEAD):
        chunk = lengths[begin : begin + LOOKAHEAD].tolist()
        windows: list[list[int]] = []
        free: list[tuple[int, int]] = []  # room left, window
        for piece in sorted(range(len(chunk)), key=chunk.__getitem__, reverse=True):
            at = bisect_left(free, (chunk[piece], -1))
            left, window = free.pop(at) if at < len(free) else (room, len(windows))
            if window == len(windows):
                windows.append([])
            windows[window].append(piece)
            if left > chunk[piece]:
                insort(free, (left - chunk[piece], window))
        orders.append(begin + np.array([piece for window in windows for piece in window], np.int64))
        first.append(packed + np.cumsum([len(window) for window in windows], dtype=np.int64))
        packed += len(chunk)
    return np.concatenate(orders) if orders else np.zeros(0, np.int64), np.concatenate(first)


def _pieces(shard: Shard, seq_len: int, every_token: bool, cuts: Cuts) -> tuple[Whole, Whole, Whole]:
    """Start, length and document of each conversation, or of what it is cut into."""
    start = np.asarray(shard.starts, dtype=np.int64)
    length = np.diff(start, append=len(shard.tokens))
    document = np.arange(len(start))
    overlong = np.flatnonzero(length > seq_len + 1)
    if not len(overlong):
        return start, length, document
    cuts.overlong = len(overlong)
    found: list[tuple[int, int, int]] = []
    for number in overlong.tolist():
        begin = int(start[number])
        marks = np.asarray(shard.marks[begin : begin + length[number]])
        for at, size in _cut(np.flatnonzero(marks & TURN).tolist(), len(marks), seq_len + 1, cuts):
            if size > 1 and (every_token or (marks[at + 1 : at + size] & COUNTED).any()):
                found.append((begin + at, size, number))
            else:
                cuts.lost_tokens += size
        cuts.counted += int((marks[1:] & COUNTED).sum()) if not every_token else len(marks) - 1
    cuts.pieces = len(found)
    cuts.lost_counted = cuts.counted - sum(_counted(shard, every_token, at, size) for at, size, _ in found)
    fitting = length <= seq_len + 1
    pieces = np.array(found, dtype=np.int64).reshape(-1, 3)
    columns = (np.concatenate([column[fitting], pieces[:, i]]) for i, column in enumerate((start, length, document)))
    start, length, document = columns
    order = np.argsort(start, kind="stable")
    return start[order], length[order], document[order]


def _counted(shard: Shard, every_token: bool, at: int, size: int) -> int:
    return size - 1 if every_token else int((shard.marks[at + 1 : at + size] & COUNTED).sum())


def _cut(turns: list[int], length: int, most: int, cuts: Cuts) -> Iterator[tuple[int, int]]:
    """Pieces of at most `most` tokens, cut before a turn; of a turn that alone is longer the end is lost."""
    borders = [*turns, length]
    at = 0
    while at < length:
        fitting = [border for border in borders if at < border <= at + most]
        if fitting:
            yield at, fitting[-1] - at
            at = fitting[-1]
            continue
        after = next(border for border in borders if border > at)
        yield at, most
        cuts.lost_tokens += after - at - most
        at = after
