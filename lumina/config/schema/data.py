"""`data`: what the model reads."""

from __future__ import annotations

from pydantic import Field

from lumina.config.schema.base import Name, Paths, Section


class DataConfig(Section):
    """`data`. Paths are relative to where the command runs."""

    train: Paths = Field(("sample",), min_length=1, description="files, globs, folders; `sample` is embedded")
    eval: Paths = Field((), description="held-out files; empty holds a part of `train` back")
    tokenizer: Name = Field("bpe", description="`bpe` trains one on the data; or a tokenizer.json")
