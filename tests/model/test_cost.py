"""Counts against hand-counted toys, and against the parameters that really exist."""

from __future__ import annotations

import pytest
from support import KINDS, model_config

from lumina.model.cost import count
from lumina.model.transformer import Transformer

# The tiny preset: D 64, L 4, H 4, G 2, K 16, F 128, V 260, S 64; 4 experts, top-2 of 64; capacity 1/4 in blocks 1, 3.
HEAD = 260 * 64
ATTENTION = 64 * 64 + 2 * 64 * 32 + 64 * 64  # q, k and v, out
DENSE = 3 * 64 * 128
EXPERTS = 2 * 3 * 64 * 64 + 4 * 64  # two of four, and the router
PREDICTOR = 64 + 64 * 16 + 16  # depth router, two layers
SCORES = 6 * 4 * 16 * 64  # causal attention per token and layer: 6·H·K·S


@pytest.mark.parametrize("kind", KINDS)
def test_total_is_what_exists(kind: str) -> None:
    for changes in ({}, {"tied": False}) + (({"moe.shared": 1},) if kind in ("moe", "hybrid") else ()):
        config = model_config(kind, **changes)
        assert count(config).total == sum(p.numel() for p in Transformer(config).parameters())


def test_hand_counted() -> None:
    dense = count(model_config("dense"))
    assert dense.active == HEAD + 4 * (ATTENTION + DENSE)
    assert dense.flops_per_token == 6 * dense.active + 4 * SCORES
    moe = count(model_config("moe"))
    assert moe.active == HEAD + 4 * (ATTENTION + EXPERTS)
    assert moe.flops_per_token == 6 * moe.active + 4 * SCORES
    mod = count(model_config("mod"))
    assert mod.active == HEAD + 4 * (ATTENTION + DENSE) + 2 * PREDICTOR
    assert mod.active_mean == HEAD + 2.5 * (ATTENTION + DENSE) + 2 * PREDICTOR
    assert mod.flops_per_token == 6 * mod.active_mean + (2 + 2 / 16) * SCORES
    hybrid = count(model_config("hybrid"))
    assert hybrid.flops_per_token == 6 * (HEAD + 2.5 * (ATTENTION + EXPERTS) + 2 * PREDICTOR) + (2 + 1 / 8) * SCORES


def test_kv_bytes_follow_capacity() -> None:
    per_layer = 2 * 2 * 16 * 4  # k and v, G heads of K values of 4 bytes
    assert count(model_config("dense")).kv_bytes_per_token == 4 * per_layer
    assert count(model_config("mod")).kv_bytes_per_token == 2.5 * per_layer


def test_flops_are_quadratic_in_the_sequence_only_through_attention() -> None:
    config = model_config("dense")
    assert count(config, 128).flops_per_token - count(config, 64).flops_per_token == 4 * SCORES
