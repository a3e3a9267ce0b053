"""From logits to the next token: temperature, top-k, top-p (nucleus, Holtzman et al. 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lumina.errors import UserError


@dataclass(frozen=True)
class Sampler:
    """`temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those limits off."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.9

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(f"temperature={self.temperature}: must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p}: must be in (0, 1]")
        if problems:
            raise UserError.collect(problems, "sampling", fix="change them, or leave them out")

    def pick(self, logits_BV: Tensor, generator: torch.Generator) -> Tensor:
        """The chosen ids `[B]`."""
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        temperature = max(self.temperature, torch.finfo(logits_BV.dtype).tiny)  # a smaller one would become 0
        scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature  # no overflow
        if self.top_k:
            kth_B1 = scaled_BV.topk(min(self.top_k, scaled_BV.shape[-1])).values[:, -1:]
            scaled_BV = scaled_BV.masked_fill(scaled_BV < kth_B1, float("-inf"))
        if self.top_p < 1:
            scaled_BV = self._nucleus(scaled_BV)
        return torch.multinomial(scaled_BV.softmax(-1), 1, generator=generator).squeeze(1)

    def _nucleus(self, scaled_BV: Tensor) -> Tensor:
        """Keeps the smallest set of tokens whose probability reaches top_p; always the most likely one."""
        ranked = scaled_BV.sort(dim=-1, descending=True)
        probability_BV = ranked.values.softmax(-1)
        outside_BV = probability_BV.cumsum(-1) - probability_BV >= self.top_p
        return scaled_BV.masked_fill(outside_BV.scatter(1, ranked.indices, outside_BV), float("-inf"))
