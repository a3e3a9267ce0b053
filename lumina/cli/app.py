"""All verbs in one table, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer

from lumina import __version__
from lumina.cli import demo, generate, train
from lumina.errors import UserError
from lumina.run.exit_codes import STOPPED, USER_ERROR

VERBS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "train": train.train,
    "resume": train.resume,
    "generate": generate.generate,
}

app = typer.Typer(
    help="Train dense, MoE, MoD and hybrid language models, from a laptop CPU to many nodes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for name, function in VERBS.items():
    app.command(name)(function)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        typer.echo(f"lumina {__version__}")
        raise typer.Exit


def run(arguments: list[str] | None) -> int:
    """Runs a command line; returns the exit code."""
    try:
        result = app(args=arguments, prog_name="lumina", standalone_mode=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("stopped at once; what was saved before is complete", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # the reader of a pipe went away: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return result if isinstance(result, int) else 0
