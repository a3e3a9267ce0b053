"""The decoder-only transformer, dense, MoE, MoD or hybrid: one class, read from top to bottom.

    x = embed(ids);  for each block: x = x + branch(x), or for a routed block x = mod(x, branch);  head(norm(x))

A block's branch is attention plus feed-forward (dense or MoE) in pre-norm form. `mod` and `hybrid` route every
`mod.every`-th block by depth. A dense model is Qwen3; a MoE with a shared expert is GLM-4-MoE.

Shapes: B batch, S sequence, N visible keys, D width, K head dim, L layers, E experts, C selected tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.config.schema.model import ModelConfig
from lumina.model.attention import Attention, KeyValueCache, RMSNorm, rope_table
from lumina.model.cost import is_routed
from lumina.model.feedforward import FeedForward
from lumina.model.head import Head, TokenLoss
from lumina.model.init import initialize
from lumina.model.mod import DepthRouter, put, take
from lumina.model.moe import MoE

Rope = tuple[Tensor, Tensor]


class RoutingStats(NamedTuple):
    """What the routers did in one training forward; every entry is a sum, so micro-batches add up."""

    load_LE: Tensor  # assignments each expert received, one row per MoE layer
    predictor_loss: Tensor  # summed over tokens and routed layers; carries the predictors' gradient
    agreement: Tensor  # tokens (over routed layers) where the decode rule agrees with the top-C choice
    quantile_L: Tensor  # per routed layer, summed over sequences


class Block(nn.Module):
    """One transformer block. `branch` is what it adds to the residual stream."""

    def __init__(self, config: ModelConfig, routed: bool) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.width)
        self.attn = Attention(config.width, config.heads, config.kv_heads, config.head_dim)
        self.ffn_norm = RMSNorm(config.width)
        self.ffn: FeedForward | MoE = (
            MoE(config.width, config.moe) if config.moe else FeedForward(config.width, config.ffn)
        )
        self.router = DepthRouter(config.width, config.mod.capacity) if config.mod and routed else None

    def branch(
        self,
        x_BSD: Tensor,
        rope: Rope,
        mask_B1SN: Tensor | None,
        cache: KeyValueCache | None = None,
        keep_BS: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual branch's output and, for a MoE, the assignments per expert."""
        a_BSD = self.attn(self.attn_norm(x_BSD), rope, mask_B1SN, cache, keep_BS)
        h_BSD = self.ffn_norm(x_BSD + a_BSD)
        if isinstance(self.ffn, MoE):
            f_BSD, load_E = self.ffn(h_BSD)
            return a_BSD + f_BSD, load_E
        return a_BSD + self.ffn(h_BSD), None


