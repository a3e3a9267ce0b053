"""What one optimizer step does, whatever it runs on: arithmetic, bytes to and from memory, bytes between devices, and
operations that the host launches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lumina.config.schema.config import Config
from lumina.config.schema.model import ModelConfig
from lumina.model.cost import count, dense_ffn, has_experts, is_routed

NEWTON_SCHULZ_STEPS = 5  # of Muon, as in training.optim

# Bytes of a parameter that a micro-batch moves: fp32 read and bf16 written by autocast, bf16 read forward and
# backward, the fp32 gradient written, and read where it is added to. In bf16_pure weights are used as they are.
PASS_BYTES = {"fp32": 4 + 4 + 8, "bf16": 4 + 2 + 2 + 2 + 8, "fp16": 4 + 2 + 2 + 2 + 8, "bf16_pure": 2 + 2 + 4}
# Values of a parameter that the optimizer and what goes before it read or write: guard and norm (1), clipping (2),
# AdamW's gradient, weight and moments in, weight and moments out (7); Muon: one moment, and its direction out and in.
ADAMW_VALUES, MUON_VALUES = 10, 10

# Operations of torch's dispatcher that compute something, counted on a CPU over models of 2 and 6 layers, 1 and 2
# micro-batches (benchmarks/planner/launches.json); a block's are of forward and backward.
BLOCK, BLOCK_EXPERTS, BLOCK_ROUTED = 188, 79, 90  # of each micro-batch; experts and depth routing come on top
HEAD = 136  # embedding, output head and loss, of each micro-batch
STEP = {"adamw": 50, "muon": 111}  # of each step
STEP_BLOCK = {"adamw": 0, "muon": 66}
STEP_BLOCK_EXPERTS = {"adamw": 22, "muon": 28}
STEP_BLOCK_ROUTED = 13
RECOMPUTED = {"none": 1.0, "selective": 1.1, "full": 4 / 3}  # of a block's operations; FLOPs likewise


@dataclass(frozen=True)
class Work:
    """Of one step of all devices together, but for launches, which each host does."""

    flops: float  # counted as MFU counts them
    recomputed_flops: float  # which it does not count
    muon_flops: float  # likewise: of orthogonalising
    memory_bytes: float
    exchanged_bytes: float  # that each device sends
    block_launches: float  # that compiling a block makes fewer
    launches: float  # all others


def of(config: Config, processes: int = 1) -> Work:
    """The work of a step of a settled configuration (`planner.choices`)."""
    train, mode = config.train, config.precision.mode
    cost = count(config.model, rank=train.lora.rank)
    flops = cost.flops_per_token * train.batch_tokens
    micro_batches = max(1, train.batch_tokens // (config.model.seq_len * int(train.micro_batch) * processes))
    forward = flops / 3
    recomputed = {"none": 0.0, "selective": 0.1, "full": 1.0}[train.recompute] * forward
    muon = train.optimizer == "muon" and not train.lora.rank
    values, size = ADAMW_VALUES if train.optimizer == "adamw" else MUON_VALUES, 2 if mode == "bf16_pure" else 4
    passes = PASS_BYTES[mode] * cost.total * micro_batches * processes  # each device reads all weights
    # FSDP gathers the weights in their own format forward and backward, and sums gradients; nothing alone.
    exchanged = 3 * size * cost.total * micro_batches * (processes - 1) / processes if processes > 1 else 0.0
    return Work(
        flops=flops,
        recomputed_flops=recomputed,
        muon_flops=muon_flops(config.model) if muon else 0.0,
        memory_bytes=passes + values * size * cost.total,
        exchanged_bytes=exchanged,
        block_launches=micro_batches * _block_launches(config),
        launches=micro_batches * HEAD + _step_launches(config),
    )


def _block_launches(config: Config) -> float:
    """Operations of all blocks, forward and backward, of a micro-batch."""
    model = config.model
    blocks = BLOCK * model.layers + BLOCK_EXPERTS * _experts(model) + BLOCK_ROUTED * _routed(model)
    return RECOMPUTED[config.train.recompute] * blocks


def _step_launches(config: Config) -> float:
    """Operations of guard, clipping, optimizer and metrics."""
    model, optimizer = config.model, config.train.optimizer
    of_blocks = STEP_BLOCK[optimizer] * model.layers + STEP_BLOCK_EXPERTS[optimizer] * _experts(model)
    return STEP[optimizer] + of_blocks + STEP_BLOCK_ROUTED * _routed(model)


def _experts(model: ModelConfig) -> int:
    return sum(has_experts(model, layer) for layer in range(model.layers))


def _routed(model: ModelConfig) -> int:
    return sum(is_routed(model, layer) for layer in range(model.layers))


def muon_flops(model: ModelConfig) -> float:
    """FLOPs that five Newton-Schulz iterations of all matrices take, each step: 4k²l + 2k³ a matrix [k, l], k <= l."""
    total = 0.0
    for layer in range(model.layers):
        for number, rows, columns in _matrices(model, layer):
            k, l = sorted((rows, columns))  # noqa: E741
            total += number * NEWTON_SCHULZ_STEPS * (4 * k * k * l + 2 * k**3)
    return total


def _matrices(model: ModelConfig, layer: int) -> Iterator[tuple[int, int, int]]:
    """How many matrices of which shape a block has that Muon moves; fused ones in their parts."""
    D, queries, keys = model.width, model.heads * model.head_dim, model.kv_heads * model.head_dim
    yield 2, queries, D
    yield 2, keys, D
    if model.moe is None or not has_experts(model, layer):
        yield 3, dense_ffn(model), D
        return
    yield 3 * (model.moe.experts + model.moe.spare), model.moe.ffn, D
    if model.moe.shared:
        yield 3, model.moe.shared * model.moe.ffn, D
