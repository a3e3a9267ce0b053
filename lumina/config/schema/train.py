"""`train`: how long, how large, how fast."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from lumina.config.schema.base import AutoCount, Betas, Count, Number, Problem, Seconds, Section, Span, Text, Tokens
from lumina.config.units import parse_list

Phases = Annotated[tuple["Phase", ...], BeforeValidator(parse_list)]
LENGTHS = ("train.steps", "train.tokens", "train.time")
CHINCHILLA = "chinchilla"  # `tokens`: as many as are compute-optimal for the model


class LoraConfig(Section):
    """`train.lora`: low-rank adapters; everything else rests."""

    rank: Count = Field(0, ge=0, le=2**12, description="of the adapters; 0: train the whole model")
    alpha: Number = Field(32.0, gt=0, description="adapters are scaled by alpha / rank")


class Phase(Section):
    """One entry of `train.phases`."""

    at: Span = Field(0, ge=0, description="share of the run or step at which it begins")
    data: Literal["text", "chat", "both"] = Field("both", description="what it reads")
    lr: Number | None = Field(None, gt=0, description="its peak learning rate; none: `train.lr`")
    warmup: Span | None = Field(None, ge=0, description="share of the phase or steps; none: `train.warmup`")


class TrainConfig(Section):
    """`train`. Exactly one of `steps`, `tokens` and `time` says how long."""

    steps: Count | None = Field(None, ge=1, le=2**53, description="optimizer steps")
    tokens: Tokens | None = Field(
        None, description="trained tokens, such as 2B; chinchilla: as many as are compute-optimal for the model"
    )
    time: Seconds | None = Field(None, gt=0, description="training time in seconds, or as 2h")
    batch_tokens: Count = Field(8192, ge=1, le=2**40, description="tokens of one optimizer step")
    micro_batch: AutoCount = Field("auto", description="sequences computed at once")
    lr: Number = Field(3e-3, gt=0, description="peak learning rate")
    optimizer: Literal["muon", "adamw"] = Field("muon", description="for matrices; the rest is AdamW's")
    schedule: Literal["wsd", "cosine"] = Field("wsd", description="warm-up, then constant and decay, or cosine")
    warmup: Span = Field(0.05, ge=0, description="share of the run (below 1) or steps")
    decay: Span = Field(0.4, ge=0, description="likewise: wsd's final decay; router biases rest in it")
    weight_decay: Number = Field(0.1, ge=0, description="decoupled, on matrices only")
    betas: Betas = Field((0.9, 0.95), description="AdamW's moment decays")
    eps: Number = Field(1e-8, gt=0, description="AdamW's denominator floor")
    clip: Number = Field(1.0, gt=0, description="largest global gradient norm")
    z_loss: Number = Field(1e-4, ge=0, description="weight of the squared log-partition")
    eval_every: Count = Field(0, ge=0, description="steps between evaluations; 0 evaluates at the end only")
    seed: Count = Field(0, ge=0, lt=2**63, description="of weights and data order")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations computed again in the backward pass: memory for time"
    )
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile; auto: if the run is long enough")
    init_from: Text = Field(
        "", description="a run, or one of its checkpoints, whose weights and tokenizer to begin with"
    )
    phases: Phases = Field((), description="parts of the run with their own data, peak and warm-up; first `at` 0")
    lora: LoraConfig = Field(LoraConfig.model_validate({}), description="low-rank adapters")
    deterministic: bool = Field(False, description="refuse non-deterministic kernels (matters on GPUs)")

    @property
    def known_tokens(self) -> int:
        """`tokens`; 0 if they are not given, or not known before the vocabulary is."""
        return self.tokens if isinstance(self.tokens, int) else 0

    def problems(self) -> list[Problem]:
        found = []
        given = [length for length in (self.steps, self.tokens, self.time) if length is not None]
        if len(given) != 1:
            found.append(Problem(LENGTHS, "exactly one of them says how long to train"))
        if isinstance(self.tokens, int) and self.tokens < self.batch_tokens:
            message = f"less than one step; use at least {self.batch_tokens}"
            found.append(Problem(("train.tokens", "train.batch_tokens"), message))
        if self.tokens == CHINCHILLA and (self.lora.rank or self.init_from):
            other = "train.lora.rank" if self.lora.rank else "train.init_from"
            message = "the law is of models trained whole and from the beginning; say how many tokens"
            found.append(Problem(("train.tokens", other), message))
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(Problem(("train.betas",), "both must be at least 0 and below 1"))
        # Under train.time and chinchilla the steps are not known yet: shares alone count, and `settle` checks again.
        steps = self.steps or self.known_tokens / self.batch_tokens
        shares = [span if span < 1 else span / steps if steps else 0 for span in (self.warmup, self.decay)]
        if sum(shares) > 1:
            found.append(Problem(("train.warmup", "train.decay"), "together longer than the run; shorten one"))
        return found
