"""A dense model is Qwen3 and a shared-expert MoE is GLM-4-MoE: their classes compute equal logits from our weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import hugging_face_settings, model_config
from torch import Tensor

from lumina.model.transformer import Block, Transformer

transformers = pytest.importorskip("transformers", reason="installed by `make test`")


def common_weights(block: Block, prefix: str) -> dict[str, Tensor]:
    q, k, v = block.attn.w_qkv.split(block.attn.splits)
    return {
        f"{prefix}input_layernorm.weight": block.attn_norm.weight,
        f"{prefix}post_attention_layernorm.weight": block.ffn_norm.weight,
        f"{prefix}self_attn.q_proj.weight": q,
        f"{prefix}self_attn.k_proj.weight": k,
        f"{prefix}self_attn.v_proj.weight": v,
        f"{prefix}self_attn.o_proj.weight": block.attn.w_out,
        f"{prefix}self_attn.q_norm.weight": block.attn.q_norm.weight,
        f"{prefix}self_attn.k_norm.weight": block.attn.k_norm.weight,
    }


def compare(model: Transformer, theirs: Any, weights: dict[str, Tensor]) -> None:
    weights |= {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    weights["lm_head.weight"] = model.head.weight
    missing, unexpected = theirs.load_state_dict({k: v.detach() for k, v in weights.items()}, strict=False)
    assert not unexpected
    assert not missing
    ids = torch.randint(0, model.config.vocab, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
    torch.testing.assert_close(model.logits(ids), expected, rtol=1e-4, atol=1e-5)


def scrambled(kind: str, **changes: Any) -> Transformer:
    """Weights large enough that a wrong norm, rotation or gate shows."""
    model = Transformer(model_config(kind, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_dense_is_qwen3(tied: bool) -> None:
    model = scrambled("dense", tied=tied)
    weights: dict[str, Tensor] = {}
    for layer, block in enumerate(model.units):
        prefix = f"model.layers.{layer}."
        gate, up = block.ffn.w_gate_up.split(block.ffn.splits)
        weights |= common_weights(block, prefix) | {
            f"{prefix}mlp.gate_proj.weight": gate,
            f"{prefix}mlp.up_proj.weight": up,
            f"{prefix}mlp.down_proj.weight": block.ffn.w_down,
        }
    config = transformers.Qwen3Config(**hugging_face_settings(model.config), attention_bias=False)
    compare(model, transformers.Qwen3ForCausalLM(config), weights)


@pytest.mark.parametrize("normalise", [True, False])
def test_softmax_moe_is_qwen3_moe(normalise: bool) -> None:
    model = scrambled("moe", **{"moe.score": "softmax", "moe.normalise": normalise})
    moe = model.config.moe
    assert moe is not None
    weights: dict[str, Tensor] = {}
    for number, block in enumerate(model.units):
        prefix, ffn = f"model.layers.{number}.", block.ffn
        weights |= common_weights(block, prefix) | {
            f"{prefix}mlp.gate.weight": ffn.router.weight,
            f"{prefix}mlp.experts.gate_up_proj": ffn.w_gate_up,
            f"{prefix}mlp.experts.down_proj": ffn.w_down,
        }
    config = transformers.Qwen3MoeConfig(
        **hugging_face_settings(model.config),
        attention_bias=False,
        moe_intermediate_size=moe.ffn,
        num_experts=moe.experts,
        num_experts_per_tok=moe.top_k,
        norm_topk_prob=normalise,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    compare(model, transformers.Qwen3MoeForCausalLM(config), weights)


def test_shared_expert_moe_is_glm4_moe() -> None:
    model = scrambled("moe", **{"moe.shared": 1})
    moe = model.config.moe
    assert moe is not None
    for layer in model.moes:
        layer.router.bias_E.copy_(torch.linspace(-0.3, 0.3, moe.experts))
    weights: dict[str, Tensor] = {}
    for number, block in enumerate(model.units):
        prefix, ffn = f"model.layers.{number}.", block.ffn
        gate, up = ffn.shared.w_gate_up.split(ffn.shared.splits)
        weights |= common_weights(block, prefix) | {
            f"{prefix}mlp.gate.weight": ffn.router.weight,
            f"{prefix}mlp.gate.e_score_correction_bias": ffn.router.bias_E,
            f"{prefix}mlp.experts.gate_up_proj": ffn.w_gate_up,
            f"{prefix}mlp.experts.down_proj": ffn.w_down,
            f"{prefix}mlp.shared_experts.gate_proj.weight": gate,
            f"{prefix}mlp.shared_experts.up_proj.weight": up,
            f"{prefix}mlp.shared_experts.down_proj.weight": ffn.shared.w_down,
        }
    config = transformers.Glm4MoeConfig(
        **hugging_face_settings(model.config),
        attention_bias=False,
        use_qk_norm=True,
        partial_rotary_factor=1.0,
        moe_intermediate_size=moe.ffn,
        n_routed_experts=moe.experts,
        n_shared_experts=moe.shared,
        num_experts_per_tok=moe.top_k,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        first_k_dense_replace=0,
    )
    config.rope_parameters["partial_rotary_factor"] = 1.0
    compare(model, transformers.Glm4MoeForCausalLM(config), weights)
