"""`lumina checkpoints`."""

from __future__ import annotations

from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lumina.cli.options import RunName
from lumina.cli.output import Json, print_json, print_table
from lumina.cli.train import Root
from lumina.errors import UserError
from lumina.events import as_line
from lumina.run.exit_codes import USER_ERROR

if TYPE_CHECKING:
    from lumina.config.schema.config import CheckpointConfig
    from lumina.run.folder import Run

SHOWN = 20  # tensors of a difference that are printed


def checkpoints(
    run: RunName,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte; ends with 2 if one is damaged.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Say what would be deleted, damaged ones too.")] = False,
    keep_last: Annotated[
        int | None, typer.Option(min=1, help="With --prune: newest to keep.", show_default="as configured")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --prune: delete it.")] = False,
    diff: Annotated[
        tuple[str, str], typer.Option(help="What differs between two: a step, latest or best.", show_default=False)
    ] = ("", ""),
    root: Root = Path("runs"),
    json: Json = False,
) -> None:
    """List the checkpoints of a run: how good, how large, what keeps them. Works while the run trains."""
    from lumina.config.resolve import read
    from lumina.run import index

    if sum((verify, prune, any(diff))) > 1 or ((keep_last or yes) and not prune):
        fix = "use one of them; --keep-last and --yes go with --prune"
        raise UserError("--verify, --prune and --diff ask for different things", fix)
    found = index.find(root, run)
    keep = read(found.config).config.checkpoint
    if any(diff):
        _differ(found.checkpoints, *diff, json)
    elif prune:
        keep = keep.model_copy(update={"keep_last": keep_last}) if keep_last else keep
        _prune(found, keep, yes, json)
    else:
        _list(found, keep, verify, json)


def _list(run: Run, keep: CheckpointConfig, verify: bool, json: bool) -> None:
    from lumina.checkpoint.overview import rows

    folder = run.checkpoints
    listed = rows(folder, keep, _abandoned(run), found=_read_all(run) if verify else None)
    if json:
        print_json(listed)
    elif listed:
        header = ["step", "state", "kept by", "attempt", "loss", "size", "age"]
        print_table(header, [_cells(row) for row in listed], left=3)
        for row in listed:
            for problem in row["problems"] or ():
                typer.echo(f"! {row['name']}: {problem}")
    else:
        typer.echo(f"no checkpoints in {folder}")
    if any(row["problems"] for row in listed):
        raise typer.Exit(USER_ERROR)


def _cells(row: dict[str, Any]) -> list[str]:
    from lumina.telemetry.figures import duration, size

    kept = "-" if row["kept_by"] is None else ", ".join(row["kept_by"]) or "nothing: it goes at the next save"
    return [
        row["name"].removeprefix("step-").lstrip("0") or "0",
        row["state"],
        kept,
        "-" if row["attempt"] is None else str(row["attempt"]),
        "-" if row["heldout_loss"] is None else f"{row['heldout_loss']:.4f}",
        "-" if row["bytes"] is None else size(row["bytes"]),
        duration(row["age"]),
    ]


def _read_all(run: Run) -> dict[Path, list[str]]:
    """What is wrong with each checkpoint, after reading every byte."""
    from lumina.checkpoint import places, store
    from lumina.checkpoint.overview import every

    aside = ["it was set aside: other bytes were read back than were written"]
    return {
        path: aside if path.suffix == places.DAMAGED else store.verify(path, own=run.id)
        for path in every(run.checkpoints)
    }


def _abandoned(run: Run) -> list[Path]:
    """The checkpoints that a later attempt went back before."""
    from lumina.checkpoint import catalogue
    from lumina.run.lineage import lineage

    return catalogue.abandoned(run.checkpoints, lineage(run).counts)


def _prune(run: Run, keep: CheckpointConfig, yes: bool, json: bool) -> None:
    from lumina.checkpoint import retention
    from lumina.checkpoint.overview import doomed
    from lumina.run.lock import RunLock

    folder = run.checkpoints
    with RunLock(run.lock):  # a run that trains deletes its own
        goes = doomed(folder, keep, _abandoned(run), _read_all(run))
        if yes:
            retention.delete(folder, goes, _abandoned(run))
    if json:
        print_json({"deleted": yes, "checkpoints": [{"name": path.name, "why": why} for path, why in goes.items()]})
        return
    for path, why in goes.items():
        typer.echo(f"{'deleted' if yes else 'would delete'} {path.name}: {why}")
    if not goes:
        typer.echo("nothing to delete")
    elif not yes:
        typer.echo("with --yes it is done")


def _differ(folder: Path, before: str, after: str, json: bool) -> None:
    from lumina.checkpoint import store
    from lumina.checkpoint.difference import difference
    from lumina.checkpoint.overview import find

    paths = find(folder, before), find(folder, after)
    found = {"before": paths[0].name, "after": paths[1].name, **difference(*map(store.read, paths))}
    if json:
        print_json(loads(as_line(found)))  # JSON knows no nan: they are texts, as in the event log
        return
    changed, names = found["tensors"], (found["before"], found["after"])
    typer.echo(f"{names[0]} -> {names[1]}: {len(changed)} tensors changed, {found['equal']} did not")
    weights = [tensor for tensor in changed if tensor["name"].startswith(f"{store.MODEL}/")]
    if weights:
        cells = [[t["name"], f"{t['relative']:.3g}", f"{t['largest']:.3g}"] for t in weights[:SHOWN]]
        print_table(["tensor", "relative change", "largest change"], cells)
    if len(changed) > len(weights[:SHOWN]):
        rest = f"{len(weights[SHOWN:])} weights that changed less, {len(changed) - len(weights)} moments"
        typer.echo(f"and {rest}: --json has them")
    for tensor in found["unlike"]:
        typer.echo(f"! {tensor['name']}: {tensor['before']}, then {tensor['after']}")
    for name, where in zip(("only_before", "only_after"), names, strict=True):
        for tensor in found[name]:
            typer.echo(f"! {tensor}: only in {where}")
    for key, (old, new) in found["values"].items():
        typer.echo(f"{key}: {_short(old)} -> {_short(new)}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
