"""The decoder-only transformer, dense, MoE, MoD or hybrid: one class, read from top to bottom.

    x = embed(ids);  for each block: x = x + branch(x), or for a routed block x = mod(x, branch);  head(norm(x))

A block's branch is attention plus feed-forward (dense or MoE) in pre-norm form. `mod` and `hybrid` route every
`mod.every`-th block by depth. A dense model is Qwen3; a MoE with a shared expert is GLM-4-MoE.

Shapes: B batch, S sequence, N visible keys, D width, K head dim, L layers, E experts, C selected tokens, X statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.config.schema.model import ModelConfig
from lumina.config.schema.train import LoraConfig
from lumina.model.attention import Attention, KeyValueCache, RMSNorm, rope_table
from lumina.model.cost import dense_ffn, has_experts, is_routed
from lumina.model.feedforward import FeedForward
from lumina.model.head import Head, TokenLoss
from lumina.model.init import Assign, initialize
from lumina.model.lora import MARK, adapt
from lumina.model.mod import DepthRouter, put, take
from lumina.model.moe import MoE
from lumina.model.noise import fold
from lumina.model.recompute import recomputed
from lumina.model.router import RouterStats

Rope = tuple[Tensor, Tensor]


class View(NamedTuple):
    """What attention knows of each row besides its content."""

    position_BS: Tensor
    segments_BS: Tensor  # the document it belongs to
    rope: Rope  # cosines and sines of its position, each [B, S, K/2]
    mask_B1SS: Tensor  # which row it may see
    key_BS: Tensor  # of its noise; see `lumina.model.noise`

    def at(self, index_BC: Tensor) -> View:
        """The view of these rows among themselves."""
        position_BC, segments_BC = self.position_BS.gather(1, index_BC), self.segments_BS.gather(1, index_BC)
        cos_BCK, sin_BCK = (t.gather(1, index_BC.unsqueeze(-1).expand(-1, -1, t.shape[-1])) for t in self.rope)
        mask_B1CC = document_mask(position_BC, segments_BC)
        return View(position_BC, segments_BC, (cos_BCK, sin_BCK), mask_B1CC, self.key_BS.gather(1, index_BC))


class BlockStats(NamedTuple):
    """What the routers of one block did in one training forward; None where it has none."""

    experts: RouterStats | None
    predictor_loss: Tensor | None
    depth_X: Tensor | None
    quantile: Tensor | None
    threshold: Tensor | None


class RoutingStats(NamedTuple):
    """What the routers did in one training forward; every entry is a sum, so micro-batches add up."""

    load_LE: Tensor  # assignments each expert received, one row per MoE layer
    sums_LX: Tensor  # `router.SUMS`, one row per MoE layer
    router_loss: Tensor  # summed over sequences and MoE layers; carries the routers' gradient
    predictor_loss: Tensor  # summed over tokens and routed layers; carries the predictors' gradient
    depth_LX: Tensor  # `mod.SUMS`, one row per routed layer
    quantile_L: Tensor  # of the predictor's logit, per routed layer, summed over sequences
    threshold_L: Tensor  # of the router's output, likewise


class Block(nn.Module):
    """One transformer block. `branch` is what it adds to the residual stream.

    `forward` trains and `decode` evaluates and generates; nothing outside of these two uses a block's parameters,
    so that a block can be sharded, recomputed and compiled as one unit.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.width)
        self.attn = Attention(config.width, config.heads, config.kv_heads, config.head_dim)
        self.ffn_norm = RMSNorm(config.width)
        self.ffn: FeedForward | MoE = (
            MoE(config.width, config.moe, layer)
            if config.moe and has_experts(config, layer)
            else FeedForward(config.width, dense_ffn(config))
        )
        self.router = (
            DepthRouter(config.width, config.mod, config.seq_len, layer)
            if config.mod and is_routed(config, layer)
            else None
        )
        self.recompute = "none"
        self.run: Callable[[Tensor, View], tuple[Tensor, BlockStats]] = self._train

    def forward(self, x_BSD: Tensor, view: View) -> tuple[Tensor, BlockStats]:
        """Training: the new residual stream, and what the routers did."""
        return self.run(x_BSD, view)

    def decode(
        self,
        x_BSD: Tensor,
        position_BS: Tensor,
        rope: Rope,
        mask_B1SS: Tensor | None,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Evaluation and generation: the new residual stream, and how many tokens a routed block took.

        Computes all rows of a routed block and masks them (exact and parallel), except that while generating a block
        which no token takes is skipped.
        """
        if self.router is None:
            return x_BSD + self.branch(x_BSD, rope, mask_B1SS, cache)[0], None
        keep_BS, r_BS = self.router(x_BSD, position_BS)
        if cache is not None and not keep_BS.any():
            return x_BSD, keep_BS.sum()
        mask = None if mask_B1SS is None else _only_selected(mask_B1SS, keep_BS)
        y_BSD = x_BSD + r_BS.unsqueeze(-1) * self.branch(x_BSD, rope, mask, cache, keep_BS)[0]
        return torch.where(keep_BS.unsqueeze(-1), y_BSD.to(x_BSD.dtype), x_BSD), keep_BS.sum()

    def branch(
        self,
        x_BSD: Tensor,
        rope: Rope,
        mask_B1SN: Tensor | None,
        cache: KeyValueCache | None = None,
        keep_BS: Tensor | None = None,
        key_BS: Tensor | None = None,
    ) -> tuple[Tensor, RouterStats | None]:
        """The residual branch's output and, for a MoE, what its router did; `key_BS` is given in training."""
        a_BSD = self.attn(self.attn_norm(x_BSD), rope, mask_B1SN, cache, keep_BS)
        h_BSD = self.ffn_norm(x_BSD + a_BSD)
        if isinstance(self.ffn, MoE):
            f_BSD, stats = self.ffn(h_BSD, key_BS)
            return a_BSD + f_BSD, stats
        return a_BSD + self.ffn(h_BSD), None

    def compile(self) -> None:
        """Compiles training as one graph; evaluation, probe and generation stay as they are."""
        self.run = torch.compile(self._train, fullgraph=True, dynamic=False)

    def _train(self, x_BSD: Tensor, view: View) -> tuple[Tensor, BlockStats]:
        if self.recompute == "none":
            return self._compute(x_BSD, view)
        y_BSD, stats = recomputed(self.recompute, self._compute, x_BSD, view)
        return y_BSD, stats

    def _compute(self, x_BSD: Tensor, view: View) -> tuple[Tensor, BlockStats]:
        if self.router is None:
            y_BSD, experts = self.branch(x_BSD, view.rope, view.mask_B1SS, key_BS=view.key_BS)
            return x_BSD + y_BSD, BlockStats(experts, None, None, None, None)
        chosen = self.router.select(x_BSD, view.position_BS, view.key_BS)
        x_BCD, view_C = take(x_BSD, chosen.index_BC), view.at(chosen.index_BC)
        y_BCD, experts = self.branch(x_BCD, view_C.rope, view_C.mask_B1SS, key_BS=view_C.key_BS)
        y_BCD = x_BCD + chosen.weight_BC.unsqueeze(-1) * y_BCD
        stats = BlockStats(experts, chosen.predictor_loss, chosen.sums_X, chosen.quantile, chosen.threshold)
        return put(x_BSD, chosen.index_BC, y_BCD.to(x_BSD.dtype)), stats


class Transformer(nn.Module):
    """Call it with targets for the training loss; `evaluate` and `next_logits` use the causal decode routing.

    Weights are drawn per parameter name from `seed`, so that they do not depend on the order of construction or
    on how many processes share them. With `lora`, of a rank above 0, only its adapters are trained.
    """

    cos_SK: Tensor
    sin_SK: Tensor

    def __init__(self, config: ModelConfig, seed: int = 0, lora: LoraConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.head = Head(config.width, config.vocab)
        if config.tied:
            self.head.weight = self.embed.weight  # type: ignore[assignment]  # it is a Parameter
        for name in ("cos_SK", "sin_SK"):
            self.register_buffer(name, torch.empty(config.seq_len, config.head_dim // 2), persistent=False)
        if lora is not None and lora.rank:
            adapt(self, lora)
        self.initialize(seed)

    def initialize(self, seed: int, assign: Assign = Tensor.copy_) -> None:
        """Draws every weight and fills every buffer; on the meta device nothing happens.

        `assign(parameter, value)` stores a whole value where the parameter may be only this process's part of it.
        """
        if self.embed.weight.is_meta:
            return
        initialize(self, self.config.layers, seed, assign)
        tables = rope_table(self.config.seq_len, self.config.head_dim, self.config.rope_theta)
        for buffer, table in zip((self.cos_SK, self.sin_SK), tables, strict=True):
            buffer.copy_(table)

    def cast(self, dtype: torch.dtype) -> None:
        """Parameters in another dtype; router biases and thresholds, which move in small steps, stay in fp32."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)

    @property
    def routers(self) -> list[DepthRouter]:
        return [block.router for block in self.units if block.router is not None]

    @property
    def moes(self) -> list[MoE]:
        return [block.ffn for block in self.units if isinstance(block.ffn, MoE)]

    @property
    def units(self) -> list[Block]:
        """The blocks: what is sharded, recomputed and compiled as one."""
        return list(self.blocks)  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """The model's state by name: parameters (tied ones once) and persistent buffers. Load into them in place."""
        names = self.state_dict(keep_vars=True)
        buffers = {name: buffer for name, buffer in self.named_buffers() if name in names}
        return {name: p.detach() for name, p in self.named_parameters()} | buffers

    def base_tensors(self) -> dict[str, Tensor]:
        """`tensors` without the adapters: those of the same model without LoRA."""
        return {name: tensor for name, tensor in self.tensors().items() if MARK not in name}

    def forward(
        self,
        ids_BS: Tensor,
        segments_BS: Tensor,
        targets_BS: Tensor,
        z: float = 0.0,
        key_B: Tensor | None = None,
    ) -> tuple[TokenLoss, RoutingStats]:
        """Training: loss sums with gradient, and what the routers did.

        `segments_BS` numbers the documents inside each sequence; attention stays inside a document. `key_B` are the
        keys of each sequence's noise (default: 0).
        """
        x_BSD = self.embed(ids_BS)
        position_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
        if key_B is None:
            key_B = torch.zeros_like(ids_BS[:, 0])
        key_BS = fold(key_B.unsqueeze(1), position_BS)
        mask_B1SS = document_mask(position_BS, segments_BS)
        view = View(position_BS, segments_BS, self._rope(position_BS), mask_B1SS, key_BS)
        done: list[BlockStats] = []
        for block in self.units:
            x_BSD, stats = block(x_BSD, view)
            done.append(stats)
        return self.head(self.norm(x_BSD), targets_BS, z), _total(done, torch.zeros((), device=ids_BS.device))

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

        Returns the normalised hidden states and, per routed layer, the number of tokens taken.
        """
        x_BSD = self.embed(ids_BS)
        position_BS = start + torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
        rope = self._rope(position_BS)
        mask_B1SS = None if segments_BS is None else document_mask(position_BS, segments_BS)
        taken: list[Tensor] = []
        for layer, block in enumerate(self.units):
            own = None if cache is None else cache[layer]
            x_BSD, count = block.decode(x_BSD, position_BS, rope, mask_B1SS, own)
            if count is not None:
                taken.append(count)
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


def _total(blocks: list[BlockStats], zero: Tensor) -> RoutingStats:
    """One entry for the whole model, `zero` where no block has such routers."""
    experts, losses, depths, quantiles, thresholds = (
        [value for value in values if value is not None] for values in zip(*blocks, strict=True)
    )
    loads, sums, router_losses = ([stats[i] for stats in experts] for i in range(3))
    return RoutingStats(
        load_LE=_stack(loads, zero),
        sums_LX=_stack(sums, zero),
        router_loss=sum(router_losses, zero),
        predictor_loss=sum(losses, zero),
        depth_LX=_stack(depths, zero),
        quantile_L=_stack(quantiles, zero),
        threshold_L=_stack(thresholds, zero),
    )


def _stack(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values) if values else like.new_zeros(0)
