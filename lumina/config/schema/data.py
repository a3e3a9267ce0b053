"""`data`: what the model reads."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from lumina.config.schema.base import Section


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(_as_list)]


class DataConfig(Section):
    """`data`."""

    train: Paths = Field(["sample"], min_length=1, description="files, globs or folders; `sample` is the embedded corpus")
    eval: Paths = Field([], description="held-out files; empty holds a part of `train` back")
    tokenizer: str = Field("bpe", min_length=1, description="`bpe` trains one on the data; or a tokenizer.json")
