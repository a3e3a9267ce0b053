"""Token streams to batches. Batch i is f(seed, data, i): no state, no history, no workers, O(1) for any i.

Legend: B sequences of a batch, S tokens of a sequence. Sample j is tokens[j·S : j·S + S + 1], inputs and
targets in one; the last, incomplete sample is left out of training.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lumina.data.shards import Shard

NOT_COUNTED = -1
ROUNDS = 6  # of the Feistel network; 4 already pass for random, more hide its structure in tiny domains
THROUGHPUT_BATCHES = 20


@dataclass(frozen=True)
class Batch:
    """Inputs and targets (int64; -1 is not counted), each input's document in its window (int32), and sample
    ids.

    Attention must stay inside a segment. An end token is an input of the document it opens.
    """

    ids_BS: Tensor
    targets_BS: Tensor
    segments_BS: Tensor
    sample_ids_B: Tensor

    @property
    def targets(self) -> int:
        """Counted targets. Read it before the batch moves to a device: later it waits for that device."""
        return int((self.targets_BS != NOT_COUNTED).sum())

    def split(self, n_micro: int) -> list[Batch]:
        """`n_micro` equal parts, in order. Raises `ValueError` if the sequences do not divide."""
        rows = len(self.ids_BS)
        if rows % n_micro:
            raise ValueError(f"{rows} sequences do not divide into {n_micro} micro-batches")
        size = rows // n_micro
        columns = (getattr(self, field.name).split(size) for field in fields(self))
        return [Batch(*part) for part in zip(*columns, strict=True)]

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


class Loader:
    """Batches of `sequences` samples; each epoch takes every sample once, in its own order.

    A batch may hold the end of one epoch and the start of the next.
    """

    def __init__(self, shard: Shard, seq_len: int, sequences: int, seed: int, end_id: int) -> None:
        """Raises `ValueError` if the shard is shorter than one sample."""
        self.samples = (len(shard.tokens) - 1) // seq_len
        if self.samples < 1:
            raise ValueError(f"{len(shard.tokens)} tokens hold no sample of {seq_len} inputs and their targets")
        self.tokens, self.seq_len, self.sequences = shard.tokens, seq_len, sequences
        self.seed, self.end_id = seed, end_id

    def ids(self, i: int) -> NDArray[np.int64]:
        """Global sample ids (B,) of batch `i`, the same for any number of processes."""
        epochs, positions = np.divmod(i * self.sequences + np.arange(self.sequences), self.samples)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            ids[here] = permute(positions[here], self.samples, (self.seed, epoch))
        return ids

    def fetch(self, ids: NDArray[np.int64]) -> Batch:
        """The batch of these samples."""
        where = ids[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        windows = self.tokens[where].astype(np.int64)
        return _batch(windows[:, :-1], windows[:, 1:], ids, self.end_id)

    def batch(self, i: int) -> Batch:
        return self.fetch(self.ids(i))

    def throughput(self) -> float:
        """Tokens a second, measured over a few batches."""
        self.batch(0)
        start = time.perf_counter()
        for i in range(THROUGHPUT_BATCHES):
            self.batch(i)
        return THROUGHPUT_BATCHES * self.sequences * self.seq_len / (time.perf_counter() - start)


class Heldout:
    """Batches in which every token of the stream but the first is a counted target exactly once, in order.

    The last window is filled up with end tokens whose targets are not counted; the last batch may be smaller.
    """

    def __init__(self, shard: Shard, seq_len: int, sequences: int, end_id: int) -> None:
        self.tokens, self.seq_len, self.sequences, self.end_id = shard.tokens, seq_len, sequences, end_id
        self.windows = -(-(len(shard.tokens) - 1) // seq_len)

    def __len__(self) -> int:
        return -(-self.windows // self.sequences)

    def __getitem__(self, i: int) -> Batch:
        first = range(0, self.windows, self.sequences)[i]
        count, seq_len = min(self.sequences, self.windows - first), self.seq_len
        tokens = self.tokens[first * seq_len : (first + count) * seq_len + 1].astype(np.int64)
        missing = count * seq_len + 1 - len(tokens)
        ids = np.pad(tokens, (0, missing), constant_values=self.end_id)[:-1]
        targets = np.pad(tokens, (0, missing), constant_values=NOT_COUNTED)[1:]
        shape = (count, seq_len)
        return _batch(ids.reshape(shape), targets.reshape(shape), np.arange(first, first + count), self.end_id)


def _batch(ids: NDArray[np.int64], targets: NDArray[np.int64], samples: NDArray[np.int64], end_id: int) -> Batch:
    opened = np.cumsum(ids == end_id, axis=1, dtype=np.int32)
    segments = opened - opened[:, :1]
    return Batch(*(torch.from_numpy(np.ascontiguousarray(a)) for a in (ids, targets, segments, samples)))


def permute(positions: NDArray[np.int64], size: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """Where a random permutation of range(`size`), chosen by `key`, sends `positions`, without making it
    whole.

    A Feistel network (Luby and Rackoff, 1988) permutes the next power of four; values that fall outside are
    sent on until they fall inside (cycle walking; Black and Rogaway, 2002), at most four times on average.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64).astype(np.uint64)
    values = _feistel(positions.astype(np.uint64), half, keys)
    while len(outside := np.flatnonzero(values >= size)):
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
