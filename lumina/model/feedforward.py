"""The dense feed-forward network: SwiGLU (Shazeer 2020), w_down(silu(w_gate x) · w_up x).

Shapes: D width, F feed-forward width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up for a last dimension that holds gate and up side by side."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class FeedForward(nn.Module):
    """Gate and up projections are one fused `w_gate_up` of 2F rows."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.splits = (ffn, ffn)
        self.w_gate_up = nn.Parameter(torch.empty(2 * ffn, width))
        self.w_down = nn.Parameter(torch.empty(width, ffn))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return F.linear(swiglu(F.linear(x_BSD, self.w_gate_up)), self.w_down)
