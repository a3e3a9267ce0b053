"""From a request to the parts of a run: data prepared, machine-dependent choices settled, model and optimizer built.

Everything that can be wrong with the input is found here, before a run folder exists.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from lumina.config.resolve import Resolved, settle
from lumina.config.schema.config import Config
from lumina.data.loader import Loader
from lumina.data.shards import Corpus, prepare
from lumina.errors import UserError
from lumina.model import cost
from lumina.model.transformer import Transformer
from lumina.training import machine
from lumina.training.optim import Optimizer
from lumina.training.precision import Precision
from lumina.training.step import Step, train_step

VOCAB_MULTIPLE = 64  # rows of the embedding: matmuls like round numbers
DEADLINE_STEPS = 5  # steps timed to turn `train.time` into steps
DEADLINE_RESERVE = 0.05  # of the time, kept for evaluations and checkpoints


@dataclass
class Parts:
    """A run, ready to step."""

    config: Config
    corpus: Corpus
    model: Transformer
    optimizer: Optimizer
    loader: Loader
    precision: Precision
    plan: Step
    cost: cost.Cost

    @property
    def steps(self) -> int:
        assert self.config.train.steps is not None  # settled
        return self.config.train.steps


def load_data(config: Config, tokenizer: str | None = None) -> Corpus:
    """The corpus of `config.data`; `tokenizer` (a run's own) replaces the configured one."""
    return prepare(
        train=config.data.train,
        eval=config.data.eval,
        tokenizer=tokenizer or config.data.tokenizer,
        vocab=config.model.vocab,
        seq_len=config.model.seq_len,
    )


def settle_all(resolved: Resolved, corpus: Corpus) -> Resolved:
    """Settles vocabulary, device, precision, kernel, micro-batch and steps for this machine and this data."""
    resolved = settle(resolved, _vocab_choice(resolved, corpus) | machine.choose(resolved.config))
    seconds = resolved.config.train.time
    if seconds is None:
        return resolved
    # One step stands in until the step time is known.
    trial = settle(resolved, {"train.steps": (10**6, "trial")})
    step_time = _measure_step_time(build(trial.config, corpus))
    steps = max(1, int(seconds * (1 - DEADLINE_RESERVE) / step_time))
    return settle(resolved, {"train.steps": (steps, f"train.time={seconds:g}s at {step_time:.3f}s a step")})


def build(config: Config, corpus: Corpus) -> Parts:
    """Model, optimizer and loader of a settled configuration, freshly initialised."""
    threads = config.parallel.threads
    torch.set_num_threads(int(threads))
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(config.train.deterministic)
    model = Transformer(config.model, config.train.seed).to(config.parallel.device)
    sequences = config.train.batch_tokens // config.model.seq_len
    return Parts(
        config=config,
        corpus=corpus,
        model=model,
        optimizer=Optimizer(model, config.train),
        loader=Loader(corpus.train, config.model.seq_len, sequences, config.train.seed, corpus.tokenizer.end_id),
        precision=Precision(config.precision.mode, config.parallel.device),
        plan=Step(
            micro_batches=sequences // int(config.train.micro_batch),
            clip=config.train.clip,
            z_loss=config.train.z_loss,
            bias_rate=config.model.moe.bias_rate if config.model.moe else 0.0,
        ),
        cost=cost.count(config.model),
    )


def _vocab_choice(resolved: Resolved, corpus: Corpus) -> machine.Choices:
    """A foreign tokenizer sets the preset's vocabulary; a vocabulary that the user chose must hold it."""
    have, need = resolved.config.model.vocab, corpus.tokenizer.vocab_size
    if resolved.config.data.tokenizer == "bpe":
        return {}
    if resolved.origins["model.vocab"].startswith(("preset", "default")):
        rounded = -(-need // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        return {"model.vocab": (rounded, f"{need} tokens of {resolved.config.data.tokenizer}, rounded up")}
    if have < need:
        raise UserError(
            f"model.vocab={have} is smaller than the tokenizer {resolved.config.data.tokenizer}: {need} tokens",
            fix=f"leave model.vocab out, or set it to {need} or more",
        )
    return {}


def _measure_step_time(parts: Parts) -> float:
    """Median seconds of a training step, on throw-away weights."""
    times = []
    for i in range(DEADLINE_STEPS + 1):
        batch = parts.loader.batch(i)
        start = time.perf_counter()
        train_step(parts.model, parts.optimizer, batch, 0.0, parts.plan, parts.precision, freeze_bias=True).tolist()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def description(parts: Parts) -> dict[str, Any]:
    """What a reader of the run's events wants to know first."""
    config, corpus = parts.config, parts.corpus
    return {
        "kind": config.model.kind,
        "steps": parts.steps,
        "batch_tokens": config.train.batch_tokens,
        "params": parts.cost.total,
        "active": parts.cost.active,
        "active_mean": parts.cost.active_mean,
        "flops_per_token": parts.cost.flops_per_token,
        "layers": config.model.layers,
        "experts": config.model.moe.experts if config.model.moe else 0,
        "seed": config.train.seed,
        "device": config.parallel.device,
        "threads": config.parallel.threads,
        "precision": config.precision.mode,
        "vocab": config.model.vocab,
        "data": corpus.facts,
    }
