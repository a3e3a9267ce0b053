"""`lumina runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from lumina.cli.output import Json, print_json, print_table
from lumina.cli.train import Root


def runs(root: Root = Path("runs"), json: Json = False) -> None:
    """List the runs, newest first: how far, how good, and whether somebody is at it."""
    from lumina.run.overview import overview

    rows = overview(root)
    if json:
        print_json(rows)
        return
    if not rows:
        typer.echo(f"no runs below {root}; start one: lumina train debug")
        return
    header = ["run", "state", "kind", "step", "done", "loss", "bits per byte", "active", "tokens", "age"]
    whole = [row for row in rows if "problem" not in row]
    if whole:
        print_table(header, [_cells(row) for row in whole], left=3)
    for row in rows:
        if "problem" in row:
            typer.echo(f"! {row['name']} is damaged: {row['problem']}")


def _cells(row: dict[str, Any]) -> list[str]:
    from lumina.telemetry.figures import count, duration

    def shown(key: str, form: str) -> str:
        return "-" if row[key] is None else form.format(float(row[key]))

    steps = row["steps"]
    return [
        row["name"],
        row["state"],
        row["kind"] or "-",
        f"{row['step']}/{steps}" if steps else "-",
        f"{row['step'] / steps:.0%}" if steps else "-",
        shown("loss", "{:.3f}"),
        shown("best_bpb", "{:.3f}"),
        "-" if row["active"] is None else count(row["active"]),
        count(row["tokens"]),
        duration(row["age"]),
    ]
