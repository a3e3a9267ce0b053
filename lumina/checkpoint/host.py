"""Memory of the host that tensors are copied into."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device


def alike(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of the same shapes and dtypes on the host, not initialised; page-locked if a GPU has those.

    It takes what they take: those of one dtype are parts of one block, which is locked where it lies. What torch locks
    itself it rounds up to a power of two, to up to twice as much. Raises `RuntimeError` if it cannot be locked.
    """
    made: dict[str, Tensor] = {}
    for dtype in {tensor.dtype for tensor in tensors.values()}:
        same = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
        sizes = [tensor.numel() for tensor in same.values()]
        block = torch.empty(sum(sizes), dtype=dtype)
        if block.numel() and any(tensor.is_cuda for tensor in same.values()):
            _lock(block)
        parts = zip(same.items(), block.split(sizes), strict=True)
        made |= {name: part.view(tensor.shape) for (name, tensor), part in parts}
    return made


def _lock(block: Tensor) -> None:
    """For as long as the block lives; its parts keep it."""
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(int(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, PORTABLE)))
    weakref.finalize(block, runtime.cudaHostUnregister, block.data_ptr()).atexit = False
