"""The chunked loss against the plain formula, value and gradients, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lumina.model import head as head_module
from lumina.model.head import Head

T, D, V = 37, 8, 19


def inputs() -> tuple[Head, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = Head(D, V)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D, generator=generator))
    h = torch.randn(1, T, D, generator=generator, requires_grad=True)
    target = torch.randint(0, V, (1, T), generator=generator)
    target[0, ::5] = -1
    return head, h, target


@pytest.mark.parametrize("chunk_rows", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("z", [0.0, 0.1])
def test_equals_cross_entropy_and_z_loss(chunk_rows: int, z: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_module.CHUNK_ELEMENTS, "cpu", chunk_rows * V)
    head, h, target = inputs()
    logits = h[0] @ head.weight.T
    counted = target[0] != -1
    nats = F.cross_entropy(logits, target[0], ignore_index=-1, reduction="sum")
    expected = nats + z * (logits.logsumexp(-1).square() * counted).sum()

    ours = head(h, target, z)
    torch.testing.assert_close(ours.loss, expected)
    torch.testing.assert_close(ours.nats, nats)
    assert ours.tokens == counted.sum()
    assert ours.correct == ((logits.argmax(-1) == target[0]) & counted).sum()

    scale = 0.3  # the upstream gradient is not one
    got = torch.autograd.grad(ours.loss * scale, [h, head.weight])
    want = torch.autograd.grad(expected * scale, [h, head.weight])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


def test_bf16_reports_a_loss_close_to_fp32() -> None:
    head, h, target = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        low = head(h, target, 0.0)
    torch.testing.assert_close(low.nats, head(h, target, 0.0).nats, rtol=1e-2, atol=0)
    assert low.nats.dtype == torch.float32
    (g,) = torch.autograd.grad(low.loss, [head.weight])
    assert g.dtype == torch.float32


def test_without_gradient_no_gradient_is_formed() -> None:
    head, h, target = inputs()
    with torch.no_grad():
        assert not head(h, target, 0.0).loss.requires_grad
