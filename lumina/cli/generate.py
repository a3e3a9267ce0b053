"""`lumina generate`."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lumina.cli.options import MaxTokens, RunName, Seed, Temperature, TopK, TopP
from lumina.cli.output import Json, print_json, print_piece
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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the text and problems only.")] = False,
    json: Json = False,
) -> None:
    """Continue a prompt with a trained model.

    Uses the newest complete checkpoint of the run, also while it trains, and writes the text as it comes.
    """
    from lumina.run import index

    found = index.find(root, run)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    if json:
        print_json(document(found, prompt, max_tokens, seed, sampling))
    else:
        write(found, prompt, max_tokens, seed, sampling, quiet)


def document(run: Run, prompt: str, max_tokens: int, seed: int, sampling: dict[str, float]) -> dict[str, Any]:
    """The continuation with all that it depends on."""
    from lumina.inference.engine import load

    model = load(run)
    text, reason = _collect(model.stream(prompt, max_tokens, seed=seed, **sampling), lambda piece: None)
    origin = {"run": str(run.path), "step": model.step, "skipped": model.skipped}
    origin["left_out"] = model.left_out(prompt, max_tokens)
    return {**origin, "prompt": prompt, "text": text, "reason": reason, "seed": seed, **sampling}


def write(run: Run, prompt: str, max_tokens: int, seed: int, sampling: dict[str, float], quiet: bool = False) -> None:
    """Streams prompt and continuation to standard output; which checkpoint it was goes to standard error."""
    from lumina.inference.engine import load

    model = load(run)
    for reason in model.skipped:
        typer.echo(f"! skipped {reason}", err=True)
    if not quiet:
        typer.echo(f"step {model.step} of {run.path}", err=True)
    pieces = model.stream(prompt, max_tokens, seed=seed, **sampling)
    if left_out := model.left_out(prompt, max_tokens):
        context = model.transformer.config.seq_len
        typer.echo(f"! the first {left_out} tokens are left out: the context is {context} tokens", err=True)
    print_piece(prompt)
    _, reason = _collect(pieces, print_piece)
    print_piece("\n")
    if reason == "context":
        typer.echo(f"stopped: the context of {model.transformer.config.seq_len} tokens is full", err=True)


def _collect(pieces: Generator[str, None, str], show: Callable[[str], None]) -> tuple[str, str]:
    """The whole text and why it ended; each piece is shown as it comes."""
    text = ""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return text, str(end.value)
        text += piece
        show(piece)
