"""`lumina chat`."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lumina.cli.options import MaxTokens, RunName, Seed, Temperature, TopK, TopP
from lumina.cli.output import Json, print_json, print_piece
from lumina.cli.train import Root
from lumina.errors import UserError


def chat(
    run: RunName,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this once and exit.")] = None,
    max_tokens: MaxTokens = 120,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.9,
    seed: Seed = 0,
    root: Root = Path("runs"),
    json: Json = False,
) -> None:
    """Talk with a trained model, line by line.

    A model that was trained on conversations answers. Any other continues one growing text, to which each line that you
    write is appended. Uses the newest complete
    checkpoint of the run, also while it trains. /help lists the commands. Reads a pipe, too: the model's text goes
    to standard output, all else to standard error.
    """
    if json and prompt is None:
        raise UserError("--json needs a prompt", fix="add -p TEXT")
    from lumina.inference.chat import Chat, introduction, notes
    from lumina.inference.conversation import Conversation
    from lumina.inference.engine import load
    from lumina.inference.sampler import Sampler
    from lumina.run import index

    sampler, found = Sampler(temperature, top_k, top_p), index.find(root, run)
    model = load(found)
    conversation = Conversation(model, sampler, max_tokens, seed)
    if prompt is None:
        Chat(found, conversation, _reader(), print_piece, _say, sys.stdin.isatty()).loop()
    elif json:
        answer = conversation.answer(prompt, lambda piece: None)
        origin = {"run": str(found.path), "step": model.step, "skipped": model.skipped, "prompt": prompt}
        print_json(origin | asdict(answer))
    else:
        for line in introduction(found, model):
            _say(line)
        answer = conversation.answer(prompt, print_piece)
        print_piece("\n")
        for note in notes(answer, conversation):
            _say(note)


def _reader() -> Callable[[], str]:
    """Reads a line: at a terminal after a prompt, and editable where Python has readline."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the model's encoder says where a line is not UTF-8
    if not sys.stdin.isatty():
        return input
    with suppress(ImportError):
        import readline  # noqa: F401  # `input` uses it
    return lambda: input("> " if sys.stdout.isatty() else "")


def _say(line: str) -> None:
    typer.echo(line, err=True)
