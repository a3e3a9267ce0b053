"""`lumina demo`: the whole path on embedded data, in about two minutes on two cores."""

from __future__ import annotations

from pathlib import Path

import typer

from lumina.cli.train import Fresh, Root, fit

PROMPT = "def main("


def demo(fresh: Fresh = False, root: Root = Path("runs")) -> None:
    """Train the debug preset, a hybrid MoE + MoD, on Python's standard library, then complete a prompt."""
    from lumina.cli.generate import write

    run = fit("debug", [], root, fresh)
    typer.echo(f"\nthe model continues {PROMPT!r}:\n")
    write(run, PROMPT, max_tokens=120, temperature=0.5, top_k=0, top_p=0.9, seed=0)
