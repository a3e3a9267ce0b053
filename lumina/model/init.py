"""Initial weights, drawn per parameter name: adding a layer or a process changes no other parameter's draw.

Matrices are normal with standard deviation 0.02 (GPT-2, Qwen3); those that write into the residual stream are
divided by sqrt(2·layers) (GPT-2), so that its variance at the output does not grow with depth.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from lumina.model.mod import DepthRouter
from lumina.model.moe import MoE

STD = 0.02


def name_seed(seed: int, name: str) -> int:
    """A 63-bit seed that depends on nothing but the run's seed and the parameter's name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.no_grad()
def initialize(model: nn.Module, layers: int, seed: int) -> None:
    """Fills every parameter and persistent buffer of a `Transformer` of so many layers; meta tensors stay empty."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        _fill(parameter, name, seed, layers)
    for module in model.modules():
        if isinstance(module, MoE | DepthRouter):
            module.reset()


def _fill(parameter: Tensor, name: str, seed: int, layers: int) -> None:
    if name.endswith("norm.weight"):
        parameter.fill_(1.0)
        return
    if name.endswith(("predictor.w_out", "predictor.bias")):  # `DepthRouter.reset` sets the prior
        parameter.zero_()
        return
    std = STD
    if name.endswith(("attn.w_out", "ffn.w_down", "shared.w_down")):
        std = STD / math.sqrt(2 * layers)
    generator = torch.Generator().manual_seed(name_seed(seed, name))
    draw = torch.randn(parameter.shape, generator=generator) * std
    parameter.copy_(draw)
