"""Which number formats are used where. Norms' statistics, routers and losses are fp32 in every mode.

| mode      | weights and moments | matmuls in training | loss scale |
|-----------|---------------------|---------------------|------------|
| fp32      | fp32                | fp32                |            |
| bf16      | fp32                | bf16 (autocast)     |            |
| fp16      | fp32                | fp16 (autocast)     | dynamic    |
| bf16_pure | bf16                | bf16                |            |

fp16's smallest normal number is 6e-5, so its losses are scaled before the backward pass; bf16 has fp32's range.
bf16_pure takes half the memory, and loses updates smaller than 1/256 of a weight.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from lumina.config.schema.config import PrecisionConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "bf16_pure": torch.bfloat16}
# Dynamic loss scaling as in Micikevicius et al. 2018 (1710.03740) with the constants of torch.amp.GradScaler.
FIRST_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000


@dataclass(frozen=True)
class Precision:
    """A settled `precision`: `mode` of training, `eval` of evaluation."""

    mode: str
    eval: str
    device: str

    @classmethod
    def of(cls, config: PrecisionConfig, device: str) -> Precision:
        return cls(config.mode, config.eval, device)

    @property
    def dtype(self) -> torch.dtype:
        """Of training's matmuls."""
        return DTYPES[self.mode]

    @property
    def weights(self) -> torch.dtype:
        """Of weights and moments."""
        return torch.bfloat16 if self.mode == "bf16_pure" else torch.float32

    def training(self) -> AbstractContextManager[object]:
        return self._autocast(self.mode)

    def evaluating(self) -> AbstractContextManager[object]:
        return self._autocast(self.eval)

    def _autocast(self, mode: str) -> AbstractContextManager[object]:
        return torch.autocast(self.device, dtype=DTYPES[mode], enabled=DTYPES[mode] != self.weights)


class LossScale:
    """A factor on the loss that keeps fp16 gradients from vanishing: halved when they overflow, doubled when they have
    not for a while. It lives on the device and never makes the host wait."""

    def __init__(self, device: str) -> None:
        self.scale = torch.full((1,), FIRST_SCALE, device=device)
        self.good_steps = torch.zeros(1, dtype=torch.int32, device=device)

    def unscale(self, gradients: list[Tensor]) -> None:
        torch._foreach_mul_(gradients, 1 / self.scale[0])

    def update(self, skipped: Tensor) -> None:
        """`skipped` is a float32 scalar, exactly 0 or 1."""
        torch._amp_update_scale_(self.scale, self.good_steps, skipped, GROWTH, BACKOFF, GROWTH_INTERVAL)

    def tensors(self) -> dict[str, Tensor]:
        return {"loss_scale": self.scale, "loss_scale.good_steps": self.good_steps}