class Transformer(nn.Module):
    """Call it with targets for the training loss; `evaluate` and `next_logits` use the causal decode routing.

    Weights are drawn per parameter name from `seed`, so that they do not depend on the order of construction or
    on how many processes share them.
    """

    cos_SK: Tensor
    sin_SK: Tensor

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config, routed=is_routed(config, layer)) for layer in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.head = Head(config.width, config.vocab)
        if config.tied:
            self.head.weight = self.embed.weight  # type: ignore[assignment]  # it is a Parameter
        cos_SK, sin_SK = rope_table(config.seq_len, config.head_dim, config.rope_theta)
        self.register_buffer("cos_SK", cos_SK, persistent=False)
        self.register_buffer("sin_SK", sin_SK, persistent=False)
        initialize(self, config.layers, seed)

    @property
    def routers(self) -> list[DepthRouter]:
        return [block.router for block in self._blocks() if block.router is not None]

    @property
    def moes(self) -> list[MoE]:
        return [block.ffn for block in self._blocks() if isinstance(block.ffn, MoE)]

    def tensors(self) -> dict[str, Tensor]:
        """The model's state by name: parameters (tied ones once) and persistent buffers. Load into them in place."""
        names = self.state_dict(keep_vars=True)
        buffers = {name: buffer for name, buffer in self.named_buffers() if name in names}
        return {name: p.detach() for name, p in self.named_parameters()} | buffers

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def forward(
        self, ids_BS: Tensor, segments_BS: Tensor, targets_BS: Tensor, z: float = 0.0
    ) -> tuple[TokenLoss, RoutingStats]:
        """Training: loss sums with gradient, and what the routers did.

        `segments_BS` numbers the documents inside each sequence; attention stays inside a document.
        """
        x_BSD = self.embed(ids_BS)
        position_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
        rope, mask_B1SS = self._rope(position_BS), document_mask(position_BS, segments_BS)
        loads: list[Tensor] = []
        zero = torch.zeros((), device=ids_BS.device)
        predictor_loss, agreement, quantiles = zero, zero, []

        for block in self._blocks():
            if block.router is None:
                y_BSD, load_E = block.branch(x_BSD, rope, mask_B1SS)
                x_BSD = x_BSD + y_BSD
            else:
                chosen = block.router.select(x_BSD)
                x_BCD = take(x_BSD, chosen.index_BC)
                position_BC = chosen.index_BC
                mask_B1CC = document_mask(position_BC, segments_BS.gather(1, position_BC))
                y_BCD, load_E = block.branch(x_BCD, self._rope(position_BC), mask_B1CC)
                y_BCD = x_BCD + chosen.weight_BC.unsqueeze(-1) * y_BCD
                x_BSD = put(x_BSD, chosen.index_BC, y_BCD)
                predictor_loss = predictor_loss + chosen.predictor_loss
                agreement = agreement + chosen.agreement
                quantiles.append(chosen.quantile)
            if load_E is not None:
                loads.append(load_E)

        stats = RoutingStats(_stack(loads, zero), predictor_loss, agreement, _stack(quantiles, zero))
        return self.head(self.norm(x_BSD), targets_BS, z), stats

    @torch.no_grad()
    def evaluate(self, ids_BS: Tensor, segments_BS: Tensor, targets_BS: Tensor) -> tuple[TokenLoss, Tensor]:
        """Causal loss sums (no z-loss), and per routed layer the number of tokens taken."""
        h_BSD, taken_L = self.decode(ids_BS, segments_BS)
        return self.head(h_BSD, targets_BS, 0.0), taken_L

    @torch.no_grad()
    def next_logits(self, ids_BS: Tensor, cache: Sequence[KeyValueCache], start: int) -> Tensor:
        """Logits `[B, V]` after the last of these tokens, whose first has position `start`; extends the cache."""
        h_BSD, _ = self.decode(ids_BS, None, cache, start)
        return self.head.logits(h_BSD[:, -1])

    @torch.no_grad()
    def logits(self, ids_BS: Tensor) -> Tensor:
        """Logits `[B, S, V]` of every position under the causal routing."""
        return self.head.logits(self.decode(ids_BS, torch.zeros_like(ids_BS))[0])

    def decode(
        self,
        ids_BS: Tensor,
        segments_BS: Tensor | None,
        cache: Sequence[KeyValueCache] | None = None,
        start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The forward pass of evaluation and generation: routed blocks take the tokens their predictor names.

        Computes all rows of a routed block and masks them (exact and parallel), except that a block which no
        token takes is skipped while generating. Returns the normalised hidden states and the tokens taken.
        """
        x_BSD = self.embed(ids_BS)
        position_BS = start + torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
        rope = self._rope(position_BS)
        mask_B1SS = None if segments_BS is None else document_mask(position_BS, segments_BS)
        taken: list[Tensor] = []
        for layer, block in enumerate(self._blocks()):
            memory = None if cache is None else cache[layer]
            if block.router is None:
                x_BSD = x_BSD + block.branch(x_BSD, rope, mask_B1SS, memory)[0]
                continue
            keep_BS, r_BS = block.router.decode(x_BSD)
            taken.append(keep_BS.sum())
            if memory is not None and not keep_BS.any():
                continue
            mask = None if mask_B1SS is None else _only_selected(mask_B1SS, keep_BS)
            y_BSD = x_BSD + r_BS.unsqueeze(-1) * block.branch(x_BSD, rope, mask, memory, keep_BS)[0]
            x_BSD = torch.where(keep_BS.unsqueeze(-1), y_BSD, x_BSD)
        return self.norm(x_BSD), _stack(taken, torch.zeros((), device=ids_BS.device))

    def _rope(self, position_BS: Tensor) -> Rope:
        return F.embedding(position_BS, self.cos_SK), F.embedding(position_BS, self.sin_SK)


def document_mask(position_BS: Tensor, segments_BS: Tensor) -> Tensor:
    """`[B, 1, S, S]`: a token sees itself and the earlier tokens of its own document."""
    causal = position_BS.unsqueeze(2) >= position_BS.unsqueeze(1)
    return (causal & (segments_BS.unsqueeze(2) == segments_BS.unsqueeze(1))).unsqueeze(1)


def _only_selected(mask_B1SS: Tensor, keep_BS: Tensor) -> Tensor:
    """Keys that the block does not take are invisible; every row keeps itself, so that no softmax is empty."""
    S = keep_BS.shape[1]
    itself = torch.eye(S, dtype=torch.bool, device=keep_BS.device)
    return mask_B1SS & (keep_BS.unsqueeze(1).unsqueeze(1) | itself)


def _stack(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values) if values else like.new_zeros(0)
