"""`lumina act`, `lumina undo` and `lumina decisions`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lumina.cli.options import RunName
from lumina.cli.output import Json, print_json, print_table
from lumina.cli.train import Root

if TYPE_CHECKING:
    from lumina.byhand import OpenRun
    from lumina.orchestrator.actions import Request


def act(
    run: RunName,
    action: Annotated[
        str, typer.Argument(help="What to do, as name or name=value; without it, what there is.", show_default=False)
    ] = "",
    steps: Annotated[
        int | None, typer.Option(help="For so many steps; otherwise to the end.", show_default=False)
    ] = None,
    skip: Annotated[bool, typer.Option("--skip", help="With rewind: leave out the batches read since.")] = False,
    root: Root = Path("runs"),
    json: Json = False,
) -> None:
    """Ask something of a run, between two steps: bounded, journalled before it is done, and undone with lumina undo."""
    from lumina.byhand import open_run, table
    from lumina.orchestrator import actions

    opened = open_run(run, root)
    if action:
        _ask(opened, actions.read(action, steps, skip), json)
    elif json:
        print_json([dict(zip(("name", "values", "does", "undone"), row, strict=True)) for row in table()])
    else:
        print_table(["action", "values", "does"], [row[:3] for row in table()], left=3)


def undo(
    run: RunName,
    names: Annotated[list[str], typer.Argument(help="What `lumina decisions` names, or its beginning; one or more.")],
    root: Root = Path("runs"),
    json: Json = False,
) -> None:
    """Go back to before an action and on without it: the run that never had it, to the bit."""
    from lumina.byhand import open_run
    from lumina.orchestrator.actions import Request

    _ask(open_run(run, root), Request("undo", " ".join(names)), json)


def decisions(
    run: Annotated[str, typer.Argument(help="A run folder, or its name below --root.", show_default=False)] = "",
    history: Annotated[
        bool, typer.Option("--history", help="What trials of all runs taught of each action, instead of one run.")
    ] = False,
    root: Root = Path("runs"),
    json: Json = False,
) -> None:
    """What was decided about a run, by rule or by hand: with evidence, and what undoes it."""
    from lumina.byhand import open_run
    from lumina.errors import UserError
    from lumina.events import as_plain

    if history and run:
        raise UserError(f"{run}: --history is of all runs below a folder", fix="leave the run out, or --history")
    if history:
        _tell_history(root, json)
        return
    if not run:
        raise UserError("decisions: of which run?", fix="name one that lumina runs lists, or ask for --history")
    opened = open_run(run, root)
    if json:
        print_json(as_plain(opened.decisions()))
    else:
        report(opened)


def report(opened: OpenRun) -> None:
    """Prints what was decided about a run."""
    from lumina.orchestrator.ledger import told

    found = opened.entries()
    for entry in found:
        typer.echo(told(entry))
    if not found:
        typer.echo("nothing was decided: every step was taken as planned")
    if any(entry.undo for entry in found):
        typer.echo(f"undo by name: lumina undo {shlex.quote(str(opened.run.path))} NAME")


def _ask(opened: OpenRun, request: Request, json: bool) -> None:
    said, running = opened.ask(request), opened.running
    path = shlex.quote(str(opened.run.path))
    if json:
        print_json({"asked": said, "running": running})
    elif running:
        typer.echo(f"asked: {said}, before the next step; what came of it: lumina decisions {path}")
    else:
        typer.echo(f"asked: {said}; the run is not running: it is done when it goes on: lumina resume {path}")


def _tell_history(root: Path, json: bool) -> None:
    from lumina.byhand import history

    rows = history(root)
    used = [row for row in rows if row["used"]]
    if json:
        print_json(rows)
        return
    if used:
        header = ["model", "fault", "action", "tried", "won", "chance", "90 %", "gain", "runs"]
        print_table(header, [_cells(row) for row in used], left=3)
    else:
        typer.echo(
            f"no trials below {root}; a run in orchestrator.mode=act, the default, makes them when something is wrong"
        )
    if others := sum(row["tried"] for row in rows if not row["used"]):
        typer.echo(f"{others} more of other versions of lumina, which no run goes by any more: --json")


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["interval"]
    counts = [str(row["tried"]), str(row["won"])]
    gain = "-" if row["gain"] is None else f"{row['gain']:+.4f}"
    chance = [f"{row['mean']:.2f}", f"{low:.2f} - {high:.2f}"]
    return [row["architecture"], row["fault"], row["action"], *counts, *chance, gain, str(len(row["runs"]))]
