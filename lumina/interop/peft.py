"""A run's adapters as PEFT's own files, which `PeftModel.from_pretrained` loads onto the exported base model.

    adapter_config.json     rank, alpha, and which modules have adapters
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight [r, in] and .lora_B.weight [out, r]

The modules are those of the transformers class that the model is: Qwen3 (dense), and Qwen3-MoE or GLM-4-MoE where only
attention is adapted. PEFT takes every gate_proj, up_proj and down_proj of a MoE class for one of the stacked experts
(seen in 0.21 with transformers 5), so that it cannot load those of a shared expert or of a dense layer there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lumina.checkpoint import store
from lumina.errors import UserError
from lumina.interop.adapters import Adapted, load, require_new
from lumina.model.lora import Named, adapters
from lumina.run.folder import Run

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULES = {"attn": "self_attn", "ffn": "mlp"}
ATTENTION = ("q", "k", "v", "o")


def export(run: Run, out: Path) -> int:
    """Writes the adapters of a run's newest complete checkpoint to the new folder `out`; returns its step.

    Raises `UserError` if `out` exists, if the run has no adapters, or if no transformers class has their modules.
    """
    require_new(out)
    adapted = load(run)
    require_class(adapted)
    aside = store.temporary(out)
    try:
        aside.mkdir(parents=True)
        save_file(tensors(adapted), aside / WEIGHTS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps(settings(adapted), indent=2) + "\n", encoding="utf-8")
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return adapted.checkpoint.step


def require_class(adapted: Adapted) -> None:
    """Raises `UserError` if no transformers class has these modules, or PEFT would take them for others."""
    model, why = adapted.resolved.config.model, None
    if model.mod is not None:
        why = f"a {model.kind} model routes tokens by depth, which no transformers class does"
    elif model.moe and any(named.part not in ATTENTION for named in adapters(adapted.transformer)):
        why = "PEFT takes those of shared experts and of dense layers beside experts for those of stacked experts"
    if why:
        raise UserError(
            f"these adapters have no PEFT form: {why}", fix="use `lumina lora merge`, which makes a run of its own"
        )


def module_of(named: Named) -> str:
    """The module that has this adapter, by its name in transformers."""
    _, layer, kind = named.layer.split(".")
    return f"model.layers.{layer}.{MODULES[kind]}.{named.part}_proj"


def tensors(adapted: Adapted) -> dict[str, Tensor]:
    """Both matrices of every adapter, under PEFT's names."""
    found = {}
    for named in adapters(adapted.transformer):
        prefix = f"base_model.model.{module_of(named)}"
        found[f"{prefix}.lora_A.weight"] = named.adapter.a.detach()
        found[f"{prefix}.lora_B.weight"] = named.adapter.b.detach()
    return found


def settings(adapted: Adapted) -> dict[str, Any]:
    """`adapter_config.json`: what PEFT does not find here it takes from its own defaults."""
    config = adapted.resolved.config
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": config.train.lora.rank,
        "lora_alpha": config.train.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": sorted({f"{named.part}_proj" for named in adapters(adapted.transformer)}),
    }
