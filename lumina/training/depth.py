"""What the depth routers did since the last `mod` event: counted on the device, read with the metrics of each step.

A step's *rows*, `[L, X + 2]`, are for each routed layer the sums that `mod.SUMS` names, and both thresholds as the step
left them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lumina.model.mod import SUMS
from lumina.model.transformer import RoutingStats, Transformer

COUNTS = len(SUMS)  # of a row's figures; the others are states
WIDTH = COUNTS + 2


def rows(model: Transformer, routing: RoutingStats) -> Tensor:
    """A step's rows, float32 on the device; empty without routed layers."""
    if not model.routers:
        return routing.depth_LX
    states_L2 = torch.stack([torch.cat([router.quantile, router.threshold]) for router in model.routers])
    return torch.cat([routing.depth_LX, states_L2], dim=1)


def capacities(rows: Sequence[float], layers: int) -> list[float]:
    """The share of the tokens that each routed layer's causal rule takes; what training chooses is as planned."""
    return [row["taken"] / row["tokens"] for row in _rows(rows, layers)]


def agreement(rows: Sequence[float]) -> float:
    """The share of the tokens, over all layers, on which the causal rule agrees with the choice."""
    found = list(_rows(rows, len(rows) // WIDTH))
    return sum(row["agreement"] for row in found) / sum(row["tokens"] for row in found)


def _rows(rows: Sequence[float], layers: int) -> Iterator[dict[str, float]]:
    for start in range(0, WIDTH * layers, WIDTH):
        yield dict(zip(SUMS, rows[start : start + COUNTS], strict=True))


def describe(window: Sequence[float], layers: int) -> dict[str, Any]:
    """The fields of a `mod` event, each with one entry a layer.

    `capacity`: share of the tokens that were computed. `taken`: the share that the causal rule would have taken;
    `agree`: of the tokens, on which it agrees with the choice. `nats`: the predictor's cross-entropy a token. `score`:
    root mean square of r. `position`: where the chosen tokens lie on average, 0.5 if evenly. `quantile`, `threshold`:
    what the predictor's logit and r have to exceed.
    """
    width = len(window) // layers
    found = [_layer(window[i * width : (i + 1) * width]) for i in range(layers)]
    return {name: [round(layer[name], 5) for layer in found] for name in found[0]}


def _layer(row: Sequence[float]) -> dict[str, float]:
    sums = dict(zip(SUMS, row[:COUNTS], strict=True))
    quantile, threshold = row[COUNTS:]
    tokens = sums["tokens"]
    return {
        "capacity": sums["chosen"] / tokens,
        "taken": sums["taken"] / tokens,
        "agree": sums["agreement"] / tokens,
        "nats": sums["nats"] / tokens,
        "score": (sums["square"] / tokens) ** 0.5,
        "position": sums["position"] / sums["chosen"],
        "quantile": quantile,
        "threshold": threshold,
    }
