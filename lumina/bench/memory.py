"""Memory that training takes, moment by moment, beside what the planner says it will.

A step is taken as a run takes it (`step.gradients`, `step.apply`), then an evaluation, and the most that was
allocated is read at the end of each moment. On a GPU its allocator is asked, which rounds every tensor up to 512
bytes; what is not a tensor (the CUDA context, its libraries' code) is in no figure.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from lumina.bench.harness import circumstances
from lumina.config.names import kinds_of
from lumina.config.resolve import resolve, settle
from lumina.config.schema.config import Config
from lumina.data.loader import Batch
from lumina.model.transformer import Transformer
from lumina.parallel.world import ALONE
from lumina.planner import memory as forecasts
from lumina.progress import Tell, silent, tracked
from lumina.training import machine, setup
from lumina.training.optim import Optimizer
from lumina.training.precision import LossScale, Precision
from lumina.training.state import EVAL_TOKENS
from lumina.training.step import Step, apply, gradients

STEPS = 2  # the second has every moment and workspace already
Keys = Mapping[str, Any]
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
GPU_CASES: Mapping[str, Keys] = {
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


class Meter(Protocol):
    """Reads memory in bytes: what is allocated, and the most that was since it was last asked for the most."""

    def begin(self, model: Transformer, optimizer: Optimizer) -> None:
        """Called once they are built, before the first step."""

    def now(self) -> int: ...

    def most(self) -> int: ...


@dataclass(frozen=True)
class Walk:
    """Bytes at the most, by moment: what was allocated at its end, and the most inside it."""

    most: Mapping[str, int]
    end: Mapping[str, int]

    @property
    def peak(self) -> int:
        return max(self.most.values())


def configure(keys: Keys) -> Config:
    """`keys` over the debug preset as a dense model, settled for this machine; keys of other kinds are passed over."""
    kind = keys.get("model.kind", "dense")
    own = {key: value for key, value in keys.items() if kind in kinds_of(key)}
    resolved = resolve("debug", {"model.kind": kind, "train.steps": 1000, **own})
    return settle(resolved, machine.choose(resolved.config)).config


def walk(config: Config, model: Transformer, meter: Meter) -> Walk:
    """Takes `STEPS` steps with the `model` of `config` and evaluates once; random ids, two documents a sequence."""
    most: dict[str, int] = {}
    end: dict[str, int] = {}

    def mark(moment: str) -> None:
        most[moment] = max(most.get(moment, 0), meter.most())
        end[moment] = meter.now()

    device = config.parallel.device
    precision = Precision.of(config.precision, device)
    optimizer = Optimizer(model, config.train, ALONE, LossScale(device) if config.precision.mode == "fp16" else None)
    meter.begin(model, optimizer)
    mark("state")
    sequences = config.train.batch_tokens // config.model.seq_len
    plan = Step(
        micro_batches=sequences // int(config.train.micro_batch),
        clip=config.train.clip,
        z_loss=config.train.z_loss,
        bias_rate=config.model.moe.bias_rate if config.model.moe else 0.0,
        frozen=config.train.lora.rank > 0,
    )
    batch = random_batch(config, sequences)
    with _marking(model, mark):
        for step in range(STEPS):
            found = gradients(model, optimizer, batch, plan, precision, step)
            mark("backward")
            apply(model, optimizer, batch, 1e-4, plan, found)
            mark("optimizer")
            del found
    held_out = random_batch(config, max(1, EVAL_TOKENS // config.model.seq_len)).to(device)
    with precision.evaluating():
        model.evaluate(held_out.ids_BS, held_out.segments_BS, held_out.targets_BS)
    mark("evaluation")
    return Walk(most, end)


@contextmanager
def _marking(model: Transformer, mark: Any) -> Iterator[None]:
    """Marks where each forward begins (a backward may have ended) and ends."""
    before = model.register_forward_pre_hook(lambda *_: mark("backward"))
    after = model.register_forward_hook(lambda *_: mark("forward"))
    try:
        yield
    finally:
        before.remove()
        after.remove()


def random_batch(config: Config, sequences: int) -> Batch:
    """Any token as likely as any other; two documents in each sequence."""
    seq_len = config.model.seq_len
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.model.vocab, (sequences, seq_len + 1), generator=generator)
    segments = (torch.arange(seq_len) >= seq_len // 2).int().expand(sequences, -1).contiguous()
    return _AllCounted(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), segments, torch.arange(sequences))


class _AllCounted(Batch):
    """Counts its targets without looking at them: they may be fake."""

    @property
    def targets(self) -> int:
        return self.targets_BS.numel()


# -- on a GPU ------------------------------------------------------------------------------------------------------


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


def on_gpu(cases: Mapping[str, Keys] = GPU_CASES, progress: Tell = silent) -> dict[str, Any]:
    """Every case's bytes by moment, as JSON; a case that fails says why, and the next one begins."""
    found: dict[str, Any] = {}
    names = list(cases)
    for name in tracked(names, "measuring memory", len(names), progress):
        keys = {**GPU, **cases[name]}
        start = time.perf_counter()
        try:
            found[name] = {"keys": keys, **_on_gpu(keys)}
        except Exception as error:  # whatever it is, the other cases are wanted
            found[name] = {"keys": keys, "error": f"{type(error).__name__}: {str(error)[:500]}"}
        found[name]["seconds"] = round(time.perf_counter() - start, 2)
        _empty()
    return {"about": circumstances("cuda") | _libraries(), "cases": found}


