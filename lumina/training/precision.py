"""Which number format the matmuls use. Weights, moments, norms' statistics, routers and losses are always fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """`mode` is fp32, or bf16 (autocast over fp32 master weights)."""

    mode: str
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.mode]

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.mode == "bf16")
