"""Mixture of Experts: every token is computed by its A best experts out of E, and none is dropped.

A token's way through the layer, for T tokens:

1. *route*: its A experts and their gates (`lumina.model.router`).
2. *dispatch*: the T·A pairs (token, expert) are sorted by expert; row r of the sorted block holds the token
   `order[r] // A`. Experts now own contiguous rows.
3. *compute*: two grouped products with SwiGLU between.
4. *combine*: token t sums its A rows, found at `row[t]`, weighted by its gates.

Shapes: T tokens, D width, E experts, A active experts, F feed-forward width of one expert, R = T·A rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.config.schema.model import MoEConfig
from lumina.model.feedforward import FeedForward, swiglu
from lumina.model.grouped import grouped_linear
from lumina.model.router import Router, RouterStats


def _sum_of_rows(y_RD: Tensor, row_TA: Tensor, gate_TA: Tensor | None = None) -> Tensor:
    """sum over a of gate[t, a] · y[row[t, a]], without a copy of the rows (on a CPU ten times as fast: docs/log.md)."""
    if y_RD.device.type == "cpu":
        return F.embedding_bag(row_TA, y_RD, mode="sum", per_sample_weights=gate_TA)
    y_TAD = y_RD.index_select(0, row_TA.flatten()).unflatten(0, row_TA.shape)
    return y_TAD.sum(1) if gate_TA is None else torch.bmm(gate_TA.unsqueeze(1), y_TAD).squeeze(1)


class _Dispatch(torch.autograd.Function):
    """x[token of row]; the gradient of a token is the sum of its A rows: a gather, no atomics."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, row_TA: Tensor) -> Tensor:
        ctx.save_for_backward(row_TA)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (row_TA,) = ctx.saved_tensors
        return _sum_of_rows(grads[0], row_TA), None, None


class _Combine(torch.autograd.Function):
    """sum over a of gate[t, a] · y[row of (t, a)]; both gradients are gathers."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, gate_TA: Tensor, order_R: Tensor, row_TA: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, gate_TA, order_R, row_TA)
        return _sum_of_rows(y_RD, row_TA, gate_TA.to(y_RD.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_RD, gate_TA, order_R, row_TA = ctx.saved_tensors
        g_RD = grads[0].index_select(0, order_R // gate_TA.shape[1])
        gate_R = gate_TA.flatten().index_select(0, order_R)
        g_gate_R = (g_RD * y_RD).sum(-1, dtype=torch.float32)
        g_gate_TA = g_gate_R.index_select(0, row_TA.flatten()).view_as(gate_TA).to(gate_TA.dtype)
        return g_RD * gate_R.unsqueeze(1).to(g_RD.dtype), g_gate_TA, None, None


class MoE(nn.Module):
    """A feed-forward layer of E stacked experts, of which a token takes A, and optional shared experts."""

    def __init__(self, width: int, config: MoEConfig, layer: int = 0) -> None:
        super().__init__()
        experts, ffn = config.experts + config.spare, config.ffn
        self.top_k, self.kernel = config.top_k, config.kernel
        self.splits = (ffn, ffn)
        self.router = Router(width, config, layer)
        self.w_gate_up = nn.Parameter(torch.empty(experts, 2 * ffn, width))
        self.w_down = nn.Parameter(torch.empty(experts, width, ffn))
        self.shared = FeedForward(width, config.shared * ffn) if config.shared else None

    def forward(self, x_BSD: Tensor, key_BS: Tensor | None = None) -> tuple[Tensor, RouterStats]:
        """The layer's output and what its router did; with `key_BS`, the keys of the noise, as in training."""
        routed = self.router(x_BSD, key_BS)
        x_TD = x_BSD.flatten(0, 1)
        expert_TA, gate_TA = routed.expert_BSA.flatten(0, 1), routed.gate_BSA.flatten(0, 1)
        expert_R = expert_TA.flatten()
        order_R = expert_R.argsort(stable=True)
        row_TA = (
            torch.empty_like(order_R)
            .index_copy_(0, order_R, torch.arange(order_R.numel(), device=order_R.device))
            .view_as(expert_TA)
        )
        # In whole numbers: CUDA sums fractions in no fixed order, and refuses to under `train.deterministic`.
        offs_E = routed.stats.load_E.int().cumsum(0, dtype=torch.int32)

        x_RD = _Dispatch.apply(x_TD, order_R // self.top_k, row_TA)  # type: ignore[no-untyped-call]
        h_RF = swiglu(grouped_linear(x_RD, self.w_gate_up, offs_E, self.kernel))
        y_RD = grouped_linear(h_RF, self.w_down, offs_E, self.kernel)
        y_BSD = _Combine.apply(y_RD, gate_TA, order_R, row_TA).view_as(x_BSD)  # type: ignore[no-untyped-call]
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(x_BSD)
        return y_BSD, routed.stats
