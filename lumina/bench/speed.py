"""Training speed of the four kinds at one shape: real steps (loss, guard, clipping, optimizer) on random text.

Shape P: 6 blocks of width 384 on 4,096 tokens a step or more. MoE takes 2 of 8 experts, each half as wide as the
dense network, so that a token meets equally many parameters; MoD takes an eighth of the tokens in every second
block. The *ideal* of a kind is the dense model's forward and backward time x the ratio of their counted FLOPs + its
own optimizer's measured time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lumina.bench.harness import Arm, Parts, Run, Watch
from lumina.config.names import kinds_of
from lumina.config.resolve import resolve, settle
from lumina.config.schema.config import Config
from lumina.config.schema.model import KINDS
from lumina.data.loader import Batch
from lumina.model import cost
from lumina.parallel.world import ALONE
from lumina.training import machine, setup
from lumina.training.optim import Optimizer
from lumina.training.precision import LossScale, Precision
from lumina.training.step import Step, train_step

FORWARD_BACKWARD, OPTIMIZER = "forward + backward", "optimizer"
SEQUENCES = 8
LR = 1e-4
SHAPE: Mapping[str, Any] = {
    "model.width": 384,
    "model.layers": 6,
    "model.heads": 6,
    "model.kv_heads": 2,
    "model.head_dim": 64,
    "model.vocab": 8192,
    "model.tied": False,
    "train.compile": "off",
}
OF_KIND: Mapping[str, Mapping[str, Any]] = {
    "dense": {"model.ffn": 1024},
    "moe": {"model.moe.experts": 8, "model.moe.top_k": 2, "model.moe.ffn": 512},
    "mod": {"model.ffn": 1024, "model.mod.capacity": 0.125, "model.mod.every": 2},
    "hybrid": {
        "model.moe.experts": 8, "model.moe.top_k": 2, "model.moe.ffn": 512,
        "model.mod.capacity": 0.125, "model.mod.every": 2,
    },
}  # fmt: skip


def suite(
    kinds: Sequence[str] = KINDS, seq_len: int = 512, keys: Mapping[str, Any] | None = None, named: str = ""
) -> list[Arm]:
    """An arm for each kind at shape P; `keys` are settings of any training (precision.mode, train.optimizer, …)."""
    return [arm(kind + named, kind, seq_len, keys or {}) for kind in kinds]


def arm(name: str, kind: str, seq_len: int, keys: Mapping[str, Any]) -> Arm:
    """One kind with these settings."""
    config = configure(kind, seq_len, keys)
    tokens = config.train.batch_tokens
    counted = cost.count(config.model)
    return Arm(
        name,
        lambda: stepping(config),
        amount=tokens,
        flops=counted.flops_per_token * tokens,
        facts={
            "kind": kind,
            "seq_len": seq_len,
            "precision": config.precision.mode,
            "optimizer": config.train.optimizer,
            "compile": config.train.compile,
            "active": counted.active,
            "total": counted.total,
            "flops_per_token": counted.flops_per_token,
        },
    )


def configure(kind: str, seq_len: int, keys: Mapping[str, Any]) -> Config:
    """Shape P as this kind, with every choice of this machine settled; keys of other kinds are passed over."""
    length = {"model.seq_len": seq_len, "train.batch_tokens": SEQUENCES * seq_len, "train.steps": 1000}
    own = {key: value for key, value in keys.items() if kind in kinds_of(key)}
    resolved = resolve("debug", {"model.kind": kind, **SHAPE, **OF_KIND[kind], **length, **own})
    return settle(resolved, machine.choose(resolved.config)).config


def stepping(config: Config) -> Run:
    """A fresh model of `config`; each run takes a training step on the next of a few batches."""
    torch.set_num_threads(int(config.parallel.threads))
    device, precision = config.parallel.device, Precision.of(config.precision, config.parallel.device)
    model = setup.build_model(config, precision, ALONE)
    scale = LossScale(device) if config.precision.mode == "fp16" else None
    optimizer = Optimizer(model, config.train, ALONE, scale)
    plan = Step(
        micro_batches=SEQUENCES // int(config.train.micro_batch),
        clip=config.train.clip,
        z_loss=config.train.z_loss,
        bias_rate=config.model.moe.bias_rate if config.model.moe else 0.0,
    )
    batches = [random_batch(config, seed) for seed in range(4)]
    take = optimizer.step
    step = 0

    def run() -> Parts:
        nonlocal step
        watch = Watch(device)

        def timed_step(lr: float, skip: Tensor) -> None:
            watch(FORWARD_BACKWARD)
            take(lr, skip)
            watch(OPTIMIZER)

        optimizer.step = timed_step  # type: ignore[method-assign]
        train_step(model, optimizer, batches[step % len(batches)], LR, plan, precision, freeze_bias=False)
        watch("metrics")
        step += 1
        return watch.done()

    return run


def random_batch(config: Config, seed: int) -> Batch:
    """Words as frequent as in text (Zipf), in one document a sequence."""
    vocab, seq_len = config.model.vocab, config.model.seq_len
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, vocab + 1, dtype=torch.float64)
    ids = torch.multinomial(weights, SEQUENCES * (seq_len + 1), replacement=True, generator=generator)
    ids = ids.view(SEQUENCES, seq_len + 1)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return Batch(inputs, targets, torch.zeros_like(inputs, dtype=torch.int32), torch.arange(SEQUENCES))
