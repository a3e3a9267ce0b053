"""Held-out quality against numbers known beforehand."""

from __future__ import annotations

import math

import pytest
import torch
from support import KINDS, model_config

from lumina.data.loader import Batch
from lumina.model.transformer import Transformer
from lumina.training.evaluate import evaluate, routing_gap
from lumina.training.precision import Precision

FP32 = Precision("fp32", "fp32", "cpu")


def batches(model: Transformer, sizes: list[int], seed: int = 0) -> list[Batch]:
    """Random tokens cut into batches of these sizes; the last 10 targets are not counted."""
    shape = (sum(sizes), model.config.seq_len)
    ids = torch.randint(0, model.config.vocab, shape, generator=torch.Generator().manual_seed(seed))
    targets = ids.roll(-1, 1).clone()
    targets[-1, -10:] = -1
    parts = zip(ids.split(sizes), targets.split(sizes), strict=True)
    return [Batch(i, t, torch.zeros_like(i), torch.arange(len(i))) for i, t in parts]


def test_a_model_that_knows_nothing_has_the_entropy_of_its_vocabulary() -> None:
    model = Transformer(model_config("dense"))
    torch.nn.init.zeros_(model.embed.weight)  # tied: all logits are zero
    result = evaluate(model, batches(model, [3]), text_bytes=1000, precision=FP32, capacity=None)
    tokens = 3 * model.config.seq_len - 10
    assert result.heldout_tokens == tokens
    assert result.loss == pytest.approx(math.log(model.config.vocab), rel=1e-5)
    assert result.ppl == pytest.approx(model.config.vocab, rel=1e-4)
    assert result.bpb == pytest.approx(tokens * math.log2(model.config.vocab) / 1000, rel=1e-5)
    assert result.mod_capacity == []
    assert result.comparable


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_into_batches_changes_nothing(kind: str) -> None:
    model = Transformer(model_config(kind))
    capacity = model.config.mod.capacity if model.config.mod else None
    whole, parts = (evaluate(model, batches(model, sizes), 100, FP32, capacity) for sizes in ([4], [1, 2, 1]))
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6)
    assert (whole.acc, whole.heldout_tokens, whole.mod_capacity) == (
        parts.acc,
        parts.heldout_tokens,
        parts.mod_capacity,
    )


@pytest.mark.parametrize(("logit", "share", "comparable"), [(9.0, 1.0, False), (-9.0, 0.0, False)])
def test_a_capacity_off_its_target_is_not_comparable(logit: float, share: float, comparable: bool) -> None:
    model = Transformer(model_config("mod"))
    for router in model.routers:
        router.quantile.zero_()
        torch.nn.init.constant_(router.predictor.bias, logit)
    result = evaluate(model, batches(model, [2]), 100, FP32, capacity=0.25)
    assert result.mod_capacity == [share] * len(model.routers)
    assert result.comparable is comparable
    assert evaluate(model, batches(model, [2]), 100, FP32, capacity=0.5).comparable is (share == 1.0)


def test_the_gap_compares_three_ways_to_choose_on_the_same_text() -> None:
    model = Transformer(model_config("hybrid"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for router in model.routers:
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * 5)
            router.threshold.fill_(100.0)  # nobody exceeds it: the blocks are the identity
            router.quantile.fill_(-100.0)  # everybody does
    text = batches(model, [3, 2])
    found = routing_gap(model, text, FP32)
    assert list(found) == ["top", "predictor", "threshold"]
    assert (found["predictor"].mean, found["predictor"].p99) == (1.0, 1.0)
    assert (found["threshold"].mean, found["threshold"].p99) == (0.0, 0.0)
    assert found["top"].mean == found["top"].p99 == model.routers[0].capacity
    assert len({round(one.loss, 6) for one in found.values()}) == 3
    assert found["predictor"].loss == pytest.approx(evaluate(model, text, 100, FP32, None).loss, rel=1e-6)
    assert {router.rule for router in model.routers} == {"predictor"}
    assert found["top"].agree == 1.0
    assert (found["predictor"].agree, found["threshold"].agree) == pytest.approx((0.25, 0.75), abs=0.02)
    with pytest.raises(ValueError, match="does not learn to choose"):
        routing_gap(Transformer(model_config("moe")), text, FP32)
