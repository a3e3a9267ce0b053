"""`data`: what the model reads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lumina.config.schema.base import Bytes, Count, Name, Number, Paths, Problem, Section, Span
from lumina.config.weights import split_weight

Mode = Literal["base", "finetune", "hybrid_sequential", "hybrid_interleaved"]


class QualityConfig(Section):
    """`data.quality`: which documents are removed; every limit is off at 0, its default."""

    exact: bool = Field(False, description="whether a document that was there before is removed")
    near: Number = Field(
        0.0, ge=0, le=1, description="similarity (Jaccard, of five-word pieces) from which a later document is removed"
    )
    repetition: Number = Field(
        0.0, ge=0, le=1, description="largest share of a text's characters in repeated lines or five-word pieces"
    )
    symbols: Number = Field(
        0.0, ge=0, le=1, description="largest share of characters that are no letter, digit or space"
    )
    min_chars: Count = Field(0, ge=0, description="fewest characters of a document")

    @property
    def active(self) -> bool:
        return self.exact or any((self.near, self.repetition, self.symbols, self.min_chars))


class CurriculumConfig(Section):
    """`data.curriculum`: easy text first, by the difficulty that `lumina data difficulty` wrote into shards."""

    until: Span = Field(0, ge=0, description="share of the run or steps until all data is in use; 0: off")
    start: Number = Field(0.1, gt=0, le=1, description="share of the data, the easiest, to begin with")


class DataConfig(Section):
    """`data`. Paths are relative to where the command runs."""

    train: Paths = Field(
        ("sample",),
        min_length=1,
        description="files, globs, folders, each with `:weight` or none; `sample`, `sample_chat`",
    )
    eval: Paths = Field((), description="held-out files; empty holds a part of `train` back")
    mode: Mode = Field("base", description="texts, conversations (finetune), one after the other, or both at once")
    base_ratio: Number = Field(
        0.7, gt=0, lt=1, description="share of texts: of the sequences, or of the run in hybrid_sequential"
    )
    train_on: Literal["assistant", "all"] = Field("assistant", description="which turns of conversations count")
    tokenizer: Name = Field("bpe", description="`bpe` trains one on the data; or a tokenizer.json")
    skip_bad: Count = Field(0, ge=0, description="records that may be unreadable; they are left out and listed")
    buffer: Bytes = Field(1 << 22, ge=1 << 16, description="bytes of text that are encoded at once")
    quality: QualityConfig = Field(QualityConfig.model_validate({}), description="which documents are removed")
    curriculum: CurriculumConfig = Field(CurriculumConfig.model_validate({}), description="easy text first")

    @property
    def kinds(self) -> frozenset[str]:
        """What the mode reads, of `text` and `chat`."""
        return frozenset({"base": ["text"], "finetune": ["chat"]}.get(self.mode, ["text", "chat"]))

    def problems(self) -> list[Problem]:
        found = []
        weights = [split_weight(spec)[1] for spec in self.train]
        if None in weights and any(weight is not None for weight in weights):
            found.append(Problem(("data.train",), "give every source a weight, or none"))
        if any(weight == 0 for weight in weights):
            found.append(Problem(("data.train",), "a weight is more than 0; leave out what is not wanted"))
        if any(split_weight(spec)[1] is not None for spec in self.eval):
            found.append(Problem(("data.eval",), "everything held out is evaluated once; leave the weights out"))
        return found
