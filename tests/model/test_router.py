"""Routers: each option by its definition, statistics by hand, and losses that no split changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import model_config
from torch import Tensor

from lumina.config.schema.model import MoEConfig
from lumina.model.cost import count
from lumina.model.feedforward import FeedForward
from lumina.model.moe import MoE
from lumina.model.noise import keys
from lumina.model.router import SUMS, Router
from lumina.model.transformer import Transformer

WIDTH, B, S = 16, 3, 20


def router(**options: Any) -> Router:
    made = Router(WIDTH, MoEConfig(**{"experts": 4, "top_k": 2, "ffn": 24, "seq_balance": 0.0, **options}))
    made.reset()
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(0)))
    return made


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(B, S, WIDTH, generator=torch.Generator().manual_seed(seed))


def noise(sequences: int = B) -> Tensor:
    return keys(0, 0, torch.arange(sequences)).unsqueeze(1) + torch.arange(S)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
def test_gates_are_the_scores_of_the_largest(score: str, normalise: bool) -> None:
    made, x = router(score=score, normalise=normalise, temperature=0.5), tokens()
    logits = x @ made.weight.T / 0.5
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    want, chosen = scores.topk(2, dim=-1)
    want = want / want.sum(-1, keepdim=True) if normalise else want
    routed = made(x)
    assert torch.equal(routed.expert_BSA.sort(-1).values, chosen.sort(-1).values)
    torch.testing.assert_close(routed.gate_BSA.sort(-1, descending=True).values, want)


def test_top_1_teaches_its_router_only_with_a_gate_that_is_not_normalised() -> None:
    gradients = []
    for normalise in (True, False):
        config = MoEConfig.model_construct(**(MoEConfig().model_dump() | {"top_k": 1, "normalise": normalise}))
        made = Router(WIDTH, config)
        made.reset()
        torch.nn.init.normal_(made.weight)
        made(tokens()).gate_BSA.square().sum().backward()
        gradients.append(made.weight.grad.norm())  # type: ignore[union-attr]
    assert gradients[0] < 1e-6 < gradients[1]
    assert not MoEConfig(top_k=1, normalise=False).problems()
    assert "normalise=false" in MoEConfig(top_k=1).problems()[0].message


def test_statistics_are_those_counted_by_hand() -> None:
    made, x = router(score="softmax").requires_grad_(False), tokens()
    routed = made(x)
    p = (x @ made.weight.T).softmax(-1)
    load = [(routed.expert_BSA == expert).sum().item() for expert in range(4)]
    assert routed.stats.load_E.tolist() == load
    want = {
        "entropy": -(p * p.log()).sum() / math.log(4),
        "mass": p.topk(2).values.sum(),
        "logsumexp": (x @ made.weight.T).logsumexp(-1).sum(),
        "dropped": 0.0,
        "lost": 0.0,
    }
    for name, value in zip(SUMS, routed.stats.sums_X.tolist(), strict=True):
        assert value == pytest.approx(float(want[name]), rel=1e-5), name


def test_balance_losses_are_their_formulas() -> None:
    x = tokens()
    for name in ("balance", "seq_balance", "z_loss"):
        made = router(**{name: 0.3})
        made.fraction_E.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
        made.bias_E.copy_(torch.tensor([0.3, 0.0, -0.3, 0.0]))
        routed = made(x)
        logits = x @ made.weight.T
        p = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
        best = logits.topk(2).indices  # not what the bias made of it
        own = torch.stack([(best == expert).sum((1, 2)) for expert in range(4)], 1) / (2 * S)
        assert not torch.equal(routed.expert_BSA.sort(-1).values, best.sort(-1).values)
        want = {
            "balance": 4 * (made.fraction_E * p.mean(1)).sum(),
            "seq_balance": 4 * (own * p.mean(1)).sum(),
            "z_loss": logits.logsumexp(-1).square().mean(1).sum(),
        }
        torch.testing.assert_close(routed.stats.loss, 0.3 * want[name])
        assert torch.autograd.grad(routed.stats.loss, made.weight)[0].abs().sum() > 0


def test_perfect_balance_costs_exactly_the_weight_a_sequence() -> None:
    made = router(balance=0.3)  # every expert had the same share before
    torch.testing.assert_close(made(tokens()).stats.loss, torch.tensor(0.3 * B))


def test_capacity_keeps_the_largest_gates_of_each_expert_in_each_sequence() -> None:
    made, x = router(capacity=0.75, normalise=False), tokens()
    limit = math.ceil(0.75 * S * 2 / 4)
    free, routed = made(x), made(x, noise())
    assert torch.equal(free.expert_BSA, routed.expert_BSA)
    dropped = lost = 0
    for b in range(B):
        for expert in range(4):
            of = free.gate_BSA[b][free.expert_BSA[b] == expert]
            kept = routed.gate_BSA[b][routed.expert_BSA[b] == expert]
            least = of.sort(descending=True).values[:limit][-1] if len(of) else 0.0
            assert torch.equal(kept, torch.where(of >= least, of, 0.0))
            dropped += max(0, len(of) - limit)
        lost += (routed.gate_BSA[b] == 0).all(-1).sum().item()
    assert dropped > 0
    assert dict(zip(SUMS, routed.stats.sums_X.tolist(), strict=True))["dropped"] == dropped
    assert dict(zip(SUMS, routed.stats.sums_X.tolist(), strict=True))["lost"] == lost
    assert (free.gate_BSA > 0).all()  # never outside training


def test_dropout_hides_experts_in_training_only_and_the_same_ones_in_any_split() -> None:
    made, x = router(dropout=0.4), tokens()
    usual, routed, again = made(x), made(x, noise()), made(x, noise())
    assert torch.equal(routed.expert_BSA, again.expert_BSA)
    best = usual.gate_BSA.argmax(-1, keepdim=True)
    first = usual.expert_BSA.gather(-1, best)
    kept = (routed.expert_BSA == first).any(-1).float().mean()
    assert 0.45 < kept < 0.75  # 0.6 but for few tokens, and those that all others were hidden from
    whole = routed.expert_BSA
    parts = [made(x[b : b + 1], noise()[b : b + 1]).expert_BSA for b in range(B)]
    assert torch.equal(torch.cat(parts), whole)


def test_spare_experts_are_never_chosen_and_change_nothing() -> None:
    changes = {"moe.score": "softmax", "moe.normalise": False, "moe.balance": 0.1, "moe.z_loss": 0.1}
    ids = torch.randint(0, 260, (2, 64), generator=torch.Generator().manual_seed(0))
    results = []
    for spare in (0, 3):
        model = Transformer(model_config("moe", **{"moe.spare": spare, "moe.dropout": 0.3, **changes}))
        loss, stats = model(ids, torch.zeros_like(ids, dtype=torch.int32), ids.roll(-1, 1))
        (loss.loss + stats.router_loss).backward()
        results.append((loss.loss.item(), stats.router_loss.item(), stats.load_LE[:, :4], stats.sums_LX))
        if not spare:
            want = {name: p.grad.clone() for name, p in model.named_parameters()}
            continue
        assert (stats.load_LE[:, 4:] == 0).all()
        for name, parameter in model.named_parameters():
            gradient, size = parameter.grad, len(want[name])
            assert torch.equal(gradient[:size], want[name]), name
            assert (gradient[size:] == 0).all()
            assert (parameter[size:] == 0).all()
    for without, with_spare in zip(*results, strict=True):
        torch.testing.assert_close(without, with_spare)  # sums have more terms, which are zero


def test_a_slot_that_is_switched_on_is_an_expert_like_the_others() -> None:
    """The same as a router that had so many experts from the start."""
    options = {"score": "softmax", "balance": 0.3, "seq_balance": 0.2, "capacity": 0.75}
    five, grown = router(**{**options, "experts": 5}), router(**options, spare=2)
    with torch.no_grad():
        grown.weight[:5] = five.weight
    grown.active_E[4] = True
    grown.fraction_E[:5] = five.fraction_E
    x = tokens()
    want, got = five(x, noise()), grown(x, noise())
    assert torch.equal(want.expert_BSA, got.expert_BSA)
    torch.testing.assert_close(want.gate_BSA, got.gate_BSA)
    torch.testing.assert_close(want.stats.sums_X, got.stats.sums_X)
    torch.testing.assert_close(want.stats.loss, got.stats.loss)
    assert torch.equal(want.stats.load_E, got.stats.load_E[:5])


def test_the_first_blocks_can_be_dense_and_as_large_as_what_is_active() -> None:
    config = model_config("moe", **{"moe.dense_layers": 2, "moe.shared": 1})
    model = Transformer(config)
    kinds = [type(block.ffn) for block in model.units]
    assert kinds == [FeedForward, FeedForward] + [MoE] * (config.layers - 2)
    assert config.moe is not None
    assert model.units[0].ffn.w_down.shape[1] == 3 * config.moe.ffn
    assert count(config).total == sum(parameter.numel() for parameter in model.parameters())


def test_the_bias_follows_the_load_and_stays_where_a_step_was_skipped() -> None:
    made = router(spare=1)
    load = torch.tensor([10.0, 2.0, 4.0, 8.0, 0.0])
    made.follow(load, 0.1, torch.tensor(False))
    assert (made.bias_E == 0).all()
    made.follow(load, 0.1, torch.tensor(True))
    torch.testing.assert_close(made.bias_E, torch.tensor([-0.1, 0.1, 0.1, -0.1, 0.0]))
    torch.testing.assert_close(made.fraction_E, load / 24)
    soft = router(score="softmax")  # its scores are about 1 / E
    soft.follow(load[:4], 0.1, torch.tensor(True))
    torch.testing.assert_close(soft.bias_E, made.bias_E[:4] / 4)
