"""Restore points in memory, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lumina.checkpoint import snapshot


def some() -> dict[str, Tensor]:
    weight = nn.Parameter(torch.randn(5, 3))
    return {
        "weight": weight,
        "half": torch.tensor([1.0, float("nan"), -0.0], dtype=torch.bfloat16),
        "across": torch.randn(4, 6).T,  # strides of its own
        "step": torch.tensor(7.0),
        "active": torch.tensor([True, False]),
        "good": torch.ones(1, dtype=torch.int32),
        "none": torch.empty(0, 3),
    }


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {
        name: t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b""
        for name, t in ((name, t.unsqueeze(0) if t.ndim == 0 else t) for name, t in tensors.items())
    }


def spoil(tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(3)


def test_to_the_bit_and_in_place() -> None:
    tensors, state = some(), {"window": [1.0, 2.0]}
    before, places = bits(tensors), [tensor.data_ptr() for tensor in tensors.values()]
    taken = snapshot.take(tensors, state)
    spoil(tensors)
    state["window"].append(3.0)
    again = snapshot.restore(taken, tensors)
    assert bits(tensors) == before
    assert [tensor.data_ptr() for tensor in tensors.values()] == places
    assert again == {"window": [1.0, 2.0]}
    again["window"].append(4.0)
    spoil(tensors)
    assert snapshot.restore(taken, tensors) == {"window": [1.0, 2.0]}  # as often as one likes
    assert bits(tensors) == before


def test_its_memory_is_used_again() -> None:
    tensors = some()
    first = snapshot.take(tensors, 1)
    places = [copy.data_ptr() for copy in first.copies.values()]
    spoil(tensors)
    after = bits(tensors)
    second = snapshot.take(tensors, 2, into=first)
    assert [copy.data_ptr() for copy in second.copies.values()] == places
    with torch.no_grad():
        tensors["weight"].zero_()
    assert snapshot.restore(second, tensors) == 2
    assert bits(tensors) == after


def test_it_says_what_memory_it_takes() -> None:
    tensors = some()
    assert snapshot.take(tensors, None).bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    "change",
    [{"more": torch.zeros(1)}, {"weight": torch.zeros(5, 2)}, {"weight": torch.zeros(5, 3, dtype=torch.float64)}],
)
def test_other_tensors_are_refused_before_anything_is_written(change: dict[str, Tensor]) -> None:
    tensors = some()
    taken = snapshot.take(tensors, None)
    others = some() | change
    before = bits(others)
    with pytest.raises(ValueError, match="snapshot"):
        snapshot.restore(taken, others)
    assert bits(others) == before
