"""`model`: the shape of the network."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from lumina.config.schema.base import (
    Context,
    Count,
    Number,
    Problem,
    Section,
    Span,
    nearest_divisor,
    nearest_multiple,
)

ROW = 8  # grouped matmul needs rows of 16 bytes: 8 values in bf16
Kind = Literal["dense", "moe", "mod", "hybrid"]
KINDS: tuple[str, ...] = get_args(Kind)
# Parts of `model` that only some kinds have.
KINDS_OF = {"ffn": ("dense", "mod"), "moe": ("moe", "hybrid"), "mod": ("mod", "hybrid")}


class MoEConfig(Section):
    """`model.moe`: experts in place of the dense feed-forward network (kinds moe and hybrid)."""

    experts: Count = Field(8, ge=2, le=2**16, description="experts per layer")
    top_k: Count = Field(2, ge=1, description="experts that each token takes")
    ffn: Count = Field(384, ge=ROW, le=2**20, description="feed-forward width of one expert")
    shared: Count = Field(0, ge=0, le=2**10, description="experts that every token takes besides, as one network")
    score: Literal["sigmoid", "softmax"] = Field("sigmoid", description="how the router's logits become scores")
    normalise: bool = Field(True, description="whether a token's gates sum to one")
    temperature: Number = Field(1.0, gt=0, description="divides the router's logits")
    bias_rate: Number = Field(1e-3, ge=0, description="how far a step moves an expert's selection bias")
    balance: Number = Field(0.0, ge=0, description="weight of the balance loss over the whole batch")
    seq_balance: Number = Field(1e-4, ge=0, description="weight of the balance loss inside each sequence")
    z_loss: Number = Field(0.0, ge=0, description="weight of the router's squared log-partition")
    capacity: Number = Field(0.0, ge=0, description="most of a sequence's fair share an expert takes; 0: no limit")
    dropout: Number = Field(0.0, ge=0, lt=1, description="probability that an expert is hidden from a token")
    dense_layers: Count = Field(0, ge=0, description="first blocks that keep one dense network, as large as is active")
    spare: Count = Field(0, ge=0, le=2**10, description="slots for experts that are added later")
    kernel: Literal["auto", "grouped", "loop"] = Field("auto", description="how the experts are multiplied")

    def problems(self) -> list[Problem]:
        found = _not_rows("model.moe.ffn", self.ffn)
        if self.top_k == 1 and self.normalise:
            message = "a normalised top-1 gate gives its router no gradient; use 2 or more, or normalise=false"
            found.append(Problem(("model.moe.top_k", "model.moe.normalise"), message))
        if self.top_k > self.experts:
            keys = ("model.moe.top_k", "model.moe.experts")
            found.append(Problem(keys, f"there are not so many experts; use top_k {self.experts} or less"))
        return found


class MoDConfig(Section):
    """`model.mod`: blocks that compute only some of the tokens (kinds mod and hybrid)."""

    capacity: Number = Field(0.125, gt=0, le=1, description="share of a sequence that routed blocks compute")
    anneal: Span = Field(
        0, ge=0, description="share of the run (below 1) or steps in which the capacity falls from 1, by halves"
    )
    every: Count = Field(2, ge=1, description="every how many blocks one is routed (2: blocks 1, 3, 5, …)")
    routing: Literal["learned", "random", "static"] = Field(
        "learned", description="how tokens are chosen; random and evenly spaced ones show what learning adds"
    )
    decode: Literal["predictor", "threshold"] = Field(
        "predictor", description="what a token has to exceed when the model is evaluated or writes"
    )

    def problems(self) -> list[Problem]:
        if self.anneal and self.capacity == 1:
            keys = ("model.mod.anneal", "model.mod.capacity")
            return [Problem(keys, "a capacity of 1 has nowhere to fall; use a smaller one, or anneal 0")]
        return []


class ModelConfig(Section):
    """`model`. `moe` and `mod` are there exactly when the kind has them."""

    kind: Kind = Field("dense", description="sparse in width (moe), depth (mod), both (hybrid)")
    width: Count = Field(256, ge=ROW, le=2**17, description="size of the residual stream")
    layers: Count = Field(6, ge=1, le=2**12, description="transformer blocks")
    heads: Count = Field(4, ge=1, le=2**12, description="query heads")
    kv_heads: Count = Field(2, ge=1, description="key-value heads, each shared by a group of query heads")
    head_dim: Count = Field(64, ge=2, le=2**12, description="size of one head")
    ffn: Count = Field(768, ge=ROW, le=2**20, description="feed-forward width of a block without experts")
    vocab: Count = Field(2048, ge=260, le=2**24, description="rows of the embedding: bytes, 4 special tokens, merges")
    seq_len: Context = Field(256, ge=2, le=2**27, description="context length in tokens (4k is 4096)")
    tied: bool = Field(True, description="whether the output head is the embedding")
    rope_theta: Number = Field(10000.0, gt=0, description="base of the rotary frequencies")
    moe: MoEConfig | None = Field(None, description="experts; kinds moe and hybrid")
    mod: MoDConfig | None = Field(None, description="depth routing; kinds mod and hybrid")

    @model_validator(mode="before")
    @classmethod
    def _give_sections(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**{part: {} for part in ("moe", "mod") if values.get("kind") in KINDS_OF[part]}, **values}

    @model_validator(mode="after")
    def _refuse_sections(self) -> Self:
        for part in ("moe", "mod"):
            if getattr(self, part) and self.kind not in KINDS_OF[part]:
                raise ValueError(f"a {self.kind} model has no model.{part}")
        return self

    def problems(self) -> list[Problem]:
        found = _not_rows("model.width", self.width) + _not_rows("model.ffn", self.ffn)
        if self.heads % self.kv_heads:
            use = nearest_divisor(self.kv_heads, self.heads)
            keys = ("model.heads", "model.kv_heads")
            found.append(Problem(keys, f"each key-value head serves equally many heads; use kv_heads {use}"))
        if self.head_dim % 2:
            use = nearest_multiple(self.head_dim, 2)
            found.append(Problem(("model.head_dim",), f"rotary positions turn pairs; use {use}"))
        if self.moe and self.moe.dense_layers >= self.layers:
            keys = ("model.moe.dense_layers", "model.layers")
            found.append(Problem(keys, f"no block would have experts; use dense_layers {self.layers - 1} or less"))
        if self.mod and self.layers < self.mod.every:
            keys = ("model.mod.every", "model.layers")
            found.append(Problem(keys, f"no block would be routed; use every {self.layers} or less"))
        return found + [problem for part in (self.moe, self.mod) if part for problem in part.problems()]


def _not_rows(key: str, value: int) -> list[Problem]:
    if value % ROW == 0:
        return []
    return [Problem((key,), f"grouped matmul needs a multiple of {ROW}; use {nearest_multiple(value, ROW)}")]
