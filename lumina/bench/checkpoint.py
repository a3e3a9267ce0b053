"""What a save costs training: steps with a save in their middle against as many without, in the same turn.

*Lost* is the time of the steps with the save minus that of the steps without: what the save blocked, and what it took
from the steps beside it. If it is still under way after the last step, the rest is counted too. Before each turn of an
arm the disk has nothing left to write. The state is a dense model in fp32 with the two moments of AdamW.

torch.save and torch's asynchronous distributed checkpoint (DCP) leave the data to the system unless it is said that
they wait for the disk; ours always waits, hashes, and reads back.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lumina.bench.harness import TOTAL, Arm, Parts, Run
from lumina.bench.speed import LR, random_batch
from lumina.checkpoint.phases import Tensors
from lumina.config.resolve import resolve, settle
from lumina.config.schema.config import Config
from lumina.parallel.world import ALONE
from lumina.training import machine, setup
from lumina.training.optim import Optimizer
from lumina.training.precision import Precision
from lumina.training.step import Step, train_step

BLOCKED, ON_DISK = "blocked", "on disk"
NONE, SAVE, SYNCED, ASYNC, INLINE, BACKGROUND = (
    "no save", "torch.save", "torch.save + fsync", "dcp.async_save", "ours, inline", "ours, background",
)  # fmt: skip
ARMS = (NONE, SAVE, SYNCED, ASYNC, INLINE, BACKGROUND)
PEERS = (SAVE, SYNCED, ASYNC)
HEADER = ("arm", "lost, s", "blocked, s", "on disk after, s", "bandwidth, MB/s")
SHAPES: Mapping[int, Mapping[str, Any]] = {  # by millions of parameters
    1: {"model.width": 128, "model.layers": 4, "model.ffn": 384, "model.vocab": 512},
    10: {"model.width": 256, "model.layers": 8, "model.ffn": 768, "model.vocab": 5120},
    100: {"model.width": 768, "model.layers": 10, "model.ffn": 2304, "model.vocab": 16384},
}

Wait = Callable[[], None]  # returns when what was saved is on the disk, as far as the arm cares
Save = Callable[[Tensors, Tensors, int], Wait]


def suite(millions: int, threads: int, steps: int, folder: Path) -> list[Arm]:
    """The arms, which share one model; each run takes `steps` steps, and its save comes after half of them."""
    torch.set_num_threads(threads)
    training = Training(configure(millions, threads))
    size = training.bytes
    return [Arm(name, lambda name=name: training.run(name, steps, folder / name), size, "B") for name in ARMS]  # type: ignore[misc]


def configure(millions: int, threads: int) -> Config:
    """A dense model of about so many parameters, with short steps: two sequences of 64 tokens."""
    keys = {
        "model.kind": "dense", "model.heads": 4, "model.kv_heads": 4, "model.head_dim": 64, "model.tied": False,
        "model.seq_len": 64, "train.batch_tokens": 8 * 64, "train.micro_batch": 8, "train.steps": 1000,
        "train.optimizer": "adamw", "train.compile": "off", "precision.mode": "fp32", "parallel.threads": threads,
        "parallel.device": "cpu", **SHAPES[millions],
    }  # fmt: skip
    resolved = resolve("debug", keys)
    return settle(resolved, machine.choose(resolved.config)).config


class Training:
    """A model and its optimizer, and the arms that save them."""

    def __init__(self, config: Config) -> None:
        self.precision = Precision.of(config.precision, config.parallel.device)
        self.model = setup.build_model(config, self.precision, ALONE)
        self.optimizer = Optimizer(self.model, config.train, ALONE)
        self.batch, self.taken = random_batch(config, 0), 0
        self.plan = Step(micro_batches=1, clip=config.train.clip, z_loss=config.train.z_loss, bias_rate=0.0)

    @property
    def bytes(self) -> int:
        """What a save writes."""
        named = self.model.tensors() | self.optimizer.tensors()
        return sum(tensor.nbytes for tensor in named.values())

    def run(self, name: str, steps: int, folder: Path) -> Run:
        """An arm: the steps, with its save after half of them."""
        save = _SAVES[name](folder)

        def once() -> Parts:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            os.sync()
            parts, wait, saved = dict[str, float](), None, 0.0
            start = time.perf_counter()
            for step in range(steps):
                if step == steps // 2:
                    saved = time.perf_counter()
                    wait = save(self.model.tensors(), self.optimizer.tensors(), self.taken)
                    parts[BLOCKED] = time.perf_counter() - saved
                self._step()
            if wait is not None:
                wait()
                parts[TOTAL] = time.perf_counter() - start
                os.sync()
                parts[ON_DISK] = parts[TOTAL] + start - saved
            else:
                parts[TOTAL] = time.perf_counter() - start
            return parts

        return once

    def _step(self) -> None:
        train_step(self.model, self.optimizer, self.batch, LR, self.plan, self.precision, freeze_bias=False)
        self.taken += 1
