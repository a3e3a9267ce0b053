"""The planner's memory beside what PyTorch's allocator of a GPU handed out.

The allocator rounds every tensor up to 512 bytes, and libraries take workspaces of it; what is not its own (the CUDA
context, kernels) is in no figure.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from lumina.bench import report as pages
from lumina.bench.harness import circumstances
from lumina.bench.memory import MOMENTS, Keys, configure, forecast_of, walk
from lumina.config.schema.config import Config
from lumina.model.transformer import Transformer
from lumina.parallel.world import ALONE
from lumina.progress import Tell, silent, tracked
from lumina.training import setup
from lumina.training.optim import Optimizer
from lumina.training.precision import Precision

GPU: Keys = {
    "model.width": 1024, "model.layers": 8, "model.heads": 16, "model.kv_heads": 4, "model.head_dim": 64,
    "model.ffn": 2816, "model.vocab": 32768, "model.seq_len": 1024, "model.tied": False,
    "model.moe.experts": 8, "model.moe.top_k": 2, "model.moe.ffn": 1408, "train.micro_batch": 16,
    "train.batch_tokens": 16384, "train.compile": "off", "parallel.device": "cuda",
}  # fmt: skip
LARGE: Keys = {
    "model.width": 2048, "model.layers": 5, "model.head_dim": 128, "model.ffn": 6144, "model.vocab": 65536,
    "model.seq_len": 2048, "train.micro_batch": 4,
}  # fmt: skip
SHORT: Keys = {"model.layers": 4, "train.micro_batch": 4, "train.batch_tokens": 4096}
# What is asked of a GPU: each kind, each way to recompute, each format, each kernel of attention; up to 20 GB.
CASES: Mapping[str, Keys] = {
    "dense bf16": {"precision.mode": "bf16"},
    "dense bf16, selective": {"precision.mode": "bf16", "train.recompute": "selective"},
    "dense bf16, full": {"precision.mode": "bf16", "train.recompute": "full"},
    "dense bf16_pure, adamw": {"precision.mode": "bf16_pure", "train.optimizer": "adamw"},
    "dense fp32": {"precision.mode": "fp32", **SHORT},
    "dense fp32, as many key-value heads": {"precision.mode": "fp32", "model.kv_heads": 16, **SHORT},
    "dense bf16, two micro-batches": {"precision.mode": "bf16", "train.batch_tokens": 32768},
    "dense bf16, selective, large": {"precision.mode": "bf16", "train.recompute": "selective", **LARGE},
    "dense bf16, lora": {"precision.mode": "bf16", "train.lora.rank": 16},
    "moe bf16": {"model.kind": "moe", "precision.mode": "bf16", "model.layers": 6},
    "moe fp16, selective": {
        "model.kind": "moe", "precision.mode": "fp16", "model.layers": 4, "train.recompute": "selective",
        "model.moe.shared": 1,
    },
    "mod bf16": {"model.kind": "mod", "precision.mode": "bf16"},
    "hybrid bf16, full": {"model.kind": "hybrid", "precision.mode": "bf16", "train.recompute": "full"},
    "hybrid bf16, adamw": {"model.kind": "hybrid", "precision.mode": "bf16", "train.optimizer": "adamw"},
}  # fmt: skip


NAMES = tuple(CASES)
HEADER = ("case", "attention", *MOMENTS, "peak", "forecast", "error")


class CudaMeter:
    """What PyTorch's allocator handed out."""

    def begin(self, model: Transformer, optimizer: Optimizer) -> None:
        """It saw them being built."""

    def now(self) -> int:
        return torch.cuda.memory_allocated()

    def most(self) -> int:
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak


def report(names: Sequence[str] = NAMES, progress: Tell = silent) -> tuple[str, dict[str, Any]]:
    """The page, and every number of it; a case that fails says why, and the next one begins."""
    return beside(take(names, progress))


