"""The output head: owns its weight, and computes the loss in chunks without ever holding all logits.

Gradients are formed in the forward pass, chunk by chunk, while the logits are at hand; the backward pass only
scales them. Memory is one chunk of logits instead of T·V. A frozen weight costs no gradient of its own.

    loss = sum over counted tokens of (lse - logit[target]) + z · lse²      (lse = logsumexp of the logits)

The second term keeps logits from drifting (PaLM section 5, OLMo 2: z = 1e-5 to 1e-4).

Shapes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.model.cost import CHUNK_ELEMENTS

IGNORED = -1  # a target that is not counted


class TokenLoss(NamedTuple):
    """Sums over the counted tokens; divide by `tokens` of the whole batch, never of a part."""

    loss: Tensor  # cross-entropy + z-loss, in nats; carries the gradient
    nats: Tensor  # cross-entropy alone
    correct: Tensor  # tokens whose largest logit is the target
    tokens: Tensor  # counted tokens
    square: Tensor  # of log Z


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_TD: Tensor, w_VD: Tensor, target_T: Tensor, z: float, training: bool, learns: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        w_VD = w_VD.to(
            h_TD.dtype
        )  # here, not by the caller: the gradient's fp32 sum must reach an fp32 weight unrounded
        chunk = max(1, CHUNK_ELEMENTS[h_TD.device.type] // w_VD.shape[0])
        nats, square, correct = (torch.zeros((), device=h_TD.device) for _ in range(3))
        g_h_TD = torch.empty_like(h_TD) if training else None
        g_w_VD = torch.zeros(w_VD.shape, device=w_VD.device, dtype=torch.float32) if training and learns else None
        for start in range(0, h_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            h, target = h_TD[rows], target_T[rows]
            counted = (target != IGNORED).float()
            index = target.clamp_min(0).unsqueeze(1)
            logits = F.linear(h, w_VD).float()
            lse = logits.logsumexp(-1)
            nats += ((lse - logits.gather(1, index).squeeze(1)) * counted).sum()
            square += (lse.square() * counted).sum()
            correct += ((logits.argmax(-1) == target).float() * counted).sum()
            if g_h_TD is None:
                continue
            # d loss / d logits = softmax · (1 + 2 z lse) - onehot(target)
            g = logits.sub_(lse.unsqueeze(1)).exp_().mul_(((1 + 2 * z * lse) * counted).unsqueeze(1))
            g.scatter_add_(1, index, -counted.unsqueeze(1))
            g = g.to(h.dtype)
            torch.mm(g, w_VD, out=g_h_TD[rows])
            if g_w_VD is not None:
                g_w_VD += g.t() @ h
        ctx.save_for_backward(g_h_TD, g_w_VD)
        tokens = (target_T != IGNORED).sum().float()
        ctx.mark_non_differentiable(nats, correct, tokens, square)
        return nats + z * square, nats, correct, tokens, square

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        g_h_TD, g_w_VD = ctx.saved_tensors
        return g_h_TD * grads[0], None if g_w_VD is None else g_w_VD * grads[0], None, None, None, None


class Head(nn.Module):
    """Logits of the last hidden states, or their loss. `weight` may be the embedding's (tied)."""

    def __init__(self, width: int, vocab: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width))

    def forward(self, h_BSD: Tensor, target_BS: Tensor, z: float) -> TokenLoss:
        """Loss sums in fp32; targets equal to -1 are not counted."""
        h_TD = h_BSD.flatten(0, 1)
        device = h_TD.device.type
        if torch.is_autocast_enabled(device):
            h_TD = h_TD.to(torch.get_autocast_dtype(device))
        modes = torch.is_grad_enabled(), self.weight.requires_grad
        return TokenLoss(*_ChunkedLoss.apply(h_TD, self.weight, target_BS.flatten(), z, *modes))  # type: ignore[no-untyped-call]

    def logits(self, h_BSD: Tensor) -> Tensor:
        return F.linear(h_BSD, self.weight).float()
