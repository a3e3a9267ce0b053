"""All sections together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lumina.config.schema.base import Count, Number, Section
from lumina.config.schema.data import DataConfig
from lumina.config.schema.model import ModelConfig
from lumina.config.schema.train import TrainConfig


class PrecisionConfig(Section):
    """`precision`."""

    mode: Literal["auto", "fp32", "bf16"] = Field("auto", description="of matmuls; weights are always fp32")


class CheckpointConfig(Section):
    """`checkpoint`."""

    every: Count = Field(0, ge=0, description="steps between checkpoints; 0 saves at the end only")
    keep_last: Count = Field(2, ge=1, description="newest checkpoints to keep; the best is kept besides")


class TelemetryConfig(Section):
    """`telemetry`."""

    log_every: Count = Field(10, ge=1, description="steps between console lines")


class ParallelConfig(Section):
    """`parallel`."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to compute")
    threads: Count | Literal["auto"] = Field("auto", description="CPU threads")

    def problems(self) -> list[str]:
        if isinstance(self.threads, int) and self.threads < 1:
            return [f"parallel.threads={self.threads}: use auto, or 1 or more"]
        return []


class Config(Section):
    """The whole configuration."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    precision: PrecisionConfig
    checkpoint: CheckpointConfig
    telemetry: TelemetryConfig
    parallel: ParallelConfig

    def problems(self) -> list[str]:
        """Problems across sections; each section's own are found before."""
        model, train = self.model, self.train
        if train.batch_tokens % model.seq_len:
            below = train.batch_tokens // model.seq_len * model.seq_len
            near = [str(n) for n in (below, below + model.seq_len) if n]
            return [
                f"train.batch_tokens={train.batch_tokens}: not a multiple of model.seq_len={model.seq_len}; "
                f"use {' or '.join(near)}"
            ]
        sequences = train.batch_tokens // model.seq_len
        if isinstance(train.micro_batch, int) and sequences % train.micro_batch:
            fits = ", ".join(str(n) for n in range(1, sequences + 1) if sequences % n == 0)
            return [
                f"train.micro_batch={train.micro_batch}: does not divide the {sequences} sequences of a batch; "
                f"use one of {fits}"
            ]
        return []


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation  # type: ignore[misc]
    for name, field in Config.model_fields.items()
}
