"""Initial weights, drawn per parameter name: adding a layer or a process changes no other parameter's draw.

Matrices are normal with standard deviation 0.02 (GPT-2, Qwen3); those that write into the residual stream are
divided by sqrt(2·layers) (GPT-2), so that its variance at the output does not grow with depth. Adapters: see
`lumina.model.lora`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lumina.model.lora import MARK
from lumina.model.mod import DepthRouter
from lumina.model.moe import MoE
from lumina.model.router import Router

STD = 0.02
Assign = Callable[[Tensor, Tensor], Any]  # stores a value in a parameter


def name_seed(seed: int, name: str) -> int:
    """A 63-bit seed that depends on nothing but the run's seed and the parameter's name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.no_grad()
def initialize(model: nn.Module, layers: int, seed: int, assign: Assign = Tensor.copy_) -> None:
    """Fills every parameter and persistent buffer of a `Transformer` of so many layers."""
    spare = {
        f"{name}.{leaf}": module.router.config.spare
        for name, module in model.named_modules()
        if isinstance(module, MoE)
        for leaf in ("w_gate_up", "w_down", "router.weight")
    }
    for name, parameter in model.named_parameters():
        value = _draw(parameter.shape, name, seed, layers)
        if empty := spare.get(name, 0):  # slots for later are zero, and the others what they are without them
            shape = torch.Size([parameter.shape[0] - empty, *parameter.shape[1:]])
            value = torch.cat([_draw(shape, name, seed, layers), value.new_zeros(empty, *shape[1:])])
        assign(parameter, value)
    for module in model.modules():
        if isinstance(module, Router | DepthRouter):
            module.reset()


def _draw(shape: torch.Size, name: str, seed: int, layers: int) -> Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(("predictor.w_out", "predictor.bias")):  # `DepthRouter.reset` sets the prior
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(name_seed(seed, name))
    if MARK in name:
        return torch.zeros(shape) if name.endswith(".b") else _kaiming(shape, generator)
    std = STD
    if name.endswith(("attn.w_out", "ffn.w_down", "shared.w_down")):
        std = STD / math.sqrt(2 * layers)
    return torch.randn(shape, generator=generator) * std


def _kaiming(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Kaiming's uniform draw with a = sqrt(5), which is within 1 / sqrt(inputs)."""
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])
