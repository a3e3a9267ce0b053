"""Recomputation changes memory and nothing else: not a gradient bit, not a count, not a router's choice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import KINDS, model_config
from torch import Tensor

from lumina.model import moe, router, transformer
from lumina.model.mod import DepthRouter
from lumina.model.transformer import RoutingStats, Transformer

MODES = ("selective", "full")


def forward_backward(model: Transformer, bf16: bool = False) -> tuple[list[Tensor], RoutingStats]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 260, (4, 65), generator=g)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, stats = model(ids[:, :-1], torch.zeros(4, 64, dtype=torch.int32), ids[:, 1:], 1e-4)
    (loss.loss + stats.predictor_loss + stats.router_loss).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], stats


def built(kind: str, mode: str, **changes: Any) -> Transformer:
    model = Transformer(model_config(kind, **changes))
    for block in model.units:
        block.recompute = mode
    return model


OPTIONS = {
    "moe.score": "softmax", "moe.balance": 0.3, "moe.seq_balance": 0.2, "moe.z_loss": 0.1, "moe.dropout": 0.3,
    "moe.capacity": 0.9, "moe.spare": 1, "mod.routing": "random",
}  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "options"), [*((kind, {}) for kind in KINDS), ("hybrid", OPTIONS)], ids=[*KINDS, "options"]
)
def test_gradients_and_statistics_are_those_without_to_the_bit(kind: str, options: dict[str, Any], bf16: bool) -> None:
    want, counts = forward_backward(built(kind, "none", **options), bf16)
    for mode in MODES:
        got, again = forward_backward(built(kind, mode, **options), bf16)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(counts, again, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_experts_are_chosen_once_even_where_scores_come_out_differently(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = torch.Generator().manual_seed(0)

    def noisy(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w) + torch.randn(*x.shape[:-1], len(w), generator=noise)

    loads: list[Tensor] = []
    grouped = moe.grouped_linear

    def spy(x: Tensor, w: Tensor, offs: Tensor, kernel: str) -> Tensor:
        loads.append(offs.clone())
        return grouped(x, w, offs, kernel)

    monkeypatch.setattr(router, "F", SimpleNamespace(linear=noisy))
    monkeypatch.setattr(moe, "grouped_linear", spy)
    forward_backward(built("moe", mode, layers=1))
    up, down, up_again, down_again = loads
    assert torch.equal(up, up_again)
    assert torch.equal(down, down_again)


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_chosen_once_even_where_scores_come_out_differently(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = torch.Generator().manual_seed(0)
    score, take = DepthRouter.score, transformer.take
    chosen: list[Tensor] = []

    def spy(x: Tensor, index: Tensor) -> Tensor:
        chosen.append(index.clone())
        return take(x, index)

    monkeypatch.setattr(
        DepthRouter, "score", lambda self, x: score(self, x) + torch.randn(x.shape[:2], generator=noise)
    )
    monkeypatch.setattr(transformer, "take", spy)
    forward_backward(built("mod", mode, layers=2))
    first, again = chosen
    assert torch.equal(first, again)


def test_each_mode_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that the forward pass leaves allocated."""

    def kept(mode: str) -> int:
        model = built("hybrid", mode)
        ids = torch.zeros(8, 64, dtype=torch.int64)
        with torch.profiler.profile(profile_memory=True) as profile:
            result = model(ids, ids.int(), ids, 0.0)
        assert result[0].loss.isfinite()
        return sum(event.self_cpu_memory_usage for event in profile.key_averages())

    none, selective, full = (kept(mode) for mode in ("none", *MODES))
    assert none > 1.2 * selective > 1.4 * full
