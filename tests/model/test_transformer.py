"""The whole model: predicts the next token, stays inside documents, starts from weights that depend on names alone."""

from __future__ import annotations

import pytest
import torch
from support import KINDS, model_config

from lumina.model.transformer import Transformer


@pytest.mark.parametrize("kind", KINDS)
def test_golden_next_token(kind: str) -> None:
    """A periodic sequence is learnt as token t+1: an off-by-one target would be learnt as the identity, or never."""
    model = Transformer(model_config(kind, layers=2, seq_len=16))
    period = [5, 9, 2, 7]
    ids = torch.tensor([(period * 5)[start : start + 16] for start in range(4)])
    targets = torch.tensor([(period * 5)[start + 1 : start + 17] for start in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss, stats = model(ids, torch.zeros_like(ids), targets)
        ((loss.loss + stats.predictor_loss) / loss.tokens).backward()
        optimizer.step()
        for router, quantile, threshold in zip(model.routers, stats.quantile_L, stats.threshold_L, strict=True):
            router.follow(quantile / len(ids), threshold / len(ids), torch.tensor(True))
    assert loss.correct == loss.tokens
    following = dict(zip(period, [*period[1:], period[0]], strict=True))
    predicted = model.logits(ids).argmax(-1).flatten().tolist()  # as it writes: causally
    right = sum(following[token] == guess for token, guess in zip(ids.flatten().tolist(), predicted, strict=True))
    assert right == len(predicted)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_stays_inside_a_document(kind: str) -> None:
    model = Transformer(model_config(kind, layers=2))
    ids = torch.randint(0, 260, (1, 64), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(64) >= 20).long().unsqueeze(0)
    other = ids.clone()
    other[:, :20] = (other[:, :20] + 3) % 260
    h, _ = model.decode(ids, segments)
    changed, _ = model.decode(other, segments)
    torch.testing.assert_close(h[:, 20:], changed[:, 20:], rtol=0, atol=1e-5)
    joined, _ = model.decode(other, torch.zeros_like(segments))
    assert not torch.allclose(h[:, 20:], joined[:, 20:], atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_without_depth_routing_training_and_decode_mode_are_one_function(kind: str) -> None:
    model = Transformer(model_config(kind))
    ids = torch.randint(0, 260, (2, 64), generator=torch.Generator().manual_seed(0))
    segments, targets = (torch.arange(64) > 30).long().expand(2, 64), ids.roll(-1, 1)
    torch.testing.assert_close(
        model(ids, segments, targets)[0].nats,
        model.evaluate(ids, segments, targets)[0].nats,
        rtol=1e-6,
        atol=0,
    )


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    small, large = Transformer(model_config("dense", layers=2)), Transformer(model_config("dense", layers=3))
    shared = [n for n, _ in small.named_parameters() if not n.endswith(("w_out", "w_down"))]
    large_weights = dict(large.named_parameters())
    assert all(torch.equal(p, large_weights[n]) for n, p in small.named_parameters() if n in shared)
    other = dict(Transformer(model_config("dense", layers=2), seed=1).named_parameters())
    assert not torch.equal(small.embed.weight, other["embed.weight"])
    values = small.embed.weight.detach()
    assert values.std().item() == pytest.approx(0.02, rel=0.05)


def test_tied_weights_are_one_tensor_and_saved_once() -> None:
    model = Transformer(model_config("dense"))
    assert model.head.weight is model.embed.weight
    assert "embed.weight" in model.tensors()
    assert "head.weight" not in model.tensors()
    untied = Transformer(model_config("dense", tied=False))
    assert "head.weight" in untied.tensors()
