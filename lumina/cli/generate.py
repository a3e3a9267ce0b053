"""`lumina generate`."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lumina.run.folder import Run


def generate(
    run: Annotated[str, typer.Argument(help="A run folder, or its name below --root.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 120,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 0.9,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    root: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
) -> None:
    """Continue a prompt with a trained model.

    Uses the newest complete checkpoint of the run, also while it trains, and writes the text as it comes.
    """
    from lumina.run import index

    write(index.find(root, run), prompt, max_tokens, temperature, top_k, top_p, seed)


def write(run: Run, prompt: str, max_tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """Streams prompt and continuation to standard output; which checkpoint it was goes to standard error."""
    from lumina.inference.engine import load

    model = load(run)
    for reason in model.skipped:
        typer.echo(f"! skipped {reason}", err=True)
    typer.echo(f"step {model.step} of {run.path}", err=True)
    pieces = model.stream(prompt, max_tokens, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
    sys.stdout.write(prompt)
    reason = _print(pieces)
    if reason == "context":
        typer.echo(f"stopped: the context of {model.transformer.config.seq_len} tokens is full", err=True)


def _print(pieces: Generator[str, None, str]) -> str:
    while True:
        try:
            sys.stdout.write(next(pieces))
            sys.stdout.flush()
        except StopIteration as end:
            sys.stdout.write("\n")
            return str(end.value)
