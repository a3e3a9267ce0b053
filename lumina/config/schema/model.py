"""`model`: the shape of the network."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lumina.config.schema.base import Context, Count, Number, Section

ROW = 8  # grouped matmul needs rows of 16 bytes: 8 values in bf16


class MoEConfig(Section):
    """`model.moe`: experts in place of the dense feed-forward network (kinds moe and hybrid)."""

    experts: Count = Field(8, ge=2, description="experts per layer")
    top_k: Count = Field(2, ge=1, description="experts that each token takes")
    ffn: Count = Field(384, ge=ROW, description="feed-forward width of one expert")
    shared: Count = Field(0, ge=0, description="experts that every token takes besides, as one network")
    bias_rate: Number = Field(1e-3, ge=0, description="how far a step moves an expert's selection bias")
    kernel: Literal["auto", "grouped", "loop"] = Field("auto", description="how the experts are multiplied")

    def problems(self) -> list[str]:
        found = []
        if self.top_k == 1:
            found.append("model.moe.top_k=1: a normalised top-1 gate gives its router no gradient; use 2 or more")
        if self.top_k > self.experts:
            found.append(
                f"model.moe.top_k={self.top_k}: more than model.moe.experts={self.experts}; use at most {self.experts}"
            )
        if self.ffn % ROW:
            found.append(_multiple("model.moe.ffn", self.ffn))
        return found


class MoDConfig(Section):
    """`model.mod`: blocks that compute only some of the tokens (kinds mod and hybrid)."""

    capacity: Number = Field(0.125, gt=0, le=1, description="share of a sequence that a routed block computes")
    every: Count = Field(2, ge=1, description="every how many blocks one is routed (2: blocks 1, 3, 5, …)")


class ModelConfig(Section):
    """`model`."""

    kind: Literal["dense", "moe", "mod", "hybrid"] = Field("dense", description="which layers are sparse, and how")
    width: Count = Field(256, ge=ROW, description="size of the residual stream")
    layers: Count = Field(6, ge=1, description="transformer blocks")
    heads: Count = Field(4, ge=1, description="query heads")
    kv_heads: Count = Field(2, ge=1, description="key-value heads, shared by groups of query heads")
    head_dim: Count = Field(64, ge=2, description="size of one head")
    ffn: Count = Field(768, ge=ROW, description="feed-forward width of a dense block")
    vocab: Count = Field(2048, ge=260, description="rows of the embedding: 256 bytes, 4 special tokens, merges")
    seq_len: Context = Field(256, ge=2, description="context length in tokens (4k is 4096)")
    tied: bool = Field(True, description="whether the output head is the embedding")
    rope_theta: Number = Field(10000.0, gt=0, description="base of the rotary frequencies")
    moe: MoEConfig | None = Field(None, description="experts; only for kinds moe and hybrid")
    mod: MoDConfig | None = Field(None, description="depth routing; only for kinds mod and hybrid")

    def problems(self) -> list[str]:
        found = []
        if self.heads % self.kv_heads:
            found.append(
                f"model.heads={self.heads}: not a multiple of model.kv_heads={self.kv_heads}; each key-value head "
                "serves the same number of query heads"
            )
        if self.head_dim % 2:
            found.append(f"model.head_dim={self.head_dim}: rotary positions turn pairs; use an even number")
        found += [_multiple(f"model.{key}", getattr(self, key)) for key in ("width", "ffn") if getattr(self, key) % ROW]
        if self.mod and self.layers < self.mod.every:
            found.append(
                f"model.mod.every={self.mod.every}: no block is routed in model.layers={self.layers}; "
                f"use at most {self.layers}"
            )
        return found + [p for section in (self.moe, self.mod) if section for p in section.problems()]


def _multiple(key: str, value: int) -> str:
    return f"{key}={value}: not a multiple of {ROW}, which grouped matmul needs; use {-(-value // ROW) * ROW}"
