"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

RunName = Annotated[str, typer.Argument(help="A run folder, or its name below --root.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same text.")]
