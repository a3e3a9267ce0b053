"""The dotted keys of the schema, and what somebody who wrote another name probably meant."""

from __future__ import annotations

import difflib
import typing
from functools import cache

from pydantic import BaseModel

from lumina.config.schema.config import Config

# What other frameworks call our keys.
ALIASES = {
    "learning_rate": "train.lr",
    "max_lr": "train.lr",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "iters": "train.steps",
    "max_iters": "train.steps",
    "warmup_steps": "train.warmup",
    "batch_size": "train.batch_tokens",
    "global_batch_size": "train.batch_tokens",
    "micro_batch_size": "train.micro_batch",
    "grad_clip": "train.clip",
    "max_grad_norm": "train.clip",
    "optim": "train.optimizer",
    "lr_scheduler": "train.schedule",
    "hidden_size": "model.width",
    "d_model": "model.width",
    "n_embd": "model.width",
    "dim": "model.width",
    "n_layer": "model.layers",
    "n_layers": "model.layers",
    "num_layers": "model.layers",
    "num_hidden_layers": "model.layers",
    "n_head": "model.heads",
    "n_heads": "model.heads",
    "num_heads": "model.heads",
    "num_attention_heads": "model.heads",
    "num_key_value_heads": "model.kv_heads",
    "n_kv_heads": "model.kv_heads",
    "intermediate_size": "model.ffn",
    "vocab_size": "model.vocab",
    "context_length": "model.seq_len",
    "block_size": "model.seq_len",
    "max_seq_len": "model.seq_len",
    "sequence_length": "model.seq_len",
    "tie_word_embeddings": "model.tied",
    "num_experts": "model.moe.experts",
    "num_experts_per_tok": "model.moe.top_k",
    "dataset": "data.train",
    "save_every": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "eval_steps": "train.eval_every",
    "dtype": "precision.mode",
    "device": "parallel.device",
}


def section_of(annotation: object) -> type[BaseModel] | None:
    """The section class inside an annotation such as `MoEConfig | None`."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


@cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key that the schema knows, in its order."""

    def walk(section: type[BaseModel], prefix: str) -> list[str]:
        keys: list[str] = []
        for name, field in section.model_fields.items():
            inner = section_of(field.annotation)
            keys += walk(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
        return keys

    return tuple(walk(Config, ""))


def suggestion(key: str) -> str:
    """` (did you mean train.lr?)`, or nothing."""
    last = key.rpartition(".")[2].replace("-", "_").lower()
    if last in ALIASES:
        return f" (did you mean {ALIASES[last]}?)"
    same = [known for known in known_keys() if known.rpartition(".")[2] == last]
    close = same or difflib.get_close_matches(key, known_keys(), n=2, cutoff=0.75)
    if not close:
        by_last = {known.rpartition(".")[2]: known for known in known_keys()}
        close = [by_last[name] for name in difflib.get_close_matches(last, by_last, n=2, cutoff=0.7)]
    return f" (did you mean {' or '.join(close)}?)" if close else ""
