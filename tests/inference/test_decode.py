"""Decoding with the ragged cache is the parallel decode-mode forward, token by token or in pieces."""

from __future__ import annotations

import pytest
import torch
from support import KINDS, model_config

from lumina.inference.cache import Cache
from lumina.inference.sampler import Sampler
from lumina.model.transformer import Transformer


def spread_model(kind: str, **options: str) -> Transformer:
    """Random routers and thresholds near the median, so that routed blocks take some tokens and not others."""
    model = Transformer(model_config(kind, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name or "predictor" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for router in model.routers:
            router.predictor.bias.zero_()
            router.quantile.fill_(0.2)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [[1] * 64, [20, 1, 1, 30, 12], [63, 1], [64]])
def test_cached_decode_equals_parallel_forward(kind: str, pieces: list[int]) -> None:
    model = spread_model(kind)
    ids = torch.randint(0, 260, (3, 64), generator=torch.Generator().manual_seed(0))
    parallel = model.logits(ids)
    cache, start = Cache(model.config, 3, model.embed.weight), 0
    for size in pieces:
        logits = model.next_logits(ids[:, start : start + size], cache.layers, cache.position)
        cache.advance(size)
        start += size
        torch.testing.assert_close(logits, parallel[:, start - 1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("option", [{"mod.decode": "threshold"}, {"mod.routing": "random"}, {"mod.routing": "static"}])
def test_every_rule_decodes_as_the_parallel_forward(option: dict[str, str]) -> None:
    model = spread_model("hybrid", **option)
    ids = torch.randint(0, 260, (2, 64), generator=torch.Generator().manual_seed(0))
    parallel, (_, taken_L) = model.logits(ids), model.evaluate(ids, torch.zeros_like(ids), ids)
    assert all(0 < taken < 128 for taken in taken_L.tolist())
    cache = Cache(model.config, 2, model.embed.weight)
    for start in range(64):
        logits = model.next_logits(ids[:, start : start + 1], cache.layers, cache.position)
        cache.advance(1)
        torch.testing.assert_close(logits, parallel[:, start], rtol=0, atol=1e-4)
    assert cache.entries[1::2] == taken_L.int().tolist()


def test_a_routed_layer_stores_only_what_it_took() -> None:
    model = spread_model("mod")
    ids = torch.randint(0, 260, (3, 64), generator=torch.Generator().manual_seed(0))
    cache = Cache(model.config, 3, model.embed.weight)
    model.next_logits(ids, cache.layers, 0)
    _, taken_L = model.evaluate(ids, torch.zeros_like(ids), ids)
    assert cache.entries[0::2] == [192, 192]
    assert cache.entries[1::2] == taken_L.int().tolist()
    assert all(0 < entries < 192 for entries in cache.entries[1::2])


def test_a_routed_layer_has_room_for_its_share_and_makes_more_when_it_takes_more() -> None:
    model = spread_model("mod")
    cache = Cache(model.config, 1, model.embed.weight)
    assert [layer.k_BNGK.shape[1] for layer in cache.layers] == [64, 24, 64, 24]  # 1.5 quarters
    for router in model.routers:
        router.quantile.fill_(-100.0)  # takes all
    ids = torch.randint(0, 260, (1, 64), generator=torch.Generator().manual_seed(0))
    parallel = model.logits(ids)
    for start in range(64):
        logits = model.next_logits(ids[:, start : start + 1], cache.layers, cache.position)
        cache.advance(1)
        torch.testing.assert_close(logits, parallel[:, start], rtol=0, atol=1e-4)
    assert [layer.v_BNGK.shape[1] for layer in cache.layers] == [64, 64, 64, 64]


def test_greedy_is_the_argmax_and_limits_limit() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    assert Sampler(temperature=0).pick(logits, generator).item() == 1
    drawn = {Sampler(1.0, top_k=2).pick(logits, generator).item() for _ in range(200)}
    assert drawn == {1, 2}
    drawn = {Sampler(1.0, top_p=0.6).pick(logits, generator).item() for _ in range(200)}
    assert drawn == {1}
    drawn = {Sampler(5.0).pick(logits, generator).item() for _ in range(300)}
    assert drawn == {0, 1, 2, 3}
