"""Noise that is a function of what it is for: known values, uniform, and independent of any split."""

from __future__ import annotations

import pytest
import torch

from lumina.model.noise import fold, keys, uniform


def test_it_is_splitmix64() -> None:
    """The first numbers of its reference implementation from the state 1234567."""
    state = torch.tensor([1234567])
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(fold(state, i)) % 2**64 for i in range(3)] == want


def test_numbers_are_uniform_and_uncorrelated_along_every_counter() -> None:
    samples = torch.arange(64)
    key = fold(keys(1, 2, samples).unsqueeze(1), torch.arange(64))  # position
    key = fold(key.unsqueeze(-1), torch.arange(16))  # expert
    x = uniform(key).double()
    assert 0 <= x.min() < 1e-3
    assert 1 - 1e-3 < x.max() < 1
    assert abs(x.mean() - 0.5) < 5e-3
    assert abs(x.var() - 1 / 12) < 2e-3
    y = x - x.mean()
    for dim in range(3):
        assert abs((y * y.roll(1, dim)).mean() / y.var()) < 0.02
    assert len(key.unique()) == key.numel()


def test_a_part_of_a_batch_has_the_numbers_it_has_in_the_whole() -> None:
    ids = torch.tensor([5, 9, 2, 7])
    whole = keys(0, 3, ids)
    assert torch.equal(whole, torch.cat([keys(0, 3, part) for part in ids.split(1)]))
    assert not torch.equal(whole, keys(0, 4, ids))
    assert not torch.equal(whole, keys(1, 3, ids))


def test_keys_are_made_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.tensor` on a GPU copies from the host and waits for the copy."""
    want, samples = keys(3, 4, torch.arange(2)), torch.arange(2)
    monkeypatch.delattr(torch, "tensor")
    assert torch.equal(keys(3, 4, samples), want)
