"""Mixture of Depths: a routed block computes only a share c of each sequence's tokens (Raposo et al. 2404.02258).

Training (expert choice over time): r_s = w·x_s; the C = ceil(c·S) tokens with the largest r pass through the block,
in their order and with their positions, seeing only each other; x_s + r_s·f(x)_s replaces x_s. The others are copied.

That choice looks at the future, so generation cannot make it. A small *predictor* learns on a stop-gradient input
whether its token is among the top C; a token is taken when the predictor's logit exceeds a moving average, kept in
the checkpoint, of the logit's (1-c) quantile. Evaluation and generation both use this causal rule (`decode`), so
that the reported loss is the loss of the model that writes. `mod.decode=threshold` compares r itself with a moving
average of its own (1-c) quantile instead.

`mod.routing` random and static are ablations, in which r scales a branch but does not choose: tokens are chosen by
stateless noise, or evenly spaced, while training and while decoding.

Shapes: B batch, S sequence, D width, C selected tokens, P predictor width, X statistics.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.config.schema.model import MoDConfig
from lumina.model.attention import NORM_EPS
from lumina.model.cost import PREDICTOR_SHRINK, chosen
from lumina.model.noise import fold, uniform

QUANTILE_MEMORY = 0.9  # moving average over optimizer steps; longer ones lag behind a predictor that learns
# Sums over tokens: how many there were; chosen; where the causal rule agrees with the choice; taken by that rule; the
# predictor's cross-entropy in nats; r squared; and, of the chosen, the position in the sequence from 0 to 1.
SUMS = ("tokens", "chosen", "agreement", "taken", "nats", "square", "position")


class Selection(NamedTuple):
    """What a routed block's router decided in training, and what its predictor made of it."""

    index_BC: Tensor  # positions of the selected tokens, ascending
    weight_BC: Tensor  # their router outputs r
    predictor_loss: Tensor  # binary cross-entropy, summed over B·S; carries the predictor's gradient
    sums_X: Tensor  # the statistics named in `SUMS`
    quantile: Tensor  # the predictor's (1-c) quantile, summed over B
    threshold: Tensor  # that of r


