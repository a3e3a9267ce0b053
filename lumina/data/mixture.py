"""Which window comes n-th: a pure function of n, with no state and no history.

A pool takes every window of its shards once an epoch, each epoch in an order of its own. A blend takes from each of its
parts as its weight says, exactly in every `BLOCK` windows, in an order drawn anew for each block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

BLOCK = 1000  # windows in which weights hold to the nearest window
ROUNDS = 6  # of the Feistel network; 4 already pass for random, more hide its structure in tiny domains

Ids = NDArray[np.int64]


class Draw(Protocol):
    """`shards(n)` and the windows in them, for an array of n."""

    def __call__(self, n: Ids) -> tuple[Ids, Ids]: ...


class Pool:
    """Windows of the shards with these numbers as one, each once an epoch."""

    def __init__(self, shards: Sequence[int], sizes: Sequence[int], key: tuple[int, ...]) -> None:
        self.shards, self.borders = np.array(shards), np.cumsum([0, *sizes])
        self.key, self.size = key, int(sum(sizes))

    def __call__(self, n: Ids) -> tuple[Ids, Ids]:
        epochs, positions = np.divmod(n, self.size)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            ids[here] = permute(positions[here], self.size, (*self.key, epoch))
        return self.located(ids)

    def located(self, ids: Ids) -> tuple[Ids, Ids]:
        shard = np.searchsorted(self.borders, ids, side="right") - 1
        return self.shards[shard], ids - self.borders[shard]


class Paced:
    """A pool that begins with its easiest windows; the `until`-th of the run and what follows is the pool's.

    The share in use grows as sqrt(start² + (1 - start²) · n / until) (Platanios et al. 2019, eq. 7); of it, each window
    is as likely as any. `passed` windows of the run came before, in other phases.
    """

    def __init__(self, pool: Pool, difficulty: NDArray[np.floating], until: int, start: float, passed: int = 0) -> None:
        self.pool, self.until, self.start, self.passed = pool, until, start, passed
        self.order = np.argsort(difficulty, kind="stable")

    def __call__(self, n: Ids) -> tuple[Ids, Ids]:
        n = n + self.passed
        shards, windows = self.pool(np.maximum(n - self.until, 0))
        early = n < self.until
        if early.any():
            use = np.sqrt(self.start**2 + (1 - self.start**2) * n[early] / self.until)
            easy = np.maximum(1, (use * self.pool.size).astype(np.int64))
            seed = np.random.SeedSequence((*self.pool.key, 1 << 32)).generate_state(1, np.uint64)[0]
            drawn = (_mix(n[early].astype(np.uint64) ^ seed) % easy.astype(np.uint64)).astype(np.int64)
            shards[early], windows[early] = self.pool.located(self.order[drawn])
        return shards, windows


class Blend:
    """Several draws, each in its share."""

    def __init__(self, parts: Sequence[Draw], weights: Sequence[float], key: tuple[int, ...]) -> None:
        self.parts, self.key = parts, key
        self.counts = _shares(weights)
        self.borders = np.cumsum([0, *self.counts])

    def __call__(self, n: Ids) -> tuple[Ids, Ids]:
        blocks, positions = np.divmod(n, BLOCK)
        slots = np.empty_like(positions)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            slots[here] = permute(positions[here], BLOCK, (*self.key, block))
        part = np.searchsorted(self.borders, slots, side="right") - 1
        within = blocks * np.array(self.counts)[part] + slots - self.borders[part]
        shards, windows = np.empty_like(n), np.empty_like(n)
        for number, draw in enumerate(self.parts):
            here = part == number
            if here.any():
                shards[here], windows[here] = draw(within[here])
        return shards, windows


def _shares(weights: Sequence[float]) -> list[int]:
    """`BLOCK` in whole shares, by largest remainders; a part that is wanted at all gets one."""
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    shares = [max(1, math.floor(share)) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: max(0, BLOCK - sum(shares))]:
        shares[i] += 1
    while sum(shares) > BLOCK:
        shares[shares.index(max(shares))] -= 1
    return shares


@lru_cache(256)
def _round_keys(key: tuple[int, ...]) -> NDArray[np.uint64]:
    """Of the rounds of a permutation: drawing them takes longer than permuting a batch."""
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64).astype(np.uint64)
    keys.setflags(write=False)
    return keys


def permute(positions: Ids, size: int, key: tuple[int, ...]) -> Ids:
    """Where a random permutation of range(`size`), chosen by `key`, sends `positions`, without making it whole.

    A Feistel network (Luby and Rackoff, 1988) permutes the next power of four; values that fall outside are
    sent on until they fall inside (cycle walking; Black and Rogaway, 2002), at most four times on average.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    keys = _round_keys(key)
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
