"""The planner's memory beside what a process on a CPU really takes: how far its resident memory grows.

Each case trains in a fresh process (`harness.memory_of`). Some cases set the planner's constant (what libraries keep
for themselves), the others judge it.

A process keeps much of what was freed: glibc takes blocks below 32 MiB from a heap, in which aligned blocks seldom fit
where others were. How much that is has nothing to do with the model, so that the forecast is held against processes
which give freed memory back at once (`RETURNED`); what those with glibc's defaults take stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lumina.bench import report as pages
from lumina.bench.harness import Arm, Parts, Run, circumstances, memory_of
from lumina.bench.memory import Keys, Meter, configure, forecast_of, walk
from lumina.model.transformer import Transformer
from lumina.parallel.world import ALONE
from lumina.progress import Tell, silent
from lumina.training import setup
from lumina.training.optim import Optimizer
from lumina.training.precision import Precision

CPU: Keys = {
    "model.width": 384, "model.layers": 6, "model.heads": 6, "model.kv_heads": 2, "model.head_dim": 64,
    "model.ffn": 1024, "model.vocab": 8192, "model.seq_len": 512, "model.tied": False, "model.moe.experts": 8,
    "model.moe.top_k": 2, "model.moe.ffn": 512, "train.micro_batch": 8, "train.batch_tokens": 4096,
    "train.compile": "off", "parallel.device": "cpu", "parallel.threads": 1, "precision.mode": "fp32",
}  # fmt: skip
FITTED: Mapping[str, Keys] = {
    "dense fp32": {},
    "dense bf16": {"precision.mode": "bf16"},
    "moe fp32": {"model.kind": "moe"},
    "moe bf16": {"model.kind": "moe", "precision.mode": "bf16"},
}
JUDGING: Mapping[str, Keys] = {
    "dense bf16, wide": {"precision.mode": "bf16", "model.width": 768, "model.heads": 12, "model.layers": 4,
                         "model.ffn": 2048},
    "dense fp32, selective, long": {"train.recompute": "selective", "model.seq_len": 1024, "train.micro_batch": 4},
    "moe bf16, adamw": {"model.kind": "moe", "precision.mode": "bf16", "train.optimizer": "adamw",
                        "model.moe.experts": 16, "model.moe.ffn": 384, "train.batch_tokens": 8192},
    "mod fp32": {"model.kind": "mod", "model.layers": 8},
    "hybrid bf16, full": {"model.kind": "hybrid", "precision.mode": "bf16", "train.recompute": "full",
                          "model.vocab": 16384},
    "dense bf16_pure, tied": {"precision.mode": "bf16_pure", "model.tied": True, "model.layers": 10},
}  # fmt: skip
CASES = {**FITTED, **JUDGING}
NAMES = tuple(CASES)
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
HEADER = ("case", "used", "resident, MiB", "forecast, MiB", "moment", "error", "by default, MiB")


class _Nothing(Meter):
    """The process's memory is asked for from outside."""

    def begin(self, model: Transformer, optimizer: Optimizer) -> None: ...

    def now(self) -> int:
        return 0

    def most(self) -> int:
        return 0


def suite() -> list[Arm]:
    """An arm for each case: two steps and an evaluation."""
    return [Arm(name, partial(_training, {**CPU, **keys}), 1.0) for name, keys in CASES.items()]


def _training(keys: Keys) -> Run:
    config = configure(keys)
    model = setup.build_model(config, Precision.of(config.precision, "cpu"), ALONE)

    def run() -> Parts:
        walk(config, model, _Nothing())
        return {}

    return run


def report(names: Sequence[str] = NAMES, progress: Tell = silent) -> tuple[str, dict[str, Any]]:
    """The page, and every number of it."""
    grown = memory_of(suite, names, repeats=1, progress=progress, environment=RETURNED)
    usual = memory_of(suite, names, repeats=1, progress=progress)
    found = {
        name: {"keys": {**CPU, **CASES[name]}, "resident": bytes_, "resident_by_default": usual[name]}
        for name, bytes_ in grown.items()
    }
    return beside({"about": circumstances("cpu"), "cases": found})


def beside(measured: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The page of what was measured, whenever that was, and what the planner says of it today."""
    about, cases = measured["about"], {}
    for name, one in measured["cases"].items():
        forecast = forecast_of(one["keys"], "cpu", version=about["torch"])
        cases[name] = {
            **one,
            "used": "to set constants" if name in FITTED else "to judge",
            "forecast": {"moments": forecast.moments, "parts": forecast.parts, "peak": forecast.total},
            "moment": forecast.moment,
            "error": forecast.total / one["resident"] - 1,
        }
    said = (
        f"{about['date']}, {about['device_name']}, lumina at {about['commit'] or 'no commit'}, torch {about['torch']}; "
        "how far the resident memory of a process grew in two steps and an evaluation, one thread."
    )
    page = pages.table("Resident memory of training on a CPU", HEADER, rows(cases), said)
    return page.lstrip(), {"about": about, "cases": cases}


def rows(cases: Mapping[str, Any]) -> list[list[str]]:
    return [
        [name, one["used"], f"{one['resident'] / 2**20:.0f}", f"{one['forecast']['peak'] / 2**20:.0f}", one["moment"],
         f"{one['error']:+.1%}", f"{one['resident_by_default'] / 2**20:.0f}"]
        for name, one in cases.items()
    ]  # fmt: skip
