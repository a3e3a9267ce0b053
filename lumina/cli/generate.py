"""`lumina generate`."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lumina.cli.options import MaxTokens, RunName, Seed, Temperature, TopK, TopP
from lumina.cli.train import Root

if TYPE_CHECKING:
    from lumina.run.folder import Run


def generate(
    run: RunName,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    max_tokens: MaxTokens = 120,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.9,
    seed: Seed = 0,
    root: Root = Path("runs"),
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
