"""`lumina demo`: the whole path on embedded data, in about two minutes on two cores."""

from __future__ import annotations

from pathlib import Path

import typer

from lumina.cli.train import Fresh, Root, fit

PROMPT = "def read(self"


def demo(fresh: Fresh = False, root: Root = Path("runs")) -> None:
    """Train a small hybrid and complete a prompt.

    The hybrid MoE + MoD is the debug preset; its text is Python's standard library.
    """
    from lumina.cli.generate import write

    run = fit("debug", [], root, fresh)
    typer.echo(f"\nthe model continues {PROMPT!r}:\n")
    write(run, PROMPT, max_tokens=120, temperature=0.8, top_k=0, top_p=0.9, seed=0)
