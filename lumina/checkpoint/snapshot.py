"""A restore point in memory: copies of tensors, and the plain state beside them. On disk it is a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from lumina.checkpoint.host import alike
from lumina.parallel.sharding import local

Tensors = Mapping[str, Tensor]


class Snapshot:
    """What the tensors and the state were when it was taken; `bytes` is the memory that it takes.

    Of a tensor that is shared out among processes each keeps its own rows.
    """

    def __init__(self, copies: dict[str, Tensor], state: Any) -> None:
        self.copies, self.state = copies, state

    @property
    def bytes(self) -> int:
        return sum(copy.nbytes for copy in self.copies.values())


@torch.no_grad()
def take(tensors: Tensors, state: Any, into: Snapshot | None = None) -> Snapshot:
    """Copies `tensors` to the host; `state` is copied as `deepcopy` does.

    `into` is a snapshot that nobody needs any more: its memory is used again. It then holds the new one.
    Raises `ValueError` if it was one of other tensors.
    """
    parts = {name: local(tensor) for name, tensor in tensors.items()}
    if into is None:
        into = Snapshot(alike(parts), None)
    for _, part, copy in _paired(parts, into.copies):
        copy.copy_(part)
    into.state = deepcopy(state)
    return into


@torch.no_grad()
def restore(snapshot: Snapshot, tensors: Tensors) -> Any:
    """Writes what was copied back, in place and to the bit; returns a copy of the state.

    Raises `ValueError`, before anything is written, if these are not the tensors that were copied.
    """
    parts = {name: local(tensor) for name, tensor in tensors.items()}
    for _, part, copy in _paired(parts, snapshot.copies):
        part.copy_(copy)
    return deepcopy(snapshot.state)


def _paired(parts: dict[str, Tensor], copies: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """Each tensor with its copy. Raises `ValueError` if they are not the same tensors."""
    if parts.keys() != copies.keys():
        raise ValueError(f"not the tensors of this snapshot: {', '.join(sorted(parts.keys() ^ copies.keys()))}")
    for name, part in parts.items():
        copy = copies[name]
        if (part.shape, part.dtype) != (copy.shape, copy.dtype):
            raise ValueError(
                f"{name}: {[*part.shape]} of {part.dtype}, the snapshot has {[*copy.shape]} of {copy.dtype}"
            )
    return [(name, part, copies[name]) for name, part in parts.items()]
