"""`lumina train` and `lumina resume`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lumina.run.exit_codes import STOPPED

if TYPE_CHECKING:
    from lumina.run.folder import Run

Root = Annotated[Path, typer.Option(help="Folder that holds the runs.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew even if this request has a run already.")]


def train(
    source: Annotated[str, typer.Argument(help="A preset (tiny, debug) or a YAML file.")] = "debug",
    settings: Annotated[
        list[str] | None, typer.Argument(help="Any key: train.steps=300 model.kind=moe …", show_default=False)
    ] = None,
    fresh: Fresh = False,
    root: Root = Path("runs"),
) -> None:
    """Train a model. The same command again continues an unfinished run."""
    if "=" in source:  # the preset was left out: `lumina train train.steps=10`
        settings, source = [source, *(settings or [])], "debug"
    fit(source, settings or [], root, fresh)


def fit(source: str, settings: list[str], root: Path, fresh: bool) -> Run:
    """Trains with the console attached and says what a person should know before and after."""
    from lumina.telemetry.console import Console
    from lumina.training.trainer import Trainer

    trainer = Trainer(source, settings, root=root, fresh=fresh)
    config = trainer.resolved.config
    trainer.listeners = [Console(config.telemetry.log_every)]
    if trainer.resolved.dropped:
        keys = ", ".join(trainer.resolved.dropped)
        typer.echo(f"note   a {config.model.kind} model has no {keys}: dropped from the preset")
    typer.echo(f"read   {', '.join((*config.data.train, *config.data.eval))}")
    run = _finish(trainer.fit)
    if trainer.already_finished:
        typer.echo(f"note   {run.path} answers this request and is finished; --fresh trains another")
    return run


def resume(
    run: Annotated[str, typer.Argument(help="A run folder, or its name below --root.")],
    root: Root = Path("runs"),
) -> None:
    """Go on with a stopped run, to the bit.

    It goes on from its newest complete checkpoint, or from the start if it has none.
    """
    from lumina.config.resolve import read
    from lumina.run import index
    from lumina.telemetry.console import Console
    from lumina.training import trainer

    found = index.find(root, run)
    if found.finished:
        typer.echo(f"note   {found.path} is finished: there is nothing to go on with")
    console = Console(read(found.config).config.telemetry.log_every)
    _finish(lambda: trainer.resume(found, [console]))


def _finish(train: Callable[[], Run]) -> Run:
    """Trains, says where everything is and which command comes next; a stopped run exits with its own code."""
    from lumina.training.trainer import Stopped

    try:
        run = train()
    except Stopped as stop:
        typer.echo(f"saved  {stop.run.checkpoints / 'latest'} at step {stop.step}")
        typer.echo(f"next   lumina resume {shlex.quote(str(stop.run.path))}")
        raise typer.Exit(STOPPED) from None
    links = ", ".join(name for name in ("latest", "best") if (run.checkpoints / name).exists())
    typer.echo(f"files  {run.path}/  config.yaml · events.jsonl · log.txt · tokenizer/ · checkpoints/ ({links})")
    typer.echo(f'next   lumina generate {shlex.quote(str(run.path))} -p "your prompt"')
    return run
