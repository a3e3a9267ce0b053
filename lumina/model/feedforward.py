"""The dense feed-forward network: SwiGLU (Shazeer 2020), w_down(silu(w_gate x) · w_up x).

Shapes: D width, F feed-forward width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.model.lora import Adaptable


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up for a last dimension that holds gate and up side by side."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class FeedForward(Adaptable):
    """Gate and up projections are one fused `w_gate_up` of 2F rows."""

    fused: ClassVar = {"w_gate_up": ("gate", "up"), "w_down": ("down",)}

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.splits = (ffn, ffn)
        self.w_gate_up = nn.Parameter(torch.empty(2 * ffn, width))
        self.w_down = nn.Parameter(torch.empty(width, ffn))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.linear(swiglu(self.linear(x_BSD, "w_gate_up")), "w_down")
