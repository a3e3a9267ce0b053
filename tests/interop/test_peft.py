"""PEFT loads what `lumina lora export` writes, onto the transformers model of the same weights: equal logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import hugging_face_settings, settings
from torch import Tensor

from lumina.errors import UserError
from lumina.interop.adapters import load
from lumina.interop.peft import export
from lumina.model.feedforward import FeedForward
from lumina.model.lora import adapters
from lumina.model.transformer import Transformer
from lumina.run.folder import Run
from lumina.training.trainer import Trainer

transformers = pytest.importorskip("transformers", reason="installed by `make test`")


def train(folder: Path, kind: str = "dense", **keys: Any) -> Run:
    """A run whose adapters are not zero."""
    own = {"train.steps": 2, "train.lr": 0.03, "train.warmup": 0, "train.lora.rank": 4, "train.compile": "off", **keys}
    return Trainer("tiny", root=folder / "runs", **settings(folder, kind) | own).fit()


def network(ffn: FeedForward, prefix: str) -> dict[str, Tensor]:
    gate, up = ffn.w_gate_up.split(ffn.splits)
    return {
        f"{prefix}gate_proj.weight": gate,
        f"{prefix}up_proj.weight": up,
        f"{prefix}down_proj.weight": ffn.w_down,
    }


def base_weights(model: Transformer) -> dict[str, Tensor]:
    """The frozen weights by their names in transformers."""
    weights = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for layer, block in enumerate(model.units):
        prefix, attn, ffn = f"model.layers.{layer}.", block.attn, block.ffn
        for name, weight in zip("qkv", attn.w_qkv.split(attn.splits), strict=True):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = weight
        weights[f"{prefix}self_attn.o_proj.weight"] = attn.w_out
        weights[f"{prefix}self_attn.q_norm.weight"] = attn.q_norm.weight
        weights[f"{prefix}self_attn.k_norm.weight"] = attn.k_norm.weight
        weights[f"{prefix}input_layernorm.weight"] = block.attn_norm.weight
        weights[f"{prefix}post_attention_layernorm.weight"] = block.ffn_norm.weight
        if isinstance(ffn, FeedForward):
            weights |= network(ffn, f"{prefix}mlp.")
            continue
        weights[f"{prefix}mlp.gate.weight"] = ffn.router.weight
        weights[f"{prefix}mlp.experts.gate_up_proj"] = ffn.w_gate_up
        weights[f"{prefix}mlp.experts.down_proj"] = ffn.w_down
    return {name: weight.detach().clone() for name, weight in weights.items()}


def compare(run: Run, theirs: Any, folder: Path) -> None:
    """Both models compute equal logits, and PEFT found a home for every tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        peft = pytest.importorskip("peft", reason="installed by `make test`")
    model = load(run).transformer
    assert all(named.adapter.b.abs().sum() > 0 for named in adapters(model))
    missing, unexpected = theirs.load_state_dict(base_weights(model), strict=False)
    assert not missing
    assert not unexpected
    ids = torch.randint(0, model.config.vocab, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        without = theirs.eval()(ids).logits
        with warnings.catch_warnings():  # PEFT asks transformers by a name that goes
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            adapted = peft.PeftModel.from_pretrained(theirs, str(folder))
        expected = adapted.eval()(ids).logits
    names = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    written = load_file(folder / "adapter_model.safetensors")
    assert {name.replace(".default.", ".") for name in names} == written.keys()
    assert not torch.allclose(without, expected, atol=1e-3)
    torch.testing.assert_close(model.logits(ids), expected, rtol=1e-5, atol=1e-5)


def test_a_dense_model_with_adapters_is_qwen3_with_peft(tmp_path: Path) -> None:
    run, out = train(tmp_path), tmp_path / "adapter"
    assert export(run, out) == 2
    model = load(run).transformer
    compare(run, transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**hugging_face_settings(model.config))), out)
    said = json.loads((out / "adapter_config.json").read_text())
    assert said["target_modules"] == sorted(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    assert (said["r"], said["lora_alpha"]) == (4, 32)
    with pytest.raises(UserError, match="exists already"):
        export(run, out)


def test_a_moe_with_adapted_attention_is_qwen3_moe_with_peft(tmp_path: Path) -> None:
    own = {"model.moe.shared": 0, "model.moe.dense_layers": 0, "model.moe.score": "softmax"}
    run, out = train(tmp_path, "moe", **own), tmp_path / "adapter"
    export(run, out)
    model = load(run).transformer
    moe = model.config.moe
    assert moe is not None
    config = transformers.Qwen3MoeConfig(
        **hugging_face_settings(model.config),
        moe_intermediate_size=moe.ffn,
        num_experts=moe.experts,
        num_experts_per_tok=moe.top_k,
        norm_topk_prob=moe.normalise,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    compare(run, transformers.Qwen3MoeForCausalLM(config), out)
    said = json.loads((out / "adapter_config.json").read_text())
    assert said["target_modules"] == sorted(f"{name}_proj" for name in "qkvo")


@pytest.mark.parametrize(
    ("kind", "keys", "why"),
    [
        ("mod", {}, "routes tokens by depth"),
        ("hybrid", {}, "routes tokens by depth"),
        ("moe", {"model.moe.shared": 1}, "of shared experts"),
        ("moe", {"model.moe.dense_layers": 1}, "dense layers beside experts"),
        ("dense", {"train.lora.rank": 0}, "has no adapters"),
    ],
)
def test_what_has_no_such_form_is_refused(kind: str, keys: dict[str, Any], why: str, tmp_path: Path) -> None:
    run = train(tmp_path, kind, **keys)
    with pytest.raises(UserError, match=why):
        export(run, tmp_path / "adapter")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("adapter")]
