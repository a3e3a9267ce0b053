"""Saves of two processes: each writes its rows, one publishes, all hear of a refusal, and one process reads it all."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import writing
from safetensors.torch import load_file
from several import all_well

from lumina.checkpoint import store, tensors


def test_two_processes_save_in_parts_and_one_reads_it(tmp_path: Path) -> None:
    all_well(2, writing.main, tmp_path, folder=tmp_path / "said")
    for way in ("inline", "background"):
        root = tmp_path / way
        assert sorted(os.listdir(root)) == ["latest", "step-000001", "step-000003"]
        checkpoint = store.read(store.folder(root, 1))
        assert checkpoint.state == {"rank": 0}
        files = [load_file(checkpoint.path / "model" / tensors.file_name(rank)) for rank in (0, 1)]
        assert [{name: len(tensor) for name, tensor in file.items()} for file in files] == [
            {"none": 0, "one": 1, "plain": 4, "seven": 4},
            {"seven": 3},
        ]
        wanted = writing.whole() | {"plain": torch.arange(4)}
        targets = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
        store.load(checkpoint, targets, {"m": torch.zeros(7, 3)})
        assert all(torch.equal(targets[name], tensor) for name, tensor in wanted.items())
