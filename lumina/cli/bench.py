"""`lumina bench`: what this machine reaches."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from lumina.cli.output import Json, print_json, print_table

Settings = Annotated[list[str] | None, typer.Argument(help="Any training key: precision.mode=fp32 train.compile=on …")]


def speed(
    settings: Settings = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence; a step has eight.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that every kind takes.")] = 10,
    memory: Annotated[bool, typer.Option(help="Measure memory too, each kind in its own process.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder for a dated report: Markdown and JSON.")] = None,
    json: Json = False,
) -> None:
    """Training speed of dense, MoE, MoD and hybrid at benchmark shape P, side by side on this machine.

    The kinds take turns, and their ratios are of the same turns: other work on the machine slows all of them.
    """
    from lumina.bench import harness, report
    from lumina.bench import speed as shape
    from lumina.config.resolve import resolve
    from lumina.telemetry.console import Console
    from lumina.training.precision import DTYPES

    keys = {key: value for key, value in resolve("debug", settings or []).request.items() if key != "preset"}
    config = shape.configure("dense", seq_len, keys)
    arms = shape.suite(seq_len=seq_len, keys=keys)
    console = Console(1, quiet=json)
    with console:
        taken = (
            harness.memory_of(
                shape.suite, [arm.name for arm in arms], progress=console.progress, seq_len=seq_len, keys=keys
            )
            if memory
            else {}
        )
        measured = harness.measure(
            arms, rounds, device=config.parallel.device, dtype=DTYPES[config.precision.mode], memory=taken,
            progress=console.progress, settings=keys, seq_len=seq_len,
        )  # fmt: skip
    if out:
        heading = f"Shape P, {seq_len} tokens a sequence"
        parts = (shape.FORWARD_BACKWARD, shape.OPTIMIZER)
        page = report.markdown("Training speed of four kinds", {heading: (measured, "dense", parts)})
        path = report.write(out, time.strftime("%Y-%m-%d"), page, {heading: measured})
    if json:
        print_json(measured.as_json())
        return
    print_table(*report.rows(measured, "dense", (shape.FORWARD_BACKWARD, shape.OPTIMIZER)))
    typer.echo(f"\n{report.circumstances(measured.about)}; {report.ceilings(measured)}")
    if out:
        typer.echo(f"wrote  {path} and .json")
