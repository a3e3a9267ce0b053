"""Grouped-query attention with per-head QK-norm and rotary positions (Qwen3's attention).

Shapes: B batch, S queries, N keys, D width, H query heads, G key-value heads, K head dim.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.model.lora import Adaptable

NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), NORM_EPS)


class KeyValueCache(Protocol):
    """One layer's memory while generating; `lumina.inference.cache` implements it."""

    def extend(self, k_BSGK: Tensor, v_BSGK: Tensor, keep_BS: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Stores the kept rows; returns all stored `k_BNGK`, `v_BNGK` and `mask_BSN` (may query s see key n)."""
        ...


def rope_table(seq_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each `[seq_len, head_dim/2]` in fp32 (Su et al. 2021, eq. 34)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x_BSHK: Tensor, cos_BSK: Tensor, sin_BSK: Tensor) -> Tensor:
    """Rotates the pairs (i, i + K/2), the layout that Hugging Face models use."""
    a, b = x_BSHK.chunk(2, dim=-1)
    cos, sin = cos_BSK.unsqueeze(-2), sin_BSK.unsqueeze(-2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(Adaptable):
    """Queries, keys and values come from one fused `w_qkv`, split by rows into H·K, G·K and G·K."""

    fused: ClassVar = {"w_qkv": ("q", "k", "v"), "w_out": ("o",)}

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.splits = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        self.w_qkv = nn.Parameter(torch.empty(sum(self.splits), width))
        self.w_out = nn.Parameter(torch.empty(width, heads * head_dim))
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask_B1SN: Tensor | None,
        cache: KeyValueCache | None = None,
        keep_BS: Tensor | None = None,
    ) -> Tensor:
        """`mask` says which key a query may see; with a `cache` it is the cache that says so."""
        q_BSHK, k_BSGK, v_BSGK = (
            part.unflatten(-1, (-1, self.head_dim)) for part in self.linear(x_BSD, "w_qkv").split(self.splits, dim=-1)
        )
        q_BSHK = rotate(self.q_norm(q_BSHK), *rope).to(v_BSGK.dtype)
        k_BSGK = rotate(self.k_norm(k_BSGK), *rope).to(v_BSGK.dtype)
        if cache is not None:
            k_BSGK, v_BSGK, mask_BSN = cache.extend(k_BSGK, v_BSGK, keep_BS)
            mask_B1SN = mask_BSN.unsqueeze(1)
        y_BHSK = F.scaled_dot_product_attention(
            q_BSHK.transpose(1, 2),
            k_BSGK.transpose(1, 2),
            v_BSGK.transpose(1, 2),
            attn_mask=mask_B1SN,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.linear(y_BHSK.transpose(1, 2).flatten(2), "w_out")
