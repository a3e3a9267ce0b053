"""The memory that copies go to takes no more than the copies."""

from __future__ import annotations

import gc
import weakref

import torch

from lumina.checkpoint import host
from lumina.checkpoint.phases import Buffers


def test_one_block_a_dtype_of_exactly_their_size() -> None:
    tensors = {
        "w": torch.randn(5, 3),
        "half": torch.ones(7, dtype=torch.bfloat16),
        "across": torch.randn(4, 6).T,
        "none": torch.empty(0, 3),
        "one": torch.tensor(1.0),
    }
    made = host.alike(tensors)
    assert {name: (t.shape, t.dtype) for name, t in made.items()} == {
        name: (t.shape, t.dtype) for name, t in tensors.items()
    }
    assert all(tensor.is_contiguous() for tensor in made.values())
    blocks = {t.dtype: t.untyped_storage().nbytes() for t in made.values()}
    assert blocks == {torch.float32: 4 * (15 + 24 + 0 + 1), torch.bfloat16: 2 * 7}
    for number, name in enumerate(made):
        made[name].fill_(number)
    assert all((made[name] == number).all() for number, name in enumerate(made))


def test_a_block_lives_as_long_as_a_part_of_it() -> None:
    """What ends with it, such as its lock, has to know."""
    part = host.alike({"a": torch.ones(3), "b": torch.ones(2)})["b"]
    assert part._base is not None
    block = weakref.ref(part._base)
    gc.collect()
    assert block() is not None
    del part
    gc.collect()
    assert block() is None


def test_a_copy_of_other_tensors_takes_other_memory() -> None:
    buffers = Buffers()
    first = buffers.copy("model", {"w": torch.ones(3)})["w"]
    assert buffers.copy("model", {"w": torch.zeros(3)})["w"] is first
    assert first.sum() == 0
    assert buffers.copy("model", {"w": torch.ones(4)})["w"].tolist() == [1.0] * 4
    assert buffers.copy("optim", {"w": torch.ones(3)})["w"] is not first
