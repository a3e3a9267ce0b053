"""`lumina config show | check | schema | reference`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lumina.cli.output import Json, print_json
from lumina.cli.train import Root
from lumina.errors import UserError

if TYPE_CHECKING:
    from lumina.config.resolve import Resolved


def show(
    source: Annotated[str, typer.Argument(help="A preset, a YAML file, or a run.")] = "debug",
    settings: Annotated[list[str] | None, typer.Argument(help="key=value …", show_default=False)] = None,
    origins: Annotated[bool, typer.Option("--origins", help="Also where each value comes from.")] = False,
    root: Root = Path("runs"),
    json: Json = False,
) -> None:
    """Print the resolved configuration: what a run of this would be, or what a run was."""
    from lumina.config import yaml12
    from lumina.config.resolve import flatten

    if "=" in source:
        settings, source = [source, *(settings or [])], "debug"
    resolved = _resolved(source, settings or [], root)
    values = {key: value for key, value in flatten(resolved.config).items() if value is not None}
    if json:
        shown = {key: {"value": value, "origin": resolved.origins[key]} for key, value in values.items()}
        print_json(shown if origins else values)
        return
    for note in resolved.notes:
        typer.echo(f"note   {note}", err=True)
    lines = {key: f"{key}: {yaml12.dump_value(value)}" for key, value in values.items()}
    width = max(map(len, lines.values()))
    for key, line in lines.items():
        typer.echo(f"{line:<{width}}  # {resolved.origins[key]}" if origins else line)


def check(files: Annotated[list[Path], typer.Argument(help="YAML files.")], json: Json = False) -> None:
    """Say all that is wrong with configuration files; exits with 2 if anything is."""
    from lumina.config.resolve import resolve

    wrong = []
    for file in files:
        try:
            resolve(file if file.suffix in (".yaml", ".yml") else file.resolve())
        except UserError as error:
            wrong.append(str(error) if str(file) in str(error) else f"{file}: {error}")
        else:
            if not json:
                typer.echo(f"{file}: fine")
    if wrong:
        raise UserError("\n".join(wrong))
    if json:
        print_json({"checked": [str(file) for file in files]})


def schema(json: Json = True) -> None:
    """Print the JSON Schema of configuration files, for editors; it is JSON with or without --json."""
    from lumina.config.reference import json_schema

    print_json(json_schema())


def reference(json: Json = False) -> None:
    """Print docs/configuration.md: every key with its meaning."""
    from lumina.config.reference import markdown

    if json:
        print_json({"markdown": markdown()})
        return
    typer.echo(markdown(), nl=False)


def _resolved(source: str, settings: list[str], root: Path) -> Resolved:
    from lumina.config.resolve import read, resolve
    from lumina.run import index
    from lumina.run.folder import missing

    if not any(missing(path) == [] for path in (Path(source), root / source)):
        return resolve(source, settings)
    if settings:
        raise UserError(f"{source}: a run has its settings already", fix="leave out key=value, or name a preset")
    return read(index.find(root, source).config)
