"""`train`: how long, how large, how fast."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lumina.config.schema.base import Count, Number, Seconds, Section

Beta = Annotated[Number, Field(ge=0, lt=1)]
LENGTHS = ("steps", "tokens", "time")


class TrainConfig(Section):
    """`train`. Exactly one of `steps`, `tokens` and `time` says how long."""

    steps: Count | None = Field(None, ge=1, description="optimizer steps")
    tokens: Count | None = Field(None, ge=1, description="trained tokens, such as 2B")
    time: Seconds | None = Field(None, gt=0, description="training time in seconds, or 2h")
    batch_tokens: Count = Field(8192, ge=1, description="tokens of one optimizer step")
    micro_batch: Count | Literal["auto"] = Field("auto", description="sequences computed at once")
    lr: Number = Field(3e-3, gt=0, description="peak learning rate")
    optimizer: Literal["muon", "adamw"] = Field("muon", description="for matrices; the rest is AdamW's")
    schedule: Literal["wsd", "cosine"] = Field("wsd", description="warm-up, constant, linear decay; or cosine")
    warmup: Number = Field(0.05, ge=0, description="share of the run (below 1) or steps")
    decay: Number = Field(0.4, ge=0, description="final decay of wsd: share of the run (below 1) or steps")
    weight_decay: Number = Field(0.1, ge=0, description="decoupled, on matrices only")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's moment decays")
    eps: Number = Field(1e-8, gt=0, description="AdamW's denominator floor")
    clip: Number = Field(1.0, gt=0, description="largest global gradient norm")
    z_loss: Number = Field(1e-4, ge=0, description="weight of the squared log-partition")
    eval_every: Count = Field(0, ge=0, description="steps between evaluations; 0 evaluates at the end only")
    seed: Count = Field(0, ge=0, description="of weights and data order")
    deterministic: bool = Field(False, description="refuse non-deterministic kernels (matters on GPUs)")

    def problems(self) -> list[str]:
        found = []
        given = [key for key in LENGTHS if getattr(self, key) is not None]
        if len(given) != 1:
            what = " and ".join(f"train.{key}" for key in given) or "none"
            found.append(f"train.steps, train.tokens, train.time: {what} given; give exactly one")
        if isinstance(self.micro_batch, int) and self.micro_batch < 1:
            found.append(f"train.micro_batch={self.micro_batch}: use auto, or 1 or more sequences")
        for key in ("warmup", "decay"):
            value = getattr(self, key)
            if value >= 1 and value != round(value):
                found.append(f"train.{key}={value}: use a share below 1, or whole steps")
        return found + self._phase_problems()

    def _phase_problems(self) -> list[str]:
        steps = self.steps or (self.tokens // self.batch_tokens if self.tokens else None)
        shares = [value if value < 1 else (value / steps if steps else 0.0) for value in (self.warmup, self.decay)]
        if self.schedule == "cosine":
            shares.pop()
        if sum(shares) <= 1:
            return []
        return [f"train.warmup={self.warmup:g}, train.decay={self.decay:g}: together longer than the run; shorten one"]
