"""Muon against torch's, the split of fused weights, experts as a batch, and the guard that moves nothing."""

from __future__ import annotations

import pytest
import torch
from support import KINDS, model_config
from torch import nn

from lumina.config.resolve import resolve
from lumina.model.transformer import Transformer
from lumina.training import optim
from lumina.training.optim import Muon, Optimizer, gradient_norms, group_parameters, orthogonalize

LIVE, SKIP = torch.zeros(()), torch.ones(())


def gradients(shape: tuple[int, ...], steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)])
def test_muon_equals_torch(shape: tuple[int, int]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    theirs, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    oracle = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    muon = Muon({"w": ours}, {})
    for gradient in gradients(shape, 5):
        theirs.grad, ours.grad = gradient.clone(), gradient.clone()
        oracle.step()
        muon.step(1e-2, 0.1, LIVE)
    # Both iterate in bf16, in another order of operations.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    assert (ours - start).abs().max() > 0.01  # the difference above is small beside the way gone


def test_stacked_experts_and_fused_parts_are_separate_matrices() -> None:
    stack = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(1))
    together, apart = nn.Parameter(stack.clone()), [nn.Parameter(m.clone()) for m in stack]
    fused = Muon({"w": together}, {"w": (12, 4)})
    single = [Muon({"a": nn.Parameter(m[:12].clone()), "b": nn.Parameter(m[12:].clone())}, {}) for m in apart]
    for gradient in gradients((3, 16, 8), 3):
        together.grad = gradient.clone()
        fused.step(1e-2, 0.0, LIVE)
        for muon, g in zip(single, gradient, strict=True):
            muon.matrices["a"].grad, muon.matrices["b"].grad = g[:12].clone(), g[12:].clone()
            muon.step(1e-2, 0.0, LIVE)
    expected = torch.stack([torch.cat([muon.matrices["a"], muon.matrices["b"]]) for muon in single])
    torch.testing.assert_close(together.detach(), expected.detach(), rtol=0, atol=1e-4)


def test_an_expert_without_tokens_stays_as_it_is_to_the_bit() -> None:
    weight = nn.Parameter(torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(1)))
    alone = nn.Parameter(weight.detach()[:1].clone())
    muon, single = Muon({"w": weight}, {"w": (12, 4)}), Muon({"w": alone}, {"w": (12, 4)})
    for step, gradient in enumerate(gradients((3, 16, 8), 6)):
        weight.grad, alone.grad = gradient.clone(), gradient[:1].clone()
        if step >= 2:
            weight.grad[1] = 0.0
            if step == 2:
                before, momentum = weight.detach().clone(), muon.momentum["w"].clone()
        muon.step(1e-2, 0.1, LIVE)
        single.step(1e-2, 0.1, LIVE)
    assert torch.equal(weight[1], before[1])
    assert torch.equal(muon.momentum["w"][1], momentum[1])
    assert (weight[0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(weight[0], alone[0], rtol=0, atol=1e-4)  # the others do not notice


def test_portions_hold_every_matrix_once_and_move_it_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"a": (16, 8), "b": (8, 8), "c": (16, 8), "d": (2, 16, 8), "e": (16, 8)}
    generator = torch.Generator().manual_seed(1)
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def moved() -> dict[str, torch.Tensor]:
        muon = Muon({name: nn.Parameter(w.clone()) for name, w in start.items()}, {})
        for name, weight in muon.matrices.items():
            weight.grad = start[name].flip(0)
        muon.step(1e-2, 0.1, LIVE)
        return {name: weight.detach() for name, weight in muon.matrices.items()}

    at_once = moved()
    monkeypatch.setattr(optim, "PORTION", 300)
    assert [*Muon(start, {})._portions()] == [["d"], ["b", "a"], ["c", "e"]]
    in_portions = moved()
    for name, weight in at_once.items():
        assert not torch.equal(weight, start[name])
        torch.testing.assert_close(in_portions[name], weight)


def test_orthogonalize_flattens_singular_values() -> None:
    x = torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_one_owner_and_moves(name: str, kind: str) -> None:
    model = Transformer(model_config(kind))
    optimizer = Optimizer(model, resolve("tiny", {"train.optimizer": name}).config.train)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step(1e-2, LIVE)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    groups = group_parameters(model, name)
    names = [*groups.matrices, *groups.decayed, *groups.plain, *groups.predictors]
    assert sorted(names) == sorted(before)
    assert bool(groups.matrices) == (name == "muon")


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_skipped_step_moves_nothing(name: str, bad: float) -> None:
    model = Transformer(model_config("hybrid"))
    optimizer = Optimizer(model, resolve("tiny", {"train.optimizer": name}).config.train)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step(1e-2, LIVE)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    moments = {n: m.clone() for n, m in optimizer.tensors().items()}
    for p in model.parameters():
        p.grad = torch.full_like(p, bad)
    optimizer.step(1e-2, SKIP)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(m, moments[n]) for n, m in optimizer.tensors().items())
    assert optimizer.steps_taken == 1


def test_gradient_norm_is_the_global_one() -> None:
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(5))]
    for p in parameters:
        p.grad = torch.full_like(p, 2.0)
    assert gradient_norms([p.grad for p in parameters if p.grad is not None])[0].item() == pytest.approx(
        (11 * 4) ** 0.5
    )


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_group_follows_the_rate_it_is_given(name: str) -> None:
    """Without a rate nothing moves; AdamW's first step is the rate itself, Muon's is proportional to it."""

    def moved(lr: float) -> dict[str, torch.Tensor]:
        model = Transformer(model_config("hybrid", tied=False))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = Optimizer(model, resolve("tiny", {"train.optimizer": name, "train.weight_decay": 0}).config.train)
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step(lr, LIVE)
        return {n: p.detach() - before[n] for n, p in model.named_parameters()}

    assert all((change == 0).all() for change in moved(0.0).values())
    once, twice = moved(1e-3), moved(2e-3)
    for n, change in once.items():
        assert (twice[n].norm() / change.norm()).item() == pytest.approx(2, rel=1e-2), n


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_only_matrices_and_a_head_of_its_own_decay(name: str) -> None:
    model = Transformer(model_config("hybrid", tied=False))
    optimizer = Optimizer(model, resolve("tiny", {"train.optimizer": name, "train.weight_decay": 1}).config.train)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, float(p.ndim == 3))  # an expert without a gradient stays as it is under Muon
    optimizer.step(0.1, LIVE)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    leaves = ("w_qkv", "w_out", "w_gate_up", "w_down", "head.weight")
    assert changed == {n for n in before if n.endswith(leaves) and ".predictor." not in n}


def test_fused_weights_of_the_model_are_split_into_their_parts() -> None:
    model = Transformer(model_config("moe"))
    splits = Optimizer(model, resolve("tiny").config.train).muon.splits
    fused = {n for n, _ in model.named_parameters() if n.endswith(("w_qkv", "w_gate_up"))}
    assert splits.keys() == fused
    rows = dict(model.named_parameters())
    assert all(len(parts) > 1 and sum(parts) == rows[n].shape[-2] for n, parts in splits.items())


def test_predictors_are_outside_the_clipped_norm() -> None:
    groups = group_parameters(Transformer(model_config("mod")), "muon")
    clipped = {id(p) for p in groups.clipped}
    assert groups.predictors
    assert not any(id(p) in clipped for p in groups.predictors.values())
