"""`lumina plan`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lumina.cli.output import Json, print_json
from lumina.cli.train import Root

if TYPE_CHECKING:
    from lumina.planner.plan import Plan

Text = str | None


def plan(
    source: Annotated[
        str | None, typer.Argument(help="A preset, a YAML file, or a run to hold its plan against.", show_default=False)
    ] = None,
    settings: Annotated[list[str] | None, typer.Argument(help="key=value …", show_default=False)] = None,
    data: Annotated[list[str] | None, typer.Option(help="What it reads, as data.train.", show_default=False)] = None,
    time: Annotated[Text, typer.Option(help="How long it may train: 24h.", show_default=False)] = None,
    gpus: Annotated[Text, typer.Option(help="8xH100, not this machine.", show_default=False)] = None,
    peak_tflops: Annotated[
        Text, typer.Option(help="Of --gpus that are not known: dense bf16 TFLOP/s of one.", show_default=False)
    ] = None,
    mem: Annotated[Text, typer.Option(help="Likewise: its memory, 64GiB or 64GB.", show_default=False)] = None,
    tokens_available: Annotated[Text, typer.Option(help="Tokens there are: 20B.", show_default=False)] = None,
    compute: Annotated[Text, typer.Option(help="FLOPs there are: 1e20.", show_default=False)] = None,
    params: Annotated[Text, typer.Option(help="Active parameters: 1B.", show_default=False)] = None,
    tokens: Annotated[Text, typer.Option(help="Tokens to train on: 20B.", show_default=False)] = None,
    budget: Annotated[Text, typer.Option(help="Money there is, with --price.", show_default=False)] = None,
    price: Annotated[Text, typer.Option(help="Of an hour of one device.", show_default=False)] = None,
    kind: Annotated[Text, typer.Option(help="dense, moe, mod or hybrid.", show_default=False)] = None,
    law: Annotated[Text, typer.Option(help="The scaling law, besiroglu by default.", show_default=False)] = None,
    inference_tokens: Annotated[
        Text, typer.Option(help="Tokens it will read and write in use: 1T.", show_default=False)
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time 20 real steps here, and keep the result.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the configuration.", show_default=False)] = None,
    root: Root = Path("runs"),
    json: Json = False,
) -> None:
    """Does it fit, how long does it take, how many tokens, what loss: before the run, and after it was that right.

    Without a preset the model follows from what is known: parameters, tokens, and compute, time or a budget.
    """
    from lumina import planning

    if source is not None and "=" in source:
        settings, source = [source, *(settings or [])], None
    known: dict[str, Any] = {
        "params": params, "tokens": tokens, "compute": compute, "time": time, "budget": budget, "price": price,
        "tokens_available": tokens_available, "inference_tokens": inference_tokens, "kind": kind, "law": law,
        "peak_tflops": peak_tflops, "mem": mem,
    }  # fmt: skip
    run = planning.run_called(source, root)
    if run is not None:
        beside = known | {"data": data, "gpus": gpus, "out": out}
        given = [f"--{name.replace('_', '-')}" for name, value in beside.items() if value is not None]
        planning.require_alone(run, [*(settings or []), *given, *(["--measure"] if measure else [])])
        _compare(run.path, json)
        return
    made = planning.plan(source, settings or [], data=data, gpus=gpus, measure=measure, progress=_tell, **known)
    text = planning.configuration(made)
    if out is not None:
        planning.write_configuration(text, out)
    if json:
        print_json(made.as_json() | {"config": text})
        return
    _print(made, out)


def _print(made: Plan, out: Path | None) -> None:
    from lumina.cli.plan_page import lines
    from lumina.planning import next_command

    for line in lines(made):
        typer.echo(line)
    command = next_command(made, out)
    typer.echo(f"next   {command}")
    if " HOST:" in command:
        machines = made.fleet.machines
        typer.echo(f"       on each of the {machines} machines, of which HOST is one; nobody has tried several yet")


def _compare(run: Path, json: bool) -> None:
    from lumina.planner import actual

    comparison = actual.compare(run)
    if json:
        print_json(comparison.as_json())
        return
    for line in comparison.lines():
        typer.echo(line)


def _tell(what: str, done: int, total: int) -> None:
    """How far `--measure` is: it takes its time, and standard output is the plan's."""
    print(f"{what} …", file=sys.stderr)
