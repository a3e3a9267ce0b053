"""Near-duplicate families: texts that share many of their lines, to be kept on one side of a split."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

SHINGLE = 5  # consecutive lines: fewer match by accident, more miss edited copies
SHARE = 0.2  # of the smaller text's shingles; the standard library's copies lie above it
_BASE = np.uint64(0x9E3779B97F4A7C15)


def near_duplicates(texts: Sequence[str]) -> list[int]:
    """For each text the index of its family's first text. Exact: all shingles are compared, not a sketch."""
    shingles = [_shingles(text) for text in texts]
    leader = list(range(len(texts)))

    def root(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    for (i, j), shared in _shared(shingles).items():
        if shared >= SHARE * min(len(shingles[i]), len(shingles[j])):
            first, second = sorted((root(i), root(j)))
            leader[second] = first
    return [root(i) for i in range(len(texts))]


def _shingles(text: str) -> NDArray[np.uint64]:
    """Distinct hashes of `SHINGLE` consecutive lines; blank lines and indentation do not count."""
    stripped = (line.strip() for line in text.splitlines())
    lines = np.array([zlib.crc32(line.encode()) for line in stripped if line], dtype=np.uint64)
    count = max(1, len(lines) - SHINGLE + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for k in range(min(SHINGLE, len(lines))):
        hashes = hashes * _BASE + lines[k : k + count]
    return np.unique(hashes)


def _shared(shingles: Sequence[NDArray[np.uint64]]) -> Counter[tuple[int, int]]:
    """How many shingles each pair of texts has in common; pairs with none are left out."""
    if not shingles:
        return Counter()
    hashes = np.concatenate(shingles)
    owners = np.repeat(np.arange(len(shingles)), [len(own) for own in shingles])
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    borders = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1], True])
    pairs: Counter[tuple[int, int]] = Counter()
    for start, stop in pairwise(borders.tolist()):
        pairs.update(combinations(owners[start:stop].tolist(), 2))
    return pairs
