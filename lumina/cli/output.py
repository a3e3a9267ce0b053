"""How verbs answer: aligned columns for people, one JSON document for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lumina.standard import lasting
from lumina.visible import visible

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def say(line: str, err: bool = False) -> None:
    """A line for whoever listens, which nobody has to: for what does not end when its reader goes away."""
    with lasting(sys.stderr if err else sys.stdout):
        typer.echo(line, err=err)


def print_json(value: Any, indent: int | None = 2) -> None:
    """One document on standard output. What UTF-8 does not know, bytes of file names, becomes a question mark."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    typer.echo(text.encode("utf-8", "replace").decode())


def print_piece(text: str) -> None:
    """Text of a model or for it, as it comes; a terminal is not sent control characters."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Columns as wide as their content, never cut or wrapped; the first `left` ones are flush left, the rest right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())
