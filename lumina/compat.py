"""Feature tests: what this build of PyTorch and this hardware can do, found by trying, never by version.

torch is imported by the tests that need it, so that whoever asks for the rest does not wait for it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def usable_cores() -> int:
    """CPU cores this process may use: its affinity where the system has one, else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_has_fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX512-BF16 or AMX)."""
    import torch

    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def mps_has_bf16() -> bool:
    """Whether this Mac's GPU multiplies bf16 (macOS 14 and newer, Apple silicon)."""
    import torch

    try:
        one = torch.ones(8, 8, device="mps", dtype=torch.bfloat16)
        return bool((one @ one == 8).all())
    except (RuntimeError, TypeError):
        return False


def compiler_missing(device: str) -> str | None:
    """What torch.compile would need here and does not find; None if nothing."""
    if device == "cpu":
        from torch._inductor import cpp_builder
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            cpp_builder.get_cpp_compiler()
        except InvalidCxxCompiler:
            return "a C++ compiler"
        return None
    if device == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "triton"
    return "a backend for this device"


def grouped_mm_works(device: str, dtype: torch.dtype) -> bool:
    """Whether `F.grouped_mm` runs here and agrees with two plain products. On a CPU it is not needed.

    GPUs below compute capability 9.0 are refused although it runs: there it is a slow loop that waits for the host
    at each expert.
    """
    if device == "cpu":
        return True
    import torch
    import torch.nn.functional as F

    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        return False
    x = torch.ones(16, 16, device=device, dtype=dtype)
    w = torch.ones(2, 16, 16, device=device, dtype=dtype)
    offs = torch.tensor([8, 16], device=device, dtype=torch.int32)
    try:
        y = F.grouped_mm(x, w, offs=offs)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool((y == 16).all())