def take(names: Sequence[str], progress: Tell = silent) -> dict[str, Any]:
    """What is measured, without a forecast."""
    found: dict[str, Any] = {}
    for name in tracked(names, "measuring memory", len(names), progress):
        keys = {**GPU, **CASES[name]}
        start = time.perf_counter()
        try:
            found[name] = {"keys": keys, **_measure(keys)}
        except Exception as error:  # whatever it is, the other cases are wanted
            found[name] = {"keys": keys, "error": f"{type(error).__name__}: {str(error)[:500]}"}
        found[name]["seconds"] = round(time.perf_counter() - start, 2)
        _empty()
    return {"about": circumstances("cuda") | _libraries(), "cases": found}


def beside(measured: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The page of what was measured, whenever that was, and what the planner says of it today."""
    about, cases = measured["about"], {}
    for name, one in measured["cases"].items():
        cases[name] = one if "error" in one else {**one, "forecast": _forecast(one, about["torch"])}
    page = pages.table("Memory of training on a GPU", HEADER, rows(cases), said(about))
    return page.lstrip(), {"about": about, "cases": cases}


def _forecast(one: Mapping[str, Any], version: str) -> dict[str, Any]:
    said = forecast_of(one["keys"], "cuda", one["attention"].removesuffix("_attention"), version)
    return {"moments": said.moments, "parts": said.parts, "peak": said.total}


def _measure(keys: Keys) -> dict[str, Any]:
    _empty()
    before = torch.cuda.memory_allocated()  # what libraries keep for themselves: workspaces of products
    config = configure(keys)
    attention = attention_kernel(config)
    model = setup.build_model(config, Precision.of(config.precision, "cuda"), ALONE)
    took = walk(config, model, CudaMeter())
    reserved = torch.cuda.memory_stats()["reserved_bytes.all.peak"]
    del model
    return {
        "kernel": config.model.moe.kernel if config.model.moe else None,
        "attention": attention,
        "before": before,
        "most": took.most,
        "end": took.end,
        "peak": took.peak,
        "left": _empty(),
        "reserved": reserved,
    }


def attention_kernel(config: Config) -> str:
    """Which of PyTorch's attention kernels this model's shape and format take on this GPU."""
    model = config.model
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(config.precision.mode, torch.bfloat16)

    def heads(count: int) -> torch.Tensor:
        shape = (1, 64, count, model.head_dim)
        return torch.zeros(shape, device="cuda", dtype=dtype, requires_grad=True).transpose(1, 2)

    q, k, v = heads(model.heads), heads(model.kv_heads), heads(model.kv_heads)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool, device="cuda").tril()
    grouped = model.heads != model.kv_heads
    try:
        return SDPBackend(torch._fused_sdp_choice(q, k, v, mask, 0.0, False, enable_gqa=grouped)).name.lower()
    except Exception:  # a private function: the name of the backward's node says it, too
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return str(y.grad_fn)


def _empty() -> int:
    """Gives back what is not used; returns the bytes that are still."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _libraries() -> dict[str, Any]:
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "capability": torch.cuda.get_device_capability(),
        "gpu_bytes": torch.cuda.mem_get_info()[1],
    }


def rows(cases: Mapping[str, Any]) -> list[list[str]]:
    """One row a case: the most at each moment, in MiB; of the peak what the planner says, and how far that is off."""
    cells = []
    for name, one in cases.items():
        if "error" in one:
            cells.append([name, one["error"].splitlines()[0], *["-"] * (len(HEADER) - 2)])
            continue
        forecast = one["forecast"]["peak"]
        sizes = [*(one["most"][moment] for moment in MOMENTS), one["peak"], forecast]
        error = f"{forecast / one['peak'] - 1:+.1%}"
        cells.append([name, one["attention"], *(f"{value / 2**20:.0f}" for value in sizes), error])
    return cells


def said(about: Mapping[str, Any]) -> str:
    """Machine, versions and what the columns are."""
    return (
        f"{about['date']}, {about['device_name']}, lumina at {about['commit'] or 'no commit'}, torch {about['torch']}, "
        f"CUDA {about['cuda']}, cuDNN {about['cudnn']}, Python {about['python']}; MiB allocated at the most in "
        "each moment of two steps and an evaluation."
    )
