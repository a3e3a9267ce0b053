"""What a model costs, counted from its configuration alone: parameters, FLOPs per token, KV bytes. No torch.

Conventions: *active* parameters are the matmul parameters met by a token that takes every block, output head
included, embedding lookup excluded. A trained token costs 6 FLOPs per active parameter (2 forward, 4 backward)
plus causal attention, half of the full square. A block routed by depth with capacity c costs c of its matmuls and
c² of its attention; its router and predictor see every token. Recomputation is never counted. Beside adapters a
frozen parameter costs 4 FLOPs: nobody asks for its gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from lumina.config.schema.model import MoDConfig, ModelConfig
from lumina.config.units import span

PREDICTOR_SHRINK = 4  # the depth predictor's hidden layer is width / 4
# Logits that the head computes at once. On a CPU 4 MiB in fp32 stay in cache: 2^20 took 48 ms where 2^22 took 66
# (docs/log.md).
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25, "mps": 1 << 22}


@dataclass(frozen=True)
class Cost:
    """Parameters in numbers, FLOPs per trained token, bytes of KV cache per token of context."""

    total: int
    embedding: int  # the table that ids are looked up in
    non_embedding: int  # without that and without the output head, tied or not: the N of Kaplan et al. 2020
    active: int
    active_mean: float  # averaged over depth routing; equals `active` without it
    flops_per_token: float
    kv_bytes_per_token: float
    matrices: int  # parameters that Muon moves: it keeps one moment of each, AdamW two of the others
    lookup: int  # of the embedding lookup, where the head has others: 0 if they are tied


@dataclass(frozen=True)
class StateBytes:
    """What training holds all the time; activations come on top."""

    weights: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments


@dataclass(frozen=True)
class _Block:
    matmul: int  # matmul parameters a token meets
    router: int  # of the depth router and predictor, met by every token
    total: int
    matrices: int
    adapters: int  # in all others too


def chosen(capacity: float, sequence: int) -> int:
    """How many tokens of a sequence a routed block takes: ceil(c·S), where 0.07·100 is 7, and at least one."""
    return max(1, math.ceil(capacity * sequence - 1e-9))


def is_routed(config: ModelConfig, layer: int) -> bool:
    """Whether this block (from 0) is routed by depth."""
    return config.mod is not None and layer % config.mod.every == config.mod.every - 1


def has_experts(config: ModelConfig, layer: int) -> bool:
    """Whether this block (from 0) is a mixture of experts."""
    return config.moe is not None and layer >= config.moe.dense_layers


def dense_ffn(config: ModelConfig) -> int:
    """The width of a block's dense network: among experts, as much as a token meets in those."""
    return config.moe.ffn * (config.moe.top_k + config.moe.shared) if config.moe else config.ffn


def count(
    config: ModelConfig,
    sequence: int | None = None,
    kv_bytes: int = 4,
    capacity: float | None = None,
    rank: int = 0,
) -> Cost:
    """Counts one model; `sequence` and `capacity` (default: those configured) are what attention and depth cost.

    With adapters of some `rank` nothing else is trained.
    """
    S = sequence or config.seq_len
    c = chosen(capacity or config.mod.capacity, S) / S if config.mod else 1.0
    per = 4.0 if rank else 6.0
    head = config.vocab * config.width
    attention_flops = 6 * config.heads * config.head_dim * S
    kv = 2 * config.kv_heads * config.head_dim * kv_bytes
    total, active, mean, flops, kv_total, matrices = head + config.width, head, float(head), per * head, 0.0, 0
    if not config.tied:
        total += head
    for layer in range(config.layers):
        routed = is_routed(config, layer)
        block, share = _block(config, routed, has_experts(config, layer), rank), c if routed else 1.0
        total += block.total
        matrices += block.matrices
        active += block.matmul + block.router
        mean += share * block.matmul + block.router
        # a routed block sees c·S tokens: c of the rows, each over c of the keys
        frozen = share * (block.matmul - block.adapters) + block.router
        flops += per * frozen + 6 * share * block.adapters + share * share * attention_flops
        kv_total += share * kv
    tables = head if config.tied else 2 * head
    return Cost(total, head, total - tables, active, mean, flops, kv_total, matrices, head * (not config.tied))


def depth_stages(mod: MoDConfig, steps: int) -> list[tuple[float, int]]:
    """The capacities of a run of `steps`, in order, each with the number of its steps.

    With `mod.anneal` the capacity begins at 1, the dense model, and is halved in stages of equal length. Few sizes, not
    many: each is a graph to compile, and on a CPU kernels to generate.
    """
    length = min(steps, span(mod.anneal, steps))
    halvings = math.ceil(-math.log2(mod.capacity) - 1e-9)
    ends = [length * (k + 1) // halvings for k in range(halvings)] if length else []
    stages = [(2.0**-k, end - start) for k, (start, end) in enumerate(pairwise([0, *ends]))]
    return [*stages, (mod.capacity, steps - sum(n for _, n in stages))]


def mean_flops(config: ModelConfig, steps: int, rank: int = 0) -> float:
    """FLOPs of a trained token, averaged over a run of `steps` in which the depth capacity may fall."""
    stages = depth_stages(config.mod, steps) if config.mod else [(None, steps)]
    return sum(n * count(config, capacity=c, rank=rank).flops_per_token for c, n in stages) / steps


def state_bytes(config: ModelConfig, optimizer: str, precision: str, rank: int = 0) -> StateBytes:
    """Bytes of weights, gradients and moments: 4 each, or 2 in the precision bf16_pure.

    With adapters of some `rank` only those have gradients and moments.
    """
    size = 2 if precision == "bf16_pure" else 4
    counted = count(config, rank=rank)
    if rank:
        learning = counted.total - count(config).total
        return StateBytes(size * counted.total, size * learning, size * 2 * learning)
    moments = 2 * counted.total - (counted.matrices if optimizer == "muon" else 0)
    return StateBytes(size * counted.total, size * counted.total, size * moments)


def block_parameters(config: ModelConfig, layer: int, rank: int = 0) -> int:
    """All parameters of a block (from 0), with adapters of some `rank`."""
    return _block(config, is_routed(config, layer), has_experts(config, layer), rank).total


def _block(config: ModelConfig, routed: bool, experts: bool, rank: int) -> _Block:
    D = config.width
    adapters = rank * _adapter_sides(config, experts)
    attention = D * config.head_dim * 2 * (config.heads + config.kv_heads)
    norms = 2 * D + 2 * config.head_dim
    if config.moe is None or not experts:
        met = stored = matrices = 3 * D * dense_ffn(config)
    else:
        slots = config.moe.experts + config.moe.spare
        expert, router = 3 * D * config.moe.ffn, D * slots
        met = expert * (config.moe.top_k + config.moe.shared) + router
        matrices = expert * (slots + config.moe.shared)
        stored = matrices + router
    hidden = D // PREDICTOR_SHRINK
    router_matmul = D + D * hidden + hidden if routed else 0
    return _Block(
        matmul=attention + met + adapters,
        router=router_matmul,
        total=attention + stored + norms + adapters + (router_matmul + 1 if routed else 0),
        matrices=attention + matrices,
        adapters=adapters,
    )


def _adapter_sides(config: ModelConfig, experts: bool) -> int:
    """Inputs and outputs, added up, of all maps of a block that have adapters: `lumina.model.lora` names them."""
    D, queries, keys = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = 2 * (D + queries) + 2 * (D + keys)
    if config.moe is None or not experts:
        return attention + 3 * (D + dense_ffn(config))
    return attention + (3 * (D + config.moe.shared * config.moe.ffn) if config.moe.shared else 0)
