"""All sections together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lumina.config.schema.base import (
    AutoCount,
    AutoSteps,
    Count,
    Number,
    Problem,
    Seconds,
    Section,
    nearest_divisor,
    nearest_multiple,
)
from lumina.config.schema.data import DataConfig
from lumina.config.schema.model import ModelConfig
from lumina.config.schema.train import TrainConfig
from lumina.config.units import span

MOST_THREADS = 1024  # each takes memory before it works


class PrecisionConfig(Section):
    """`precision`."""

    mode: Literal["auto", "fp32", "bf16", "fp16", "bf16_pure"] = Field(
        "auto", description="of training's matmuls; weights and moments are fp32, but bf16 in bf16_pure"
    )
    eval: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of evaluation's matmuls; auto: as in training"
    )

    def problems(self) -> list[Problem]:
        if self.mode == "bf16_pure" and self.eval not in ("auto", "bf16"):
            keys = ("precision.mode", "precision.eval")
            return [Problem(keys, "weights that are bf16 are evaluated in bf16; use precision.eval=auto")]
        return []


class CheckpointConfig(Section):
    """`checkpoint`."""

    every: AutoSteps = Field(
        0,
        description="steps between checkpoints; auto: from the time that a save takes and `mtbf`; 0: at the end only",
    )
    mtbf: Seconds = Field(86400.0, gt=0, description="mean time between failures that `every=auto` reckons with")
    keep_last: Count = Field(2, ge=1, description="newest checkpoints to keep")
    keep_best: Count = Field(1, ge=1, description="kept besides: those of the lowest comparable held-out loss")
    keep_every: Count = Field(0, ge=0, description="kept besides: every one of a step that this divides; 0: none")
    on_error: Literal["stop", "continue"] = Field(
        "stop", description="when the disk refuses a save: stop, or train on and try again at the next one"
    )
    write: Literal["auto", "inline", "background"] = Field(
        "auto",
        description="inline: steps wait for the files; background: for a copy in memory; auto: as is cheaper here",
    )


class TelemetryConfig(Section):
    """`telemetry`."""

    log_every: Count = Field(10, ge=1, description="steps between console lines")


class TrialConfig(Section):
    """`orchestrator.trial`."""

    budget: Number = Field(
        0.03, ge=0, le=10, description="compute that trials of interventions may take, over that of the planned steps"
    )


class OrchestratorConfig(Section):
    """`orchestrator`."""

    mode: Literal["off", "advise", "act"] = Field(
        "act", description="off: nobody watches; advise: faults are told; act: and met, within bounds"
    )
    probe_every: Count = Field(100, ge=0, description="steps between looks at a fixed piece of held-out text; 0: none")
    snapshot_every: AutoSteps = Field(
        0, description="steps between restore points, of which memory keeps two; auto: 100 if it has room; 0: none"
    )
    trial: TrialConfig = Field(TrialConfig.model_validate({}), description="interventions that prove themselves")


class ParallelConfig(Section):
    """`parallel`."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to compute")
    threads: AutoCount = Field("auto", description="CPU threads")

    def problems(self) -> list[Problem]:
        if isinstance(self.threads, int) and self.threads > MOST_THREADS:
            return [Problem(("parallel.threads",), f"must be at most {MOST_THREADS}")]
        return []


class Config(Section):
    """The whole configuration."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    precision: PrecisionConfig
    orchestrator: OrchestratorConfig
    checkpoint: CheckpointConfig
    telemetry: TelemetryConfig
    parallel: ParallelConfig


def length_problems(model: ModelConfig, train: TrainConfig) -> list[Problem]:
    """The depth of a model has settled before its training ends."""
    steps = train.steps or round(train.known_tokens / train.batch_tokens)  # 0: not known yet
    if not model.mod or not steps or span(model.mod.anneal, steps) < steps:
        return []
    keys = ("model.mod.anneal", "train.tokens" if train.steps is None else "train.steps")
    return [Problem(keys, f"the capacity would not have fallen when training ends; the run has {steps} steps")]


def lora_problems(model: ModelConfig, train: TrainConfig) -> list[Problem]:
    """Adapters of more than the width's rank hold nothing more, and are larger than what they adapt."""
    if train.lora.rank <= model.width:
        return []
    return [Problem(("train.lora.rank", "model.width"), f"no matrix has so high a rank; use at most {model.width}")]


def batch_problems(model: ModelConfig, train: TrainConfig) -> list[Problem]:
    """A batch is whole sequences, a micro-batch divides it; neither is ever rounded silently."""
    sequences, rest = divmod(train.batch_tokens, model.seq_len)
    if rest:
        use = nearest_multiple(train.batch_tokens, model.seq_len)
        keys = ("train.batch_tokens", "model.seq_len")
        return [Problem(keys, f"a batch is whole sequences; use train.batch_tokens={use}")]
    if isinstance(train.micro_batch, int) and sequences % train.micro_batch:
        use = nearest_divisor(train.micro_batch, sequences)
        keys = ("train.micro_batch", "train.batch_tokens")
        return [Problem(keys, f"does not divide the {sequences} sequences of a batch; use {use}")]
    return []