def _on_gpu(keys: Keys) -> dict[str, Any]:
    _empty()
    before = torch.cuda.memory_allocated()  # what libraries keep for themselves: workspaces of products
    config = configure(keys)
    model = setup.build_model(config, Precision.of(config.precision, "cuda"), ALONE)
    took = walk(config, model, CudaMeter())
    statistics = torch.cuda.memory_stats()
    return {
        "kernel": config.model.moe.kernel if config.model.moe else None,
        "attention": attention_kernel(config),
        "before": before,
        "most": took.most,
        "end": took.end,
        "peak": took.peak,
        "left": _empty(),
        "reserved": statistics["reserved_bytes.all.peak"],
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


# -- the page ------------------------------------------------------------------------------------------------------

MOMENTS = ("forward", "backward", "optimizer", "evaluation")
HEADER = ("case", "attention", *MOMENTS, "peak", "forecast", "error")


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """One row a case: the most at each moment, in MiB; of the peak what the planner says, and how far that is off."""
    cells = []
    for name, one in found["cases"].items():
        if "error" in one:
            cells.append([name, one["error"].splitlines()[0], *["-"] * (len(HEADER) - 2)])
            continue
        forecast = forecast_of(one, found["about"]["device"])
        sizes = [*(one["most"][moment] for moment in MOMENTS), one["peak"], forecast.total]
        error = forecast.total / one["peak"] - 1
        cells.append([name, one["attention"], *(f"{value / 2**20:.0f}" for value in sizes), f"{error:+.1%}"])
    return cells


def forecast_of(one: Mapping[str, Any], device: str) -> forecasts.Memory:
    """What the planner says of a case, given the attention kernel that was seen."""
    kind = one["keys"].get("model.kind", "dense")
    own = {key: value for key, value in one["keys"].items() if kind in kinds_of(key)}
    config = resolve("debug", {"model.kind": kind, "train.steps": 1000, **own}).config
    return forecasts.memory(config, 1, device, one["attention"])


def said(about: Mapping[str, Any], names: Sequence[str]) -> str:
    """Machine, versions and what the columns are."""
    return (
        f"{about['date']}, {about['device_name']}, lumina at {about['commit'] or 'no commit'}, torch {about['torch']}, "
        f"CUDA {about['cuda']}, cuDNN {about['cudnn']}, Python {about['python']}; {len(names)} cases, MiB allocated at "
        f"the most inside each moment of {STEPS} steps and an evaluation."
    )
