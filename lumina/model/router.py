"""Which experts a token takes: scores, choice, gates, and what is counted on the way.

    logit = W x / temperature                       in fp32, always
    score = sigmoid(logit) or softmax(logit)
    chosen = the A experts with the largest score + bias
    gate  = score of the chosen (never with the bias), divided by their sum if `normalise`

sigmoid, normalised, is DeepSeek-V3's (2412.19437, eq. 12 to 16); softmax is Qwen3-MoE's, normalised or not. The bias is
a buffer: it enters the choice only, gets no gradient, and moves after each optimizer step by `bias_rate` (softmax:
`bias_rate` / E) towards balance (Wang et al. 2024, 2408.15664).

Losses, each weighted by its key, with p = score / sum of scores, and E = the number of active experts:

    balance        E · sum_i f_i P_i     f: shares of assignments in the previous step's whole batch; P: mean p
    seq_balance    the same with the sequence's own f, of the A largest scores without the bias (DeepSeek-V3, eq. 17-20)
    z_loss         mean of logsumexp(logit)²                                       (ST-MoE, 2202.08906)

All three are means over a sequence's tokens, summed over sequences: any split into micro-batches or processes gives
the same gradient, which a balance loss over a micro-batch's own f does not (2501.11873).

In training alone (`key_BS` given): `dropout` hides each expert from a token with that probability, by stateless noise,
and `capacity` lets an expert take at most ceil(capacity · S·A/E) assignments of a sequence, those of the largest
gates; the others count as dropped and add nothing. (They are multiplied all the same: a limit saves no time here.)

Statistics are returned, not stored, so that recomputation cannot count twice; all of them are sums over tokens.
*Spare* experts are slots for later: never chosen, in no loss and no statistics, and zero, which no step changes.

Shapes: B sequences, S tokens of each, D width, E experts with the spare ones, A active experts, X statistics.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from lumina.config.schema.model import MoEConfig
from lumina.model.noise import fold, uniform

# Sums over tokens: entropy of p over its largest; share of p on the chosen experts; logsumexp of the logits;
# assignments dropped; tokens that lost all of theirs.
SUMS = ("entropy", "mass", "logsumexp", "dropped", "lost")
HIDDEN = 1e4  # taken off the score of an expert that dropout hides: below all others, above the spare ones


@library.custom_op("lumina::count_experts", mutates_args=())
def count_experts(expert_BR: Tensor, slots: int) -> Tensor:
    """`[B, E]`: how often each of `slots` experts occurs in each row, in fp32.

    An operator of its own: compiled together with a recomputed gather, a plain scatter_add loses the gates' gradient;
    comparing with every expert is right, and slow for many (docs/log.md).
    """
    ones_BR = torch.ones_like(expert_BR, dtype=torch.float32)
    return ones_BR.new_zeros(len(expert_BR), slots).scatter_add_(1, expert_BR, ones_BR)


@count_experts.register_fake
def _(expert_BR: Tensor, slots: int) -> Tensor:
    return expert_BR.new_empty(len(expert_BR), slots, dtype=torch.float32)


class RouterStats(NamedTuple):
    """What one router did in one forward pass."""

    load_E: Tensor  # assignments each expert was chosen for, dropped ones included (fp32)
    sums_X: Tensor  # the statistics named in `SUMS`
    loss: Tensor  # weighted router losses, summed over sequences; carries the gradient


class Routed(NamedTuple):
    """The choice for each token."""

    expert_BSA: Tensor  # int64
    gate_BSA: Tensor  # fp32
    stats: RouterStats


class Router(nn.Module):
    """One layer's router; `layer` is what its noise depends on."""

    layer: Tensor
    bias_E: Tensor
    fraction_E: Tensor
    active_E: Tensor

    def __init__(self, width: int, config: MoEConfig, layer: int = 0) -> None:
        super().__init__()
        self.config, self.number = config, layer
        # Of the training step to come; evaluation and generation keep what was planned, as whoever loads the weights.
        self.temperature, self.balance = config.temperature, config.balance
        self.capacity, self.dropout = config.capacity, config.dropout
        # A tensor, for a number would be a constant of compiled code: a graph for every layer.
        self.register_buffer("layer", torch.empty((), dtype=torch.int64), persistent=False)
        slots = config.experts + config.spare
        self.weight = nn.Parameter(torch.empty(slots, width))
        self.register_buffer("bias_E", torch.empty(slots))
        self.register_buffer("fraction_E", torch.empty(slots))  # of the assignments of the step before
        self.register_buffer("active_E", torch.empty(slots, dtype=torch.bool))

    def reset(self) -> None:
        """A new router prefers no expert, and has its spare ones switched off."""
        self.layer.fill_(self.number)
        self.bias_E.zero_()
        self.active_E.copy_(torch.arange(len(self.active_E), device=self.active_E.device) < self.config.experts)
        self.fraction_E.copy_(self.active_E / self.config.experts)

    def forward(self, x_BSD: Tensor, key_BS: Tensor | None = None) -> Routed:
        """Routes; with `key_BS`, the keys of the tokens' noise, as in training."""
        config = self.config
        with torch.autocast(x_BSD.device.type, enabled=False):
            logit_BSE = F.linear(x_BSD.float(), self.weight.float())
        temperature = config.temperature if key_BS is None else self.temperature
        if temperature != 1:
            logit_BSE = logit_BSE / temperature
        if config.spare:
            logit_BSE = logit_BSE.masked_fill(~self.active_E, -math.inf)
        score_BSE = logit_BSE.sigmoid() if config.score == "sigmoid" else logit_BSE.softmax(-1)

        expert_BSA = self._choose(score_BSE.detach(), key_BS).topk(config.top_k, dim=-1, sorted=False).indices
        gate_BSA = score_BSE.gather(-1, expert_BSA)
        mass_BS1 = gate_BSA.sum(-1, keepdim=True)
        if config.normalise:
            gate_BSA = gate_BSA / (mass_BS1 + 1e-20)
        kept_BSA = None
        if self.capacity and key_BS is not None:
            kept_BSA = self._within_capacity(expert_BSA, gate_BSA.detach())
            gate_BSA = gate_BSA * kept_BSA
        return Routed(expert_BSA, gate_BSA, self._stats(logit_BSE, score_BSE, expert_BSA, mass_BS1, kept_BSA))

    def _choose(self, score_BSE: Tensor, key_BS: Tensor | None) -> Tensor:
        """What the choice is made by."""
        choice_BSE = score_BSE + self.bias_E
        if self.dropout and key_BS is not None:
            experts = torch.arange(score_BSE.shape[-1], device=score_BSE.device)
            noise_BSE = uniform(fold(fold(key_BS, self.layer).unsqueeze(-1), experts))
            choice_BSE = choice_BSE - HIDDEN * (noise_BSE < self.dropout)
        if self.config.spare:
            choice_BSE = choice_BSE.masked_fill(~self.active_E, -math.inf)
        return choice_BSE

    def _within_capacity(self, expert_BSA: Tensor, gate_BSA: Tensor) -> Tensor:
        """Which assignments (bool) are among the largest gates of their expert in their sequence; ties by position."""
        _, S, A = expert_BSA.shape
        E, share = self.active_E.sum(), math.ceil(self.capacity * S * A - 1e-9)
        limit = (share + E - 1) // E  # in whole numbers, which E on the device asks for
        order_BR = gate_BSA.flatten(1).argsort(dim=1, descending=True, stable=True)
        expert_BR = expert_BSA.flatten(1).gather(1, order_BR)
        rank_BRE = F.one_hot(expert_BR, len(self.active_E)).cumsum(1)
        kept_BR = rank_BRE.gather(2, expert_BR.unsqueeze(2)).squeeze(2) <= limit
        return torch.zeros_like(kept_BR).scatter(1, order_BR, kept_BR).view_as(expert_BSA)

    def _stats(
        self, logit_BSE: Tensor, score_BSE: Tensor, expert_BSA: Tensor, mass_BS1: Tensor, kept_BSA: Tensor | None
    ) -> RouterStats:
        config, E, slots = self.config, self.active_E.sum(), len(self.active_E)
        _, S, A = expert_BSA.shape
        load_BE = count_experts(expert_BSA.flatten(1), slots)
        total_BS1 = score_BSE.sum(-1, keepdim=True)
        p_BSE = score_BSE / (total_BS1 + 1e-20) if config.score == "sigmoid" else score_BSE
        lse_BS = logit_BSE.logsumexp(-1)

        loss = logit_BSE.new_zeros(())
        if self.balance or config.seq_balance:
            P_BE = p_BSE.mean(1)
            if self.balance:
                loss = loss + self.balance * E * (self.fraction_E * P_BE).sum()
            if config.seq_balance:
                best_BSA = score_BSE.detach().topk(A, dim=-1, sorted=False).indices
                f_BE = count_experts(best_BSA.flatten(1), slots) / (S * A)
                loss = loss + config.seq_balance * E * (f_BE * P_BE).sum()
        if config.z_loss:
            loss = loss + config.z_loss * lse_BS.square().mean(1).sum()

        dropped = lost = logit_BSE.new_zeros(())
        if kept_BSA is not None:
            dropped, lost = (~kept_BSA).sum().float(), (~kept_BSA.any(-1)).sum().float()
        entropy = torch.special.entr(p_BSE.detach()).sum() / E.log()
        mass = (mass_BS1 / (total_BS1 + 1e-20)).detach().sum()
        sums_X = torch.stack([entropy, mass, lse_BS.detach().sum(), dropped, lost])
        return RouterStats(load_BE.sum(0), sums_X, loss)

    @torch.no_grad()
    def follow(self, load_E: Tensor, rate: float, live: Tensor) -> None:
        """After a step in which the whole batch loaded the experts so: moves the bias, where `live` (bool)."""
        E = self.active_E.sum()
        size = 1 / E if self.config.score == "softmax" else 1.0  # of the scores, roughly
        move_E = rate * size * torch.sign(load_E.sum() / E - load_E) * self.active_E
        self.bias_E += torch.where(live, move_E, 0.0)
        self.fraction_E.copy_(torch.where(live, load_E / load_E.sum(), self.fraction_E))
