"""The dotted keys of the schema, and what somebody who wrote another name probably meant."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from functools import cache

from lumina.config.schema.base import Section
from lumina.config.schema.config import Config
from lumina.config.schema.model import KINDS, KINDS_OF

# What other frameworks call our keys.
ALIASES = {
    "train.steps": "max_steps num_steps total_steps iters max_iters epochs num_epochs num_train_epochs",
    "train.tokens": "max_tokens num_tokens total_tokens",
    "train.time": "max_time max_duration",
    "train.lr": "learning_rate max_lr peak_lr",
    "train.warmup": "warmup_steps warmup_iters warmup_ratio",
    "train.decay": "decay_steps lr_decay_iters cooldown",
    "train.batch_tokens": "batch_size global_batch_size total_batch_size train_batch_size",
    "train.micro_batch": "micro_batch_size device_batch_size per_device_train_batch_size",
    "train.clip": "grad_clip gradient_clipping max_grad_norm clip_grad",
    "train.optimizer": "optim",
    "train.schedule": "lr_scheduler lr_scheduler_type scheduler",
    "train.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "train.eps": "epsilon adam_epsilon",
    "train.eval_every": "eval_steps eval_interval",
    "model.width": "hidden_size d_model n_embd dim embed_dim hidden_dim",
    "model.layers": "n_layer n_layers num_layers num_hidden_layers depth",
    "model.heads": "n_head n_heads num_heads num_attention_heads",
    "model.kv_heads": "n_kv_head n_kv_heads num_kv_heads num_key_value_heads",
    "model.ffn": "intermediate_size ffn_dim d_ff mlp_dim",
    "model.vocab": "vocab_size",
    "model.seq_len": "context_length block_size max_seq_len max_seq_length sequence_length max_length",
    "model.tied": "tie_word_embeddings tie_embeddings",
    "model.moe.experts": "num_experts n_experts num_local_experts n_routed_experts",
    "model.moe.top_k": "moe_top_k num_experts_per_tok",
    "model.moe.ffn": "moe_intermediate_size",
    "model.moe.score": "scoring_func score_function router_score",
    "model.moe.normalise": "normalize norm_topk_prob",
    "model.moe.balance": "router_aux_loss_coef aux_loss_coef load_balancing_weight",
    "model.moe.z_loss": "router_z_loss_coef",
    "model.moe.capacity": "moe_capacity_factor",
    "model.moe.dense_layers": "first_k_dense_replace",
    "model.moe.dropout": "expert_dropout",
    "model.moe.shared": "n_shared_experts num_shared_experts",
    "model.mod.capacity": "mod_capacity capacity_factor",
    "data.train": "dataset datasets train_data data_path train_file",
    "data.eval": "eval_data val_data validation eval_dataset eval_file",
    "checkpoint.every": "save_every save_steps save_interval",
    "checkpoint.keep_last": "save_total_limit",
    "telemetry.log_every": "logging_steps log_interval",
    "precision.mode": "dtype precision mixed_precision",
    "parallel.threads": "num_threads",
}


def sections(section: type[Section] = Config) -> dict[str, type[Section]]:
    """The sections directly inside a section, by name."""
    found = {}
    for name, field in section.model_fields.items():
        optional = isinstance(field.annotation, types.UnionType)  # `MoEConfig | None`; a list of sections is a value
        for candidate in typing.get_args(field.annotation) if optional else (field.annotation,):
            if isinstance(candidate, type) and issubclass(candidate, Section):
                found[name] = candidate
    return found


@cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key that the schema knows, in its order."""

    def walk(section: type[Section], prefix: str) -> Iterator[str]:
        inner = sections(section)
        for name in section.model_fields:
            if name in inner:
                yield from walk(inner[name], f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    return tuple(walk(Config, ""))


@cache
def known_sections() -> frozenset[str]:
    """`train`, `model`, `model.moe`, …"""
    return frozenset(key.rpartition(".")[0] for key in known_keys())


def kinds_of(key: str) -> tuple[str, ...]:
    """The kinds of model that have a use for a key."""
    section, part = f"{key}.".split(".")[:2]
    return KINDS_OF.get(part, KINDS) if section == "model" else KINDS


def suggestion(key: str) -> str:
    """`; did you mean train.lr?`, or nothing."""
    name = key.lower().replace("-", "_")
    close = _same_end(name) or _alias(name) or _similar(name)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _same_end(name: str) -> list[str]:
    """Keys with the longest common end: `moe.ffn` ends as `model.moe.ffn` does."""
    parts = name.split(".")
    for start in range(len(parts)):
        end = ".".join(parts[start:])
        if found := [known for known in known_keys() if f".{known}".endswith(f".{end}")]:
            return difflib.get_close_matches(name, found, n=1, cutoff=0.8) or found
    return []


def _alias(name: str) -> list[str]:
    last = name.rpartition(".")[2]
    return [key for key, aliases in ALIASES.items() if last in aliases.split()]


def _similar(name: str) -> list[str]:
    if close := difflib.get_close_matches(name, known_keys(), n=2, cutoff=0.8):
        return close
    meaning = {known.rpartition(".")[2]: known for known in reversed(known_keys())}
    meaning |= {alias: known for known, aliases in ALIASES.items() for alias in aliases.split()} | meaning
    names = difflib.get_close_matches(name.rpartition(".")[2], meaning, n=2, cutoff=0.75)
    return list(dict.fromkeys(meaning[close] for close in names))
