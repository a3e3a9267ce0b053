"""Which window comes n-th: each once an epoch, shares exact in every block, and no n depends on another."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.data.mixture import BLOCK, Blend, Draw, Paced, Pool, permute

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)
KEYS = st.tuples(st.integers(0, 2**63), st.integers(0, 9))


def drawn(draw: Draw, start: int, stop: int) -> list[tuple[int, int]]:
    shards, windows = draw(np.arange(start, stop))
    return list(zip(shards.tolist(), windows.tolist(), strict=True))


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 2**40))
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, (seed, epoch))), np.arange(size))


def test_permutation_of_a_huge_range_needs_no_memory() -> None:
    size = 10**15 + 7
    ids = permute(np.arange(size - 1000, size), size, (0, 0))
    assert len(set(ids.tolist())) == 1000
    assert ids.min() >= 0
    assert ids.max() < size
    assert np.array_equal(ids[10:20], permute(np.arange(size - 990, size - 980), size, (0, 0)))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7])
def test_permutation_of_a_tiny_range_is_fair(size: int) -> None:
    """Over many seeds every ordered pair of images of (0, 1) is as frequent, within five standard errors."""
    trials = 4000
    counts = np.zeros((size, size))
    for seed in range(trials):
        counts[tuple(permute(np.array([0, 1]), size, (seed, 0)))] += 1
    expected = trials / (size * (size - 1))
    off_diagonal = counts[~np.eye(size, dtype=bool)]
    assert counts.trace() == 0
    assert np.abs(off_diagonal - expected).max() < 5 * expected**0.5


def test_permutation_has_no_visible_order() -> None:
    ids = permute(np.arange(10_000), 10_000, (1, 0)).astype(float)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.05
    other = permute(np.arange(10_000), 10_000, (1, 1)).astype(float)
    assert abs(np.corrcoef(ids, other)[0, 1]) < 0.05


# -- a pool


@given(SIZES, KEYS, st.integers(0, 10**6))
def test_a_pool_takes_every_window_once_an_epoch(sizes: list[int], key: tuple[int, int], epoch: int) -> None:
    shards = [3 * i + 1 for i in range(len(sizes))]
    pool = Pool(shards, sizes, key)
    total = sum(sizes)
    everything = [(shard, window) for shard, size in zip(shards, sizes, strict=True) for window in range(size)]
    assert sorted(drawn(pool, epoch * total, (epoch + 1) * total)) == everything


def test_epochs_and_keys_have_orders_of_their_own() -> None:
    pools = [Pool([0, 1], [30, 20], key) for key in ((0,), (1,))]
    orders = {tuple(drawn(pool, epoch * 50, epoch * 50 + 50)) for pool in pools for epoch in range(3)}
    assert len(orders) == 6


def test_shards_of_a_pool_are_mixed() -> None:
    shards = [shard for shard, _ in drawn(Pool([0, 1], [500, 500], (0,)), 0, 200)]
    assert 60 < sum(shards) < 140


# -- a blend


def blend(weights: list[float], sizes: list[int] | None = None) -> Blend:
    sizes = sizes or [70 + 13 * i for i in range(len(weights))]
    return Blend([Pool([i], [size], (5, i)) for i, size in enumerate(sizes)], weights, (5, 99))


WEIGHTS = st.lists(st.floats(0.01, 10), min_size=1, max_size=8)


@given(WEIGHTS, st.integers(0, 10**7))
def test_shares_are_exact_in_every_block(weights: list[float], block: int) -> None:
    taken = Counter(shard for shard, _ in drawn(blend(weights), block * BLOCK, (block + 1) * BLOCK))
    assert sum(taken.values()) == BLOCK
    for shard, weight in enumerate(weights):
        exact = BLOCK * weight / sum(weights)
        assert taken[shard] >= 1
        assert abs(taken[shard] - exact) < 1 or exact < 1 or any(BLOCK * w < sum(weights) for w in weights)


def test_shares_of_a_few() -> None:
    assert blend([0.7, 0.3]).counts == [700, 300]
    assert blend([1, 1, 1]).counts == [334, 333, 333]
    assert blend([1e-9, 1]).counts == [1, 999]
    assert blend([3]).counts == [1000]


def test_a_blend_takes_the_windows_of_each_part_equally_often() -> None:
    mixed = blend([0.7, 0.3], [70, 83])
    for shard, size in enumerate((70, 83)):
        windows = [window for s, window in drawn(mixed, 0, 3 * BLOCK) if s == shard]
        assert max(Counter(windows).values()) - min(Counter(windows).values()) <= 1
        assert len(set(windows)) == size


def test_the_windows_of_a_part_are_its_own_first_ones() -> None:
    mixed = blend([0.7, 0.3], [10_000, 10_000])
    for shard, count in ((0, 2100), (1, 900)):
        mine = [pair for pair in drawn(mixed, 0, 3 * BLOCK) if pair[0] == shard]
        assert sorted(mine) == sorted(drawn(mixed.parts[shard], 0, count))


@given(st.integers(0, 10**9), st.lists(st.integers(0, 3000), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_any_n_by_itself_is_what_it_is_in_a_row(start: int, places: list[int]) -> None:
    inner = Blend([Pool([0], [70], (1,)), Pool([1], [50], (2,))], [1, 2], (3,))
    paced = Paced(Pool([2], [40], (4,)), np.arange(40), 10**9 + 1500, 0.2)
    outer = Blend([inner, paced], [0.6, 0.4], (6,))
    row = drawn(outer, start, start + 3001)
    assert drawn(outer, start, start + 3001) == row
    shards, windows = outer(np.array(places) + start)
    assert list(zip(shards.tolist(), windows.tolist(), strict=True)) == [row[place] for place in places]


def test_a_blend_of_blends_keeps_the_shares_of_both() -> None:
    inner = Blend([Pool([0], [70], (1,)), Pool([1], [50], (2,))], [1, 3], (3,))
    outer = Blend([inner, Pool([2], [40], (4,))], [0.6, 0.4], (6,))
    taken = Counter(shard for shard, _ in drawn(outer, 0, 5 * BLOCK))  # 3000 of the inner one: 3 of its blocks
    assert taken == {0: 750, 1: 2250, 2: 2000}


def test_blocks_are_mixed_and_differ() -> None:
    mixed = blend([1, 1])
    rows = [[shard for shard, _ in drawn(mixed, k * BLOCK, (k + 1) * BLOCK)] for k in range(2)]
    assert rows[0] != rows[1]
    assert all(40 < sum(row[i : i + 200]) < 160 for row in rows for i in range(0, BLOCK, 200))


# -- easy first


def paced(until: int = 4000, start: float = 0.1, size: int = 1000) -> Paced:
    """The difficulty of window i is (7 i) mod 1000."""
    pool = Pool([0, 1], [size // 4, size - size // 4], (8,))
    return Paced(pool, np.arange(size) * 7 % size, until, start)


def difficulty(pairs: list[tuple[int, int]], size: int = 1000) -> np.ndarray:
    return np.array([(window + shard * (size // 4)) * 7 % size for shard, window in pairs])


def test_at_first_only_the_easiest_share_is_in_use() -> None:
    assert difficulty(drawn(paced(), 0, 40)).max() < np.sqrt(0.01 + 0.99 * 40 / 4000) * 1000
    for n in (500, 1000, 2000, 3900):
        used = np.sqrt(0.01 + 0.99 * n / 4000) * 1000
        mine = difficulty(drawn(paced(), n - 100, n + 100))
        assert mine.max() <= np.sqrt(0.01 + 0.99 * (n + 100) / 4000) * 1000
        assert mine.max() > 0.9 * used  # all of the share, not only its beginning
        assert abs(mine.mean() - used / 2) < 0.15 * used


def test_after_that_it_is_the_pool() -> None:
    pace = paced()
    assert drawn(pace, 4000, 6000) == drawn(pace.pool, 0, 2000)
    assert drawn(pace, 3990, 4010)[10:] == drawn(pace.pool, 0, 10)


def test_a_pace_is_deterministic_and_follows_its_key() -> None:
    assert drawn(paced(), 0, 300) == drawn(paced(), 0, 300)
    other = Paced(Pool([0, 1], [250, 750], (9,)), np.arange(1000) * 7 % 1000, 4000, 0.1)
    assert drawn(other, 0, 300) != drawn(paced(), 0, 300)


def test_a_share_of_less_than_a_window_is_one() -> None:
    assert difficulty(drawn(paced(start=1e-9, size=100), 0, 1), 100).tolist() == [0]
