"""The expert layer against a plain loop: every token, every gradient, every count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lumina.config.schema.model import MoEConfig
from lumina.model.feedforward import swiglu
from lumina.model.grouped import _loop, grouped_linear, native_rows, native_weights
from lumina.model.moe import MoE

WIDTH = 16


def layer(kernel: str = "grouped", shared: int = 0, experts: int = 4, top_k: int = 2, seed: int = 0) -> MoE:
    moe = MoE(WIDTH, MoEConfig(experts=experts, top_k=top_k, ffn=24, shared=shared, kernel=kernel))
    moe.router.reset()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return moe


def route(moe: MoE, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen experts and their gates."""
    routed = moe.router(x_TD.unsqueeze(0))
    return routed.expert_BSA[0], routed.gate_BSA[0]


def plain(moe: MoE, x_TD: Tensor) -> Tensor:
    """The definition: for each token, the gate-weighted sum of its experts' outputs."""
    expert_TA, gate_TA = route(moe, x_TD)
    rows = []
    for x_D, experts, gates in zip(x_TD, expert_TA.tolist(), gate_TA, strict=True):
        y_D = torch.zeros(WIDTH)
        for expert, gate in zip(experts, gates, strict=True):
            y_D = y_D + gate * (moe.w_down[expert] @ swiglu(moe.w_gate_up[expert] @ x_D))
        rows.append(y_D if moe.shared is None else y_D + moe.shared(x_D))
    return torch.stack(rows)


@pytest.mark.parametrize("kernel", ["grouped", "loop"])
@pytest.mark.parametrize("shared", [0, 1])
def test_equals_the_definition_with_gradients(kernel: str, shared: int) -> None:
    moe = layer(kernel, shared)
    x = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weight = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(2))
    inputs = [x, *moe.parameters()]
    ours = torch.autograd.grad((moe(x)[0] * weight).sum(), inputs)
    theirs = torch.autograd.grad((plain(moe, x.flatten(0, 1)).view_as(x) * weight).sum(), inputs)
    torch.testing.assert_close(moe(x)[0], plain(moe, x.flatten(0, 1)).view_as(x))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 40), experts=st.integers(2, 9), data=st.data())
def test_conserves_assignments_and_normalises_gates(tokens: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(2, experts))
    moe = layer(experts=experts, top_k=top_k)
    x = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))
    load_E = moe(x)[1].load_E
    expert_TA, gate_TA = route(moe, x.flatten(0, 1))
    assert load_E.sum() == tokens * top_k  # routed + dropped (none) = A·T
    assert all(len(set(chosen)) == top_k for chosen in expert_TA.tolist())
    torch.testing.assert_close(gate_TA.sum(-1), torch.ones(tokens))


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 7) | st.integers(0, 200), min_size=1, max_size=6).filter(any))
@example(sizes=[1500, 0, 3, 2300])  # more than one block
def test_grouped_kernel_equals_loop_also_with_empty_experts(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    x = torch.randn(sum(sizes), 16, generator=generator, requires_grad=True)
    w = torch.randn(len(sizes), 8, 16, generator=generator, requires_grad=True)
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    results = []
    for kernel in ("grouped", "loop"):
        y = grouped_linear(x, w, offs, kernel)
        results.append((y, *torch.autograd.grad(y.sum(), [x, w])))  # an expanded gradient, too
    for grouped, loop in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=1e-5, atol=1e-4)


def test_grouped_kernel_follows_autocast() -> None:
    x, w, offs = torch.randn(6, 16), torch.randn(2, 8, 16), torch.tensor([2, 6], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_linear(x, w, offs, "grouped").dtype == torch.bfloat16


def test_bias_changes_the_choice_but_not_the_gates() -> None:
    moe = layer()
    x = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(3))
    before, _ = route(moe, x)
    moe.router.bias_E[0] = 10.0
    chosen, gates = route(moe, x)
    assert (before == 0).any(dim=1).float().mean() < 1
    assert (chosen == 0).any(dim=1).all()
    scores = torch.sigmoid(x @ moe.router.weight.T).gather(1, chosen)
    torch.testing.assert_close(gates, scores / scores.sum(-1, keepdim=True))


def test_an_expert_that_is_not_chosen_gets_no_gradient() -> None:
    moe = layer()
    moe.router.bias_E[3] = -10.0
    x = torch.randn(1, 20, WIDTH)
    moe(x)[0].square().sum().backward()
    assert moe.w_down.grad is not None
    assert moe.w_down.grad[3].abs().sum() == 0
    assert moe.w_down.grad[:3].abs().sum(dim=(1, 2)).min() > 0


def test_the_router_computes_in_fp32_under_autocast() -> None:
    moe = layer()
    x = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16):
        inside = route(moe, x)
    assert all(torch.equal(a, b) for a, b in zip(inside, route(moe, x), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[3, 0, 13, 8], [0, 0, 5], [64, 1]])
def test_the_kernel_of_gpus_equals_the_loop(sizes: list[int], dtype: torch.dtype) -> None:
    """`F.grouped_mm` runs on a CPU too, only slower: the lines that a GPU takes, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((sum(sizes), 16), (len(sizes), 8, 16)))
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    x, w = x.requires_grad_(), w.requires_grad_()
    y = _loop(x, w, offs)
    g = torch.randn(y.shape, generator=generator).to(dtype)
    expected = (y, *torch.autograd.grad(y, [x, w], g))
    got = (native_rows(x, w.transpose(-1, -2), offs), native_rows(g, w, offs), native_weights(g, x, offs))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
