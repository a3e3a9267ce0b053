"""Batch i is a function of seed, data and i; every token is where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumina.data.loader import NOT_COUNTED, Batch, Heldout, Loader, permute
from lumina.data.shards import Shard

END = 0


def shard(length: int, ends: tuple[int, ...] = ()) -> Shard:
    """Token i of the stream is i + 1, or END at `ends`."""
    tokens = np.arange(1, length + 1, dtype=np.uint16)
    tokens[list(ends)] = END
    return Shard(tokens, text_bytes=length, documents=1)


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


@given(st.integers(2, 200), st.integers(1, 8), st.integers(1, 40), st.integers(0, 5))
def test_each_epoch_takes_every_sample_once(length: int, seq_len: int, sequences: int, seed: int) -> None:
    if (length - 1) // seq_len < 1:
        return
    loader = Loader(shard(length), seq_len, sequences, seed, END)
    epochs = 3
    batches = -(-epochs * loader.samples // sequences)
    ids = np.concatenate([loader.ids(i) for i in range(batches)])
    for epoch in range(epochs):
        part = ids[epoch * loader.samples : (epoch + 1) * loader.samples]
        assert sorted(part.tolist()) == list(range(loader.samples))


def test_a_batch_depends_on_its_index_alone() -> None:
    loader, fresh = (Loader(shard(1000), 8, 4, seed=3, end_id=END) for _ in range(2))
    for i in (5, 0, 100, 5):
        loader.batch(i)
    assert torch.equal(loader.batch(77).ids_BS, fresh.batch(77).ids_BS)
    assert not np.array_equal(loader.ids(77), Loader(shard(1000), 8, 4, 4, END).ids(77))
    assert len({tuple(loader.ids(i)) for i in range(200)}) == 200


def test_samples_hold_inputs_and_the_tokens_after_them() -> None:
    loader = Loader(shard(1000), 8, 4, seed=0, end_id=END)
    batch = loader.fetch(np.array([3, 0]))
    assert batch.ids_BS.tolist() == [list(range(25, 33)), list(range(1, 9))]
    assert torch.equal(batch.targets_BS, batch.ids_BS + 1)
    assert batch.sample_ids_B.tolist() == [3, 0]
    assert {t.dtype for t in (batch.ids_BS, batch.targets_BS, batch.sample_ids_B)} == {torch.int64}
    assert batch.segments_BS.dtype == torch.int32
    assert loader.samples == 124


def test_an_end_token_is_an_input_of_the_document_it_opens() -> None:
    batch = Loader(shard(17, ends=(0, 3, 4, 8, 12)), 8, 1, 0, END).fetch(np.array([0, 1]))
    assert batch.ids_BS[0].tolist() == [0, 2, 3, 0, 0, 6, 7, 8]
    assert batch.segments_BS.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1]]


def test_micro_batches_join_to_the_batch() -> None:
    batch = Loader(shard(1000, ends=(50, 60)), 8, 6, seed=0, end_id=END).batch(0)
    parts = batch.split(3)
    for name in ("ids_BS", "targets_BS", "segments_BS", "sample_ids_B"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert sum(part.targets for part in parts) == batch.targets == 48
    with pytest.raises(ValueError, match="6 sequences do not divide into 4"):
        batch.split(4)


def test_moving_keeps_everything() -> None:
    batch = Loader(shard(100), 8, 2, 0, END).batch(0).to("meta")
    assert isinstance(batch, Batch)
    assert {t.device.type for t in (batch.ids_BS, batch.targets_BS, batch.segments_BS, batch.sample_ids_B)} == {"meta"}


@given(st.integers(2, 200), st.integers(1, 16), st.integers(1, 5))
def test_every_held_out_token_is_predicted_once_in_order(length: int, seq_len: int, sequences: int) -> None:
    side = shard(length, ends=(0, length // 2, length - 1))
    batches = list(Heldout(side, seq_len, sequences, END))
    targets = torch.cat([batch.targets_BS.flatten() for batch in batches])
    counted = targets != NOT_COUNTED
    assert targets[counted].tolist() == side.tokens[1:].tolist()
    inputs = torch.cat([batch.ids_BS.flatten() for batch in batches])
    assert inputs[counted].tolist() == side.tokens[:-1].tolist()
    assert set(inputs[~counted].tolist()) <= {END}
    assert sum(batch.targets for batch in batches) == length - 1
    assert all(batch.ids_BS.shape == batch.segments_BS.shape == (len(batch.sample_ids_B), seq_len) for batch in batches)
    assert [i for batch in batches for i in batch.sample_ids_B.tolist()] == list(range(-(-(length - 1) // seq_len)))


def test_a_shard_without_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="8 tokens hold no sample of 8 inputs"):
        Loader(shard(8), 8, 1, 0, END)
    assert Loader(shard(9), 8, 1, 0, END).samples == 1


def test_throughput_is_measured() -> None:
    assert Loader(shard(1000), 8, 4, 0, END).throughput() > 0
