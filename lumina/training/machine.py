"""What this machine is, and the choices that follow from it: made once, saved with the run, reused on resume."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from lumina import __version__
from lumina.compat import cpu_has_fast_bf16, grouped_mm_works, usable_cores
from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.training.precision import Precision

MICRO_TOKENS = 8192  # a micro-batch's activations: larger gains nothing on a CPU and costs memory
MATMUL_SIZE = {"cpu": 1024, "mps": 4096, "cuda": 8192}  # large enough that waiting for the device does not count
MATMUL_SECONDS = 0.25
Choices = dict[str, tuple[Any, str]]


def choose_device(wanted: str) -> tuple[str, str]:
    """The device to use and why; `UserError` if the wanted one is not here."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        best = next(device for device, here in found.items() if here)
        return best, "the fastest device found here"
    if not found[wanted]:
        here = ", ".join(device for device, there in found.items() if there)
        raise UserError(
            f"parallel.device={wanted}: this machine (or this build of PyTorch {torch.__version__}) has no {wanted}",
            fix=f"use parallel.device=auto, or one of: {here}",
        )
    return wanted, "as configured"


def choose_precision(wanted: str, device: str) -> tuple[str, str]:
    """fp32, or bf16 where the hardware multiplies it faster."""
    if wanted != "auto":
        return wanted, "as configured"
    if device == "cuda":
        fast = torch.cuda.get_device_capability() >= (8, 0)
        return ("bf16", "compute capability 8.0 or more") if fast else ("fp32", "no bf16 units on this GPU")
    if device == "cpu" and cpu_has_fast_bf16():
        return "bf16", "this CPU has AVX512-BF16 or AMX"
    return "fp32", f"no fast bf16 on this {device}"


def choose(config: Config) -> Choices:
    """Every machine-dependent choice as {key: (value, why)}, for `config.resolve.settle`."""
    device, device_why = choose_device(config.parallel.device)
    mode, mode_why = choose_precision(config.precision.mode, device)
    choices: Choices = {}
    if config.parallel.device == "auto":
        choices["parallel.device"] = (device, device_why)
    if config.parallel.threads == "auto":
        choices["parallel.threads"] = (usable_cores(), "cores this process may use")
    if config.precision.mode == "auto":
        choices["precision.mode"] = (mode, mode_why)
    if config.model.moe and config.model.moe.kernel == "auto":
        works = grouped_mm_works(device, Precision(mode, device).dtype)
        kernel = ("grouped", "grouped matmul works here") if works else ("loop", "no grouped matmul here")
        choices["model.moe.kernel"] = kernel
    if config.train.micro_batch == "auto":
        choices["train.micro_batch"] = (_micro_batch(config), f"at most {MICRO_TOKENS} tokens at once")
    if config.train.tokens is not None:
        steps = max(1, round(config.train.tokens / config.train.batch_tokens))
        choices["train.steps"] = (steps, f"train.tokens={config.train.tokens} / train.batch_tokens")
    return choices


def _micro_batch(config: Config) -> int:
    """The largest number of sequences that divides the batch and stays within `MICRO_TOKENS`."""
    sequences = config.train.batch_tokens // config.model.seq_len
    limit = max(1, MICRO_TOKENS // config.model.seq_len)
    return next(n for n in range(min(limit, sequences), 0, -1) if sequences % n == 0)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matmul: what MFU is measured against. The best of many, for a busy machine only slows."""
    size = MATMUL_SIZE[device]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + MATMUL_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def facts(device: str) -> dict[str, Any]:
    """Names and versions for `meta.json`."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "lumina": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "device_name": name,
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _cpu_name() -> str:
    """The model of the CPU, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_used(device: str) -> int:
    """Bytes: the process's resident memory on a CPU, the allocator's peak on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    resident: int = psutil.Process().memory_info().rss
    return resident
