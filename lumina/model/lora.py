"""Low-rank adapters (LoRA, Hu et al. 2021, 2106.09685): y = W x + (alpha / rank) · B(A x), where W rests.

Every named part of a fused weight has adapters of its own, so that they are PEFT's modules one by one: q, k, v and o
of attention; gate, up and down of a dense feed-forward network, that of the shared experts included. Stacked experts,
routers, embeddings, norms and the head have none. All other parameters are frozen: without gradient and without
optimizer state. So are router biases and depth thresholds (`lumina.training.step`).

A is drawn as PEFT draws it, uniform within 1 / sqrt(inputs), by name (`lumina.model.init`); B is zero, so that an
adapted model begins as the one it adapts, to the bit.

Shapes: D inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.config.schema.train import LoraConfig

MARK = ".lora."  # in the name of every adapter's parameter, and of no other


class Adapter(nn.Module):
    """B(A x) for one linear map."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.empty(outputs, rank))

    def forward(self, x_D: Tensor) -> Tensor:
        return F.linear(F.linear(x_D, self.a), self.b)

    def product(self) -> Tensor:
        """B A `[O, D]` in fp32."""
        return self.b.float() @ self.a.float()


class Adapters(nn.ModuleDict):
    """The adapters of one layer, by the name of the part they belong to."""

    def __init__(self, parts: dict[str, Adapter], scale: float) -> None:
        super().__init__(parts)
        self.scale = scale

    def forward(self, x_D: Tensor, names: tuple[str, ...]) -> Tensor:
        """What the parts `names` of a fused weight add, side by side."""
        return torch.cat([self[name](x_D) for name in names], dim=-1) * self.scale

    def product(self, names: tuple[str, ...]) -> Tensor:
        """What they add to the fused weight itself, in fp32."""
        adapters: list[Adapter] = [self[name] for name in names]  # type: ignore[misc]
        return torch.cat([adapter.product() for adapter in adapters]) * self.scale


class Adaptable(nn.Module):
    """A layer whose linear maps can have adapters: `fused` names the parts of each weight, in the order of its rows.

    `splits` are the rows of those parts where a weight has more than one.
    """

    fused: ClassVar[dict[str, tuple[str, ...]]]
    splits: tuple[int, ...]
    lora: Adapters | None

    def __init__(self) -> None:
        super().__init__()
        self.lora = None

    def linear(self, x_D: Tensor, name: str) -> Tensor:
        """`x` through the weight of this name, with its adapters if there are any."""
        y_O = F.linear(x_D, getattr(self, name))
        return y_O if self.lora is None else y_O + self.lora(x_D, self.fused[name])

    def adapt(self, config: LoraConfig) -> None:
        """Gives every part an adapter."""
        parts = {}
        for name, names in self.fused.items():
            weight_OD: Tensor = getattr(self, name)
            rows = self.splits if len(names) > 1 else (len(weight_OD),)
            for part, outputs in zip(names, rows, strict=True):
                parts[part] = Adapter(weight_OD.shape[1], outputs, config.rank)
        self.lora = Adapters(parts, config.alpha / config.rank)

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the adapters to the weights, in fp32 and then rounded to their dtype, and removes them."""
        if self.lora is None:
            return
        for name, names in self.fused.items():
            weight_OD: Tensor = getattr(self, name)
            weight_OD.copy_(weight_OD.float() + self.lora.product(names))
        self.lora = None


class Named(NamedTuple):
    """One adapter of a model: its layer's name, such as `blocks.0.attn`, its part, such as `q`, and itself."""

    layer: str
    part: str
    adapter: Adapter


def adapt(model: nn.Module, config: LoraConfig) -> None:
    """Freezes every parameter, then gives each `Adaptable` layer its adapters, not drawn yet."""
    model.requires_grad_(False)
    for layer in _layers(model):
        layer.adapt(config)


def merge(model: nn.Module) -> None:
    """Folds the adapters into the weights: the same function, with the names and trainable as one without LoRA."""
    for layer in _layers(model):
        layer.merge()
    model.requires_grad_(True)


def adapters(model: nn.Module) -> list[Named]:
    """Every adapter; none in a model without LoRA."""
    return [
        Named(name, part, adapter)
        for name, layer in model.named_modules()
        if isinstance(layer, Adaptable) and layer.lora is not None
        for part, adapter in layer.lora.items()
        if isinstance(adapter, Adapter)
    ]


def _layers(model: nn.Module) -> Iterator[Adaptable]:
    return (module for module in model.modules() if isinstance(module, Adaptable))
