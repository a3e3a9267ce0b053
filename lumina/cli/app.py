"""All verbs in one table, and the one place where errors become exit codes."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from lumina import __version__
from lumina.cli import (
    act,
    bench,
    chat,
    checkpoints,
    config,
    data,
    demo,
    doctor,
    gauntlet,
    generate,
    laws,
    lora,
    plan,
    presets,
    rescue,
    runs,
    train,
    verify,
)  # fmt: skip
from lumina.cli.output import say
from lumina.errors import MachineFailed, OutOfMemory, Told, UserError
from lumina.run import supervised, watchdog
from lumina.run.exit_codes import BUG, DONE, INTERRUPTED, MACHINE_FAILED, OUT_OF_MEMORY, USER_ERROR
from lumina.standard import discard

Verb = Callable[..., None]
VERBS: dict[str, Verb | dict[str, Verb]] = {
    "demo": demo.demo,
    "train": train.train,
    "resume": train.resume,
    "generate": generate.generate,
    "chat": chat.chat,
    "lora": {"export": lora.export, "merge": lora.merge},
    "runs": runs.runs,
    "act": act.act,
    "undo": act.undo,
    "decisions": act.decisions,
    "checkpoints": checkpoints.checkpoints,
    "presets": presets.presets,
    "plan": plan.plan,
    "fit-laws": laws.fit_laws,
    "config": {
        "show": config.show,
        "check": config.check,
        "schema": config.schema,
        "reference": config.reference,
    },
    "data": {
        "show": data.show,
        "check": data.check,
        "prepare": data.prepare,
        "difficulty": data.difficulty,
    },
    "doctor": doctor.doctor,
    "bench": {
        "speed": bench.speed,
        "sparse": bench.sparse,
        "gap": bench.gap,
        "tuning": bench.tuning,
        "data": bench.data,
        "checkpoint": bench.checkpoint,
        "memory": bench.memory,
        "orchestrator": bench.orchestrator,
    },
    "verify": {"resume": verify.resume, "corruption": verify.corruption},
    "gauntlet": gauntlet.gauntlet,
    "rescue": rescue.rescue,
}

GROUP_HELP = {
    "data": "Data: looked at, checked, prepared.",
    "config": "Configurations: shown, checked, documented.",
    "lora": "Trained adapters: for other tools, or folded into the weights.",
    "bench": "What this machine reaches, measured fairly.",
    "verify": "What is promised of a run, checked on this machine.",
}

app = typer.Typer(
    help="Train dense, MoE, MoD and hybrid language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with its errors turned into a message and an exit code: outside of it, typer would answer first."""

    @functools.wraps(verb)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            verb(*arguments, **options)
        except UserError as error:
            _say(error, bool(options.get("json")))
            raise typer.Exit(USER_ERROR) from None
        except OutOfMemory as error:
            _say(error, bool(options.get("json")))
            raise typer.Exit(OUT_OF_MEMORY) from None
        except MachineFailed as error:
            _say(error, bool(options.get("json")))
            raise typer.Exit(MACHINE_FAILED) from None
        except KeyboardInterrupt:
            say("\nstopped at once; checkpoints saved before are complete", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader of standard output went away: nobody is left to tell
            discard(sys.stdout)
            raise typer.Exit(DONE) from None
        except OSError as error:  # what no room foresaw: a name too long, a disk that fails or fills
            where = f"{error.filename}: " if error.filename else ""
            fix = "check the path, and that its disk is writable and has room"
            _say(UserError(f"{where}{error.strerror or error}", fix), bool(options.get("json")))
            raise typer.Exit(USER_ERROR) from None

    return guarded


def _say(error: Told, as_json: bool) -> None:
    """Says an error once, whichever processes met it: before they know of each other, one of each machine says it."""
    alone = os.environ.get("LOCAL_RANK", "0") == "0"
    if error.told or not (alone or _joined()):
        return
    text = json.dumps({"error": {"message": error.message, "fix": error.fix}}) if as_json else f"error: {error}"
    say(text, err=True)


def _tell_torchrun(error: Exception) -> None:
    """A bug of ours, for the table that torchrun prints at the end, of the process that had it first."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _joined() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


for name, verb in VERBS.items():
    if isinstance(verb, dict):
        group = typer.Typer(help=GROUP_HELP[name], no_args_is_help=True, rich_markup_mode=None)
        for inner, function in verb.items():
            group.command(inner)(_guarded(function))
        app.add_typer(group, name=name)
    else:
        app.command(name)(_guarded(verb))


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        typer.echo(f"lumina {__version__}")
        raise typer.Exit


def run(arguments: list[str] | None) -> int:
    """Runs a command line; returns the exit code. Of several processes under torchrun the first one speaks."""
    if arguments is None:  # the process is ours
        supervised.end_with_parent()
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    try:
        app(args=arguments, prog_name="lumina")
        code = DONE
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else BUG
    except Exception as error:
        _tell_torchrun(error)
        raise
    supervised.tell_exit(code)
    if arguments is None and "lumina.training.session" in sys.modules:  # it trained
        watchdog.expect_exit()
    return code
