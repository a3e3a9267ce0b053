"""What the expert layers did since the last `moe` event: counted on the device, read with the metrics of each step.

A step's *rows*, `[L, E + X + E + 1]`, are for each expert layer the load of each expert, the sums that `router.SUMS`
names, which experts are active, and the range of the selection bias. Loads and sums are added up over steps, because a
single step's counts are mostly noise: with balanced random routing of n assignments the largest load exceeds the mean
by about sqrt(2 ln E · E / n).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lumina.model.router import SUMS
from lumina.model.transformer import RoutingStats, Transformer

DEAD = 0.01  # of the mean load
COUNTED = 1000  # assignments an expert must expect before it can be called dead


def rows(model: Transformer, routing: RoutingStats) -> Tensor:
    """A step's rows, float32 on the device; empty without experts."""
    routers = [moe.router for moe in model.moes]
    if not routers:
        return routing.load_LE
    active_LE = torch.stack([router.active_E for router in routers]).float()
    range_L1 = torch.stack([_range(router.bias_E, router.active_E) for router in routers]).unsqueeze(1)
    return torch.cat([routing.load_LE, routing.sums_LX, active_LE, range_L1], dim=1)


def width(slots: int) -> int:
    """How many figures a row has."""
    return 2 * slots + len(SUMS) + 1


def counts(width: int) -> int:
    """How many of a row's figures are counts, E + X of E + X + E + 1; the others are states."""
    return (width + len(SUMS) - 1) // 2


def describe(window: Sequence[float], layers: int, top_k: int) -> dict[str, Any]:
    """The fields of a `moe` event, each with one entry a layer.

    `load`: over the mean, each expert. `maxvio`: the largest less 1, of which `floor` is noise. `entropy`: of a
    token's scores, 1 if it prefers none. `balance`: the entropy of the load, 1 if it is even. `mass`: the share of the
    scores that the chosen ones have. `logsumexp`: of the logits. `dropped`: of the assignments; `lost`: tokens that no
    expert took. `dead`: experts with less than a hundredth of the mean, null before that can be known.
    """
    width = len(window) // layers
    found = [_layer(window[i * width : (i + 1) * width], top_k) for i in range(layers)]
    return {name: [layer[name] for layer in found] for name in found[0]}


def loads(rows: Sequence[float], layers: int) -> list[list[float]]:
    """What the active experts of each layer took, over the mean; NaN where a broken step counted nothing."""
    return [[count / _mean(load) for count in load] for load, _ in _rows(rows, layers)]


def entropies(rows: Sequence[float], layers: int, top_k: int) -> list[float]:
    """Of a token's scores in each layer, nats, the mean."""
    found = []
    for load, sums in _rows(rows, layers):
        tokens = _mean(load) * len(load) / top_k
        found.append(sums["entropy"] / tokens * math.log(len(load)))
    return found


def _rows(rows: Sequence[float], layers: int) -> Iterator[tuple[list[float], dict[str, float]]]:
    """The counts of each layer's active experts, and its sums."""
    width = len(rows) // layers if layers else 0
    slots = (width - len(SUMS) - 1) // 2
    for start in range(0, width * layers, width or 1):
        row = rows[start : start + width]
        active = row[slots + len(SUMS) : -1]
        load = [count for count, on in zip(row[:slots], active, strict=True) if on]
        yield load, dict(zip(SUMS, row[slots : slots + len(SUMS)], strict=True))


def _mean(load: Sequence[float]) -> float:
    return sum(load) / len(load) or math.nan


def _layer(row: Sequence[float], top_k: int) -> dict[str, Any]:
    slots = (len(row) - len(SUMS) - 1) // 2
    loads, sums_X, active = row[:slots], row[slots : slots + len(SUMS)], row[slots + len(SUMS) : -1]
    load = [count for count, on in zip(loads, active, strict=True) if on]
    sums = dict(zip(SUMS, sums_X, strict=True))
    E, assignments = len(load), sum(load)
    tokens, mean = assignments / top_k, assignments / E
    shares = [count / assignments for count in load]
    rounded = {
        "maxvio": max(load) / mean - 1,
        "floor": math.sqrt(2 * math.log(E) * E / assignments),
        "balance": -sum(share * math.log(share) for share in shares if share) / math.log(E),
        "entropy": sums["entropy"] / tokens,
        "mass": sums["mass"] / tokens,
        "logsumexp": sums["logsumexp"] / tokens,
        "dropped": sums["dropped"] / assignments,
        "lost": sums["lost"] / tokens,
        "bias_range": row[-1],
    }
    return {
        "load": [round(count / mean, 3) for count in load],
        **{name: round(value, 5) for name, value in rounded.items()},
        "dead": sum(count < DEAD * mean for count in load) if mean >= COUNTED else None,
    }


def _range(bias_E: Tensor, active_E: Tensor) -> Tensor:
    return bias_E.masked_fill(~active_E, -math.inf).amax() - bias_E.masked_fill(~active_E, math.inf).amin()
