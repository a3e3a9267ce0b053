"""What a step does: counted by hand, and held against what torch really dispatches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from support import KINDS
from torch.utils._python_dispatch import TorchDispatchMode

from lumina.bench.speed import random_batch
from lumina.config.resolve import resolve, settle
from lumina.config.schema.config import Config
from lumina.model.cost import count
from lumina.parallel.world import ALONE
from lumina.planner import work
from lumina.training import machine, setup
from lumina.training.optim import NEWTON_SCHULZ_STEPS, Optimizer
from lumina.training.precision import Precision
from lumina.training.step import Step, train_step

# What moves no data, or asks nothing of a device.
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "slice", "split", "split_with_sizes", "unsqueeze", "squeeze", "expand",
    "select", "alias", "detach", "permute", "unbind", "as_strided", "reshape", "lift_fresh", "empty", "empty_like",
    "empty_strided", "new_empty", "_local_scalar_dense", "is_same_size", "set_", "resize_", "sym_size", "unfold",
    "diagonal", "view_as",
}  # fmt: skip


def config(kind: str = "dense", **keys: Any) -> Config:
    settings = {"model.kind": kind, "precision.mode": "bf16", **keys}
    resolved = resolve("tiny", settings)
    return settle(resolved, machine.choose(resolved.config)).config


class Dispatched(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[call.overloadpacket.__name__] += 1
        return call(*args, **(kwargs or {}))


def dispatched(settled: Config) -> int:
    """Operations of the second step."""
    precision = Precision.of(settled.precision, "cpu")
    model = setup.build_model(settled, precision, ALONE)
    optimizer = Optimizer(model, settled.train, ALONE)
    micro_batches = settled.train.batch_tokens // settled.model.seq_len // int(settled.train.micro_batch)
    plan = Step(micro_batches, clip=1.0, z_loss=1e-4, bias_rate=1e-3)
    batch = random_batch(settled, 0)
    train_step(model, optimizer, batch, 1e-4, plan, precision, freeze_bias=False)
    with Dispatched() as counted:
        train_step(model, optimizer, batch, 1e-4, plan, precision, freeze_bias=False)
    return sum(number for name, number in counted.calls.items() if name not in VIEWS)


@pytest.mark.parametrize(("kind", "optimizer", "micro"), [("dense", "adamw", 8), ("hybrid", "muon", 4)])
def test_launches_are_those_that_torch_dispatches(kind: str, optimizer: str, micro: int) -> None:
    settled = config(kind, **{"train.optimizer": optimizer, "train.micro_batch": micro, "model.layers": 6})
    does = work.of(settled)
    assert does.launches + does.block_launches == pytest.approx(dispatched(settled), rel=0.1)


def test_muon_is_counted_matrix_by_matrix() -> None:
    assert work.NEWTON_SCHULZ_STEPS == NEWTON_SCHULZ_STEPS

    def product(k: int, l: int) -> int:  # noqa: E741
        gram, square, update = 2 * k * k * l, 2 * k**3, 2 * k * k * l
        return 5 * (gram + square + update)

    attention = 2 * product(64, 64) + 2 * product(32, 64)  # queries and output; keys and values
    assert work.muon_flops(config("dense").model) == 4 * (attention + 3 * product(64, 128))
    assert work.muon_flops(config("moe").model) == 4 * (attention + 4 * 3 * product(64, 64))
    shared = config("moe", **{"model.moe.shared": 1}).model
    assert work.muon_flops(shared) == work.muon_flops(config("moe").model) + 4 * 3 * product(64, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_that_are_counted_and_memory_is_moved_by_all_weights(kind: str) -> None:
    settled = config(kind, **{"train.optimizer": "adamw"})
    cost, does = count(settled.model), work.of(settled)
    assert does.flops == 512 * cost.flops_per_token
    assert does.recomputed_flops == does.muon_flops == 0
    assert does.memory_bytes == pytest.approx((18 + 40) * cost.total)
    full = work.of(config(kind, **{"train.optimizer": "adamw", "train.recompute": "full"}))
    assert full.recomputed_flops == pytest.approx(does.flops / 3)
    assert full.block_launches > does.block_launches
    assert full.flops == does.flops  # recomputation is never counted


def test_processes_exchange_what_they_share_and_nothing_alone() -> None:
    settled = config(**{"train.micro_batch": 1})
    alone, two, eight = (work.of(settled, processes) for processes in (1, 2, 8))
    assert alone.exchanged_bytes == 0
    assert two.exchanged_bytes == 3 * 4 * count(settled.model).total * 4 / 2  # 4 micro-batches, half is the other's
    assert eight.launches < two.launches < alone.launches
