"""Two processes that save with both ways of a writer; `test_writing.py` reads the files.

ROOT/<way>/step-000001, of rows that do not divide evenly; rank 1 is refused step 2; step 3
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lumina.checkpoint import phases
from lumina.checkpoint.writer import Writer
from lumina.errors import UserError
from lumina.parallel.world import join


def whole() -> dict[str, Tensor]:
    """Seven rows, one row, none, and rows that are not shared out."""
    return {"seven": torch.arange(21.0).view(7, 3), "one": torch.ones(1, 2), "none": torch.ones(0, 2)}


def main(root: Path) -> None:
    world = join()
    mesh = init_device_mesh("cpu", (world.size,))
    shared = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole().items()}
    model, optim = shared | {"plain": torch.arange(4)}, {"m": shared["seven"]}
    flush = phases.flush

    def refusing(root: Path, aside: Path, step: int, files: Any) -> None:
        if step == 2 and world.rank == 1:
            raise UserError("rank 1 was refused")
        flush(root, aside, step, files)

    phases.flush = refusing
    for way in ("inline", "background"):
        writer = Writer(root / way, world, way)
        writer.save(1, model, optim, {"rank": world.rank})
        receipts = []
        while not receipts:
            receipts = writer.poll()
        assert receipts[0].verified
        assert not writer.busy
        writer.save(2, model, optim, {})
        with pytest.raises(UserError, match="rank 1 was refused") as refused:
            writer.finish()
        assert refused.value.told == (world.rank == 0)
        writer.save(3, model, optim, {})
        writer.finish()
        assert [receipt.step for receipt in writer.poll()] == [3]
