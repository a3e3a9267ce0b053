"""What the loop does around a step."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from support import settings

from lumina.checkpoint import store
from lumina.training.trainer import Trainer


def test_router_biases_move_until_the_decay_begins_and_rest_then(tmp_path: Path) -> None:
    keys = settings(tmp_path, "moe") | {
        "train.steps": 8,
        "train.decay": 0.5,
        "checkpoint.every": 1,
        "checkpoint.keep_last": 10,
    }
    run = Trainer("tiny", root=tmp_path / "runs", **keys).fit()

    def bias(step: int) -> torch.Tensor:
        (file,) = (store.folder(run.checkpoints, step) / "model").glob("*.safetensors")
        return torch.stack([tensor for name, tensor in load_file(file).items() if name.endswith("bias_E")])

    assert not torch.equal(bias(3), bias(4))
    assert torch.equal(bias(4), bias(5))
    assert torch.equal(bias(4), bias(8))