class Predictor(nn.Module):
    """Two layers on the normalised, detached input: will this token be among the top C?"""

    def __init__(self, width: int, capacity: float) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(width // PREDICTOR_SHRINK, width))
        self.w_out = nn.Parameter(torch.empty(width // PREDICTOR_SHRINK))
        # The prior: a share c of the tokens is selected. c = 1 selects all and needs no prediction. Trained, the bias
        # cannot change which logits are the largest, but holds their (1-c) quantile still for the moving average.
        self.prior = math.log(capacity / (1 - capacity)) if capacity < 1 else 20.0
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = F.rms_norm(x_BSD.detach(), x_BSD.shape[-1:], eps=NORM_EPS)
        h_BSP = F.silu(F.linear(x_BSD, self.w_in))
        with torch.autocast(x_BSD.device.type, enabled=False):
            return (h_BSP.float() @ self.w_out.float() + self.bias.float()).clamp(-30, 30)


class DepthRouter(nn.Module):
    """Decides which tokens of a sequence pass through the block."""

    layer: Tensor
    quantile: Tensor
    threshold: Tensor
    steps: Tensor

    def __init__(self, width: int, config: MoDConfig, sequence: int = 1, layer: int = 0) -> None:
        super().__init__()
        self.capacity, self.routing = config.capacity, config.routing
        self.rule: str = config.decode
        self.sequence, self.number = sequence, layer
        self.register_buffer("layer", torch.empty((), dtype=torch.int64), persistent=False)  # see `Router`
        self.weight = nn.Parameter(torch.empty(width))
        self.predictor = Predictor(width, config.capacity)
        self.register_buffer("quantile", torch.empty(1))  # decode rule: logit > quantile
        self.register_buffer("threshold", torch.empty(1))  # the other one: r > threshold
        self.register_buffer("steps", torch.empty(1))  # live training steps that moved them

    def reset(self) -> None:
        """The rule before any data: the prior of a token being selected, for every token."""
        self.layer.fill_(self.number)
        bias = self.predictor.bias
        with torch.no_grad():
            bias.fill_(self.predictor.prior)
        self.quantile.fill_(torch.tensor(self.predictor.prior, dtype=bias.dtype).item())  # as rounded as the bias
        self.threshold.zero_()
        self.steps.zero_()

    def score(self, x_BSD: Tensor) -> Tensor:
        """r in fp32: a near-tie must not fall differently in a recomputed forward."""
        with torch.autocast(x_BSD.device.type, enabled=False):
            return x_BSD.float() @ self.weight.float()

    def select(self, x_BSD: Tensor, position_BS: Tensor, key_BS: Tensor) -> Selection:
        """The training choice: exactly C tokens of each sequence, ties by position; `key_BS` are those of the noise."""
        S = x_BSD.shape[1]
        C = chosen(self.capacity, S)
        r_BS = self.score(x_BSD)
        rank_BS = r_BS.detach()
        if self.routing == "random":
            rank_BS = uniform(fold(key_BS, self.layer))
        elif self.routing == "static":
            rank_BS = _spaced(position_BS, C, S).float()
        index_BC = rank_BS.argsort(dim=1, descending=True, stable=True)[:, :C].sort(dim=1).values
        target_BS = torch.zeros_like(r_BS).scatter_(1, index_BC, 1.0)
        logit_BS = self.predictor(x_BSD)
        loss = F.binary_cross_entropy_with_logits(logit_BS, target_BS, reduction="sum")
        if C == S:
            loss = loss * 0.0  # nothing to predict: a target without zeros would drive the logits up for ever
        with torch.no_grad():
            keep_BS = self._rule(position_BS, logit_BS, r_BS)
            agreement = (keep_BS == target_BS.bool()).sum()
            position = index_BC.sum() / max(1, S - 1)
            tokens, selected = (r_BS.new_full((), float(t.numel())) for t in (r_BS, index_BC))
            sums_X = torch.stack([tokens, selected, agreement, keep_BS.sum(), loss, r_BS.square().sum(), position])
            quantile_B, threshold_B = (_quantile(values_BS, C) for values_BS in (logit_BS, r_BS))
        return Selection(index_BC, r_BS.gather(1, index_BC), loss, sums_X, quantile_B.sum(), threshold_B.sum())

    def forward(self, x_BSD: Tensor, position_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluation and generation: the causal choice `keep_BS` (bool) and the router outputs `r_BS` of all tokens."""
        r_BS = self.score(x_BSD)
        needed = self.routing == "learned" and self.rule == "predictor"
        return self._rule(position_BS, self.predictor(x_BSD) if needed else r_BS, r_BS), r_BS

    def _rule(self, position_BS: Tensor, logit_BS: Tensor, r_BS: Tensor) -> Tensor:
        """The causal choice (bool), made from a token and its position alone; `top` is training's, for comparison."""
        if self.rule == "top":
            return self.top(r_BS)
        if self.routing == "random":
            return uniform(fold(fold(position_BS, 0), self.layer)) < self.capacity
        if self.routing == "static":
            return _spaced(position_BS, chosen(self.capacity, self.sequence), self.sequence)
        return r_BS > self.threshold if self.rule == "threshold" else logit_BS > self.quantile

    def top(self, r_BS: Tensor) -> Tensor:
        """Which tokens (bool) are the C of a sequence with the largest r, ties by position: as in training."""
        rank_BS = r_BS.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return rank_BS < chosen(self.capacity, r_BS.shape[1])

    @torch.no_grad()
    def follow(self, quantile: Tensor, threshold: Tensor, live: Tensor) -> None:
        """Moves both decode rules towards this step's quantiles where `live` (bool).

        The first live step sets them; then they are the mean of all steps until that is as long as the moving average.
        """
        memory = (self.steps / (self.steps + 1)).clamp_max(QUANTILE_MEMORY)
        for average, new in ((self.quantile, quantile), (self.threshold, threshold)):
            # `where`, not a product with `live`: a skipped step's quantile may be NaN.
            average.copy_(torch.where(live, new.lerp(average, memory), average))
        self.steps += live


def _quantile(values_BS: Tensor, C: int) -> Tensor:
    """Half way between the last value inside the top C and the first outside: C of these S tokens exceed it."""
    ranked_BS = values_BS.sort(dim=1, descending=True).values
    if values_BS.shape[1] == C:
        return ranked_BS[:, -1] - 1.0
    return (ranked_BS[:, C - 1] + ranked_BS[:, C]) / 2


def _spaced(position_BS: Tensor, C: int, S: int) -> Tensor:
    """C of every S positions (bool), evenly spaced."""
    return (position_BS + 1) * C // S > position_BS * C // S


class _TakeRows(torch.autograd.Function):
    """x[index] for an index without repetition, whose gradient is therefore a copy, not a sum."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, index_R: Tensor) -> Tensor:
        ctx.save_for_backward(index_R)
        ctx.rows = x_TD.shape[0]
        return x_TD.index_select(0, index_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index_R,) = ctx.saved_tensors
        g_RD = grads[0]
        return g_RD.new_zeros(ctx.rows, g_RD.shape[1]).index_copy_(0, index_R, g_RD), None


def flat_index(index_BC: Tensor, sequence: int) -> Tensor:
    """Positions inside each sequence -> row numbers of the flattened batch."""
    start_B1 = torch.arange(index_BC.shape[0], device=index_BC.device).unsqueeze(1) * sequence
    return (index_BC + start_B1).flatten()


def take(x_BSD: Tensor, index_BC: Tensor) -> Tensor:
    """The selected tokens `[B, C, D]`."""
    rows: Tensor = _TakeRows.apply(x_BSD.flatten(0, 1), flat_index(index_BC, x_BSD.shape[1]))  # type: ignore[no-untyped-call]
    return rows.view(*index_BC.shape, x_BSD.shape[-1])


def put(x_BSD: Tensor, index_BC: Tensor, y_BCD: Tensor) -> Tensor:
    """`x` with the selected rows replaced by `y`; all other rows are copied bit by bit."""
    index = flat_index(index_BC, x_BSD.shape[1])
    return x_BSD.flatten(0, 1).index_copy(0, index, y_BCD.flatten(0, 1)).view_as(x_BSD)
