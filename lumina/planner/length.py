"""How long a run should be for its model, and how often it reads its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumina.config.schema.config import Config
from lumina.model.cost import count
from lumina.planner import repeated
from lumina.planner.laws import Interval, Law, law, params_of
from lumina.planner.traits import mismatch

WORDS = {"total": "all", "non_embedding": "without embeddings", "active": "active"}


def optimal_tokens(config: Config, scaling: Law | None = None) -> Interval:
    """The tokens with which this model is the optimum of its compute, by the user's own law or the default."""
    scaling = scaling or law()
    params = params_of(count(config.model), scaling)
    return scaling.interval(lambda one: one.tokens_for(params))


def optimal_length(config: Config, unique: int) -> dict[str, tuple[Any, str]]:
    """`train.steps` for `train.tokens=chinchilla`, with the reason, for `config.resolve.settle`.

    `unique` tokens of data are read as often as it takes: no law makes a run longer or shorter than the optimum.
    """
    scaling = law()
    params, tokens = params_of(count(config.model), scaling), optimal_tokens(config, scaling).mid
    steps = max(1, round(tokens / config.train.batch_tokens))
    epochs = steps * config.train.batch_tokens / unique
    why = (
        f"train.tokens=chinchilla: {tokens:.4g} tokens, {tokens / params:.3g} for each of {params:.4g} parameters "
        f"({WORDS[scaling.counts]}), are the optimum by {scaling.name}; to the nearest step, {epochs:.3g} epochs"
    )
    if other := mismatch(scaling, config):
        why += f"; {other}"
    return {"train.steps": (steps, why)}


def repetition(unique: int, tokens: int, sources: Mapping[str, float]) -> dict[str, Any]:
    """How many epochs of `unique` tokens a run of `tokens` is, what a token is worth then, and warnings.

    `sources` are the epochs of each source; one that is read more often than the whole is warned of by name.
    """
    epochs = tokens / unique
    told = repeated.warnings(unique, tokens)
    most = max(sources, key=lambda name: sources[name], default="")
    if len(sources) > 1 and sources[most] > max(epochs, repeated.NEARLY_FREE):
        told += [f"of {most}: {line}" for line in repeated.warnings(1, sources[most])]
    return {"epochs": round(epochs, 4), "worth": round(repeated.epoch_value(max(1.0, epochs)), 4), "warnings": told}
