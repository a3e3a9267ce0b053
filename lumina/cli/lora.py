"""`lumina lora`: what becomes of adapters once they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lumina.cli.options import RunName
from lumina.cli.output import Json, print_json
from lumina.cli.train import Root


def export(
    run: RunName,
    out: Annotated[Path, typer.Option(help="A new folder for them.")],
    root: Root = Path("runs"),
    json: Json = False,
) -> None:
    """Write a run's adapters as PEFT's files, of its newest complete checkpoint."""
    from lumina.interop import peft
    from lumina.run import index

    found = index.find(root, run)
    step = peft.export(found, out)
    if json:
        print_json({"run": str(found.path), "step": step, "out": str(out)})
        return
    typer.echo(f"{out}: the adapters of {found.path} at step {step}, for PeftModel.from_pretrained(model, '{out}')")


def merge(run: RunName, root: Root = Path("runs"), json: Json = False) -> None:
    """Fold a run's adapters into its weights: a finished run of its own, RUN-merged, without adapters."""
    from lumina.interop.adapters import merge_run
    from lumina.run import index

    found = index.find(root, run)
    merged, step = merge_run(found)
    if json:
        print_json({"run": str(found.path), "step": step, "merged": str(merged.path)})
        return
    typer.echo(f"{merged.path}: {found.path} at step {step}, adapters merged; lumina generate {merged.path} -p TEXT")
