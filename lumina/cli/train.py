"""`lumina train` and `lumina resume`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from lumina.cli.output import say
from lumina.errors import UserError
from lumina.events import Event, Listener, as_line
from lumina.run import supervised
from lumina.run.exit_codes import STOPPED
from lumina.run.signals import NothingToSave

if TYPE_CHECKING:
    from lumina.run.folder import Run
    from lumina.telemetry.console import Console

Root = Annotated[Path, typer.Option(help="Folder that holds the runs.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew even if this request has a run already.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print problems, and the run's folder at the end.")]
BackTo = Annotated[
    int | None, typer.Option("--from", min=0, help="Go back to the checkpoint of this step (0: the start) and on.")
]
Skip = Annotated[bool, typer.Option("--skip", help="With --from: leave out the batches that were read since.")]
SkipSteps = Annotated[
    str, typer.Option(help="With --from: leave out the batches of these steps, 120:140.", show_default=False)
]
Supervise = Annotated[bool, typer.Option("--supervise", help="Start it again when it dies, from the last good state.")]
Restarts = Annotated[
    int | None,
    typer.Option(min=0, help="Restarts without a new checkpoint before it gives up.  [default: 5]", show_default=False),
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Processes, started by torchrun.  [default: 1]", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print every event as a line of JSON, and nothing else.")]


def train(
    source: Annotated[str, typer.Argument(help="A preset (see `lumina presets`) or a YAML file.")] = "debug",
    settings: Annotated[
        list[str] | None, typer.Argument(help="Any key: train.steps=300 model.kind=moe …", show_default=False)
    ] = None,
    fresh: Fresh = False,
    root: Root = Path("runs"),
    quiet: Quiet = False,
    json: Json = False,
    supervise: Supervise = False,
    restarts: Restarts = None,
    processes: Processes = None,
) -> None:
    """Train a model. The same command again continues an unfinished run."""
    if "=" in source:  # the preset was left out: `lumina train train.steps=10`
        settings, source = [source, *(settings or [])], "debug"
    voice = Voice(quiet, json)
    if watched(supervise, restarts, processes):
        again = ["train", *voice.options, "--root", str(root), "--", source, *(settings or [])]
        start_again(lambda first: ["train", "--fresh", *again[1:]] if first and fresh else again, restarts, processes)
    fit(source, settings or [], root, fresh, voice)


def resume(
    run: Annotated[str, typer.Argument(help="A run folder, or its name below --root.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="How it goes on: parallel.device=cpu precision.mode=fp32 …", show_default=False),
    ] = None,
    back_to: BackTo = None,
    skip: Skip = False,
    skip_steps: SkipSteps = "",
    root: Root = Path("runs"),
    quiet: Quiet = False,
    json: Json = False,
    supervise: Supervise = False,
    restarts: Restarts = None,
    processes: Processes = None,
) -> None:
    """Go on with a stopped run, to the bit.

    It goes on from its newest complete checkpoint, or from the start if it has none. With --from it goes back, also if
    it is finished, and on from there in another attempt. Settings change how it is computed, kept and shown (another
    device, say), and stay; numbers may then differ in their last digits.
    """
    steps = _steps(skip, skip_steps, back_to)
    from lumina.config.change import change
    from lumina.config.resolve import read
    from lumina.run import index
    from lumina.run.inbox import Inbox
    from lumina.training import trainer
    from lumina.training.ways_back import Back

    voice, found = Voice(quiet, json), index.find(root, run)
    if watched(supervise, restarts, processes):
        again = [
            "resume",
            *voice.options,
            "--",
            str(found.path.resolve()),
        ]  # whose configuration holds the settings then
        begin = ["resume", *_going_back(back_to, steps), *again[1:], *(settings or [])]
        start_again(lambda first: begin if first else again, restarts, processes, found)
    if found.finished and back_to is None and not Inbox(found).waiting():
        voice.tell_again(found)
        voice.say(f"note   {found.path} is finished: there is nothing to go on with")
    config = read(found.config)
    console = voice.console((change(config, settings) if settings else config).config.telemetry.log_every)
    back = None if back_to is None else Back(back_to, steps)
    _finish(
        lambda: trainer.resume(found, voice.listeners(console), console.progress, settings=settings or (), back=back),
        console,
        voice,
    )


def _steps(all_since: bool, named: str, back_to: int | None) -> tuple[int, int] | Literal["all"] | None:
    """The steps whose batches are left out."""
    if back_to is None and (all_since or named):
        raise UserError(
            "--skip and --skip-steps leave out batches after a step to go back to", fix="name it with --from"
        )
    if not named:
        return "all" if all_since else None
    first, _, last = named.partition(":")
    if all_since or not (first.isdecimal() and last.isdecimal()):
        raise UserError(
            f"--skip-steps {named}: not the first and the last step to leave out" + " beside --skip" * all_since,
            fix="such as --skip-steps 120:140, without --skip",
        )
    return int(first), int(last)


def _going_back(back_to: int | None, steps: tuple[int, int] | Literal["all"] | None) -> list[str]:
    """The options that `--from`, `--skip` and `--skip-steps` were."""
    if back_to is None:
        return []
    skip = [] if steps is None else ["--skip"] if steps == "all" else ["--skip-steps", f"{steps[0]}:{steps[1]}"]
    return ["--from", str(back_to), *skip]


def watched(supervise: bool, restarts: int | None, processes: int | None) -> bool:
    """Whether a supervisor is asked for. `UserError` for what only one would do."""
    if not supervise and (restarts is not None or processes is not None):
        option = "--processes" if restarts is None else "--restarts"
        raise UserError(f"{option} is for a command that is supervised", fix="add --supervise, or leave it out")
    if supervise and "RANK" in os.environ:
        fix = "start one lumina, without torchrun: lumina train … --supervise --processes 2"
        raise UserError("--supervise starts the processes itself, but torchrun started this one", fix)
    return supervise


def start_again(
    command: Callable[[bool], list[str]], restarts: int | None, processes: int | None, run: Run | None = None
) -> NoReturn:
    """Runs the command, which is a function of whether it is to begin the run, under a supervisor, and exits."""
    from lumina.run.supervisor import RESTARTS, Supervisor

    limit = RESTARTS if restarts is None else restarts
    supervisor = Supervisor(command, lambda line: say(line, err=True), run, processes or 1, limit)
    raise typer.Exit(supervisor.supervise())


class Voice:
    """How a verb that trains speaks: to a person, only of problems (`quiet`), or in events (`json`)."""

    def __init__(self, quiet: bool, json: bool) -> None:
        if quiet and json:
            raise UserError("--quiet and --json ask for different things", fix="use one of them")
        self.quiet, self.json = quiet, json
        self.options = [option for option, given in (("--quiet", quiet), ("--json", json)) if given]

    def say(self, line: str) -> None:
        if not (self.quiet or self.json):
            say(line)

    def tell_again(self, run: Run) -> None:
        """How a finished run began and ended, for programs: no event comes any more, and silence says nothing."""
        if self.json:
            last = {event["t"]: event for event in run.events() if event["t"] in ("run", "end")}
            for event in last.values():
                _print_event(event)

    def console(self, log_every: int) -> Console:
        from lumina.telemetry.console import Console

        return Console(log_every, show=_nowhere if self.json else None, quiet=self.quiet)

    def listeners(self, console: Console) -> list[Listener]:
        return [console, *([_print_event] if self.json else []), _tell_supervisor]


def fit(source: str, settings: list[str], root: Path, fresh: bool, voice: Voice) -> Run:
    """Trains with the console attached and says what a person should know before and after."""
    from lumina.training.trainer import Trainer

    trainer = Trainer(source, settings, root=root, fresh=fresh)
    config = trainer.resolved.config
    console = voice.console(config.telemetry.log_every)
    trainer.listeners, trainer.progress = voice.listeners(console), console.progress
    if trainer.resolved.dropped:
        keys = ", ".join(trainer.resolved.dropped)
        voice.say(f"note   a {config.model.kind} model has no {keys}: dropped from the preset")
    for note in trainer.resolved.notes:
        voice.say(f"note   {note}")
    voice.say(f"text   {', '.join((*config.data.train, *config.data.eval))}")
    run = _finish(trainer.fit, console, voice)
    if trainer.already_finished:
        voice.tell_again(run)
        voice.say(f"note   {run.path} answers this request and is finished; --fresh trains another")
    return run


def _finish(train: Callable[[], Run], console: Console, voice: Voice) -> Run:
    """Trains, says where everything is and which command comes next; a stopped run exits with its own code."""
    from lumina.training.endings import Stopped

    try:
        with NothingToSave(), console:
            run = train()
    except Stopped as stop:
        voice.say(f"saved  {stop.run.checkpoints / 'latest'} at step {stop.step}")
        name = shlex.quote(str(stop.run.path))
        if stop.handed_over:  # whoever starts it again finds what it found before
            voice.say(f"why    lumina decisions {name}   # {stop.signal}: the orchestrator knows nothing that mends it")
            voice.say(f"next   lumina resume {name}   # once it is mended; with orchestrator.mode=advise it only tells")
        else:
            voice.say(f"next   lumina resume {name}")
        if voice.quiet:
            say(str(stop.run.path))
        raise typer.Exit(STOPPED) from None
    except BrokenPipeError as error:  # not that of a reader, who may go away: else it would pass for the run's end
        raise RuntimeError("a pipe inside of the program broke") from error
    links = ", ".join(name for name in ("latest", "best") if (run.checkpoints / name).exists())
    name = shlex.quote(str(run.path))
    voice.say(f"files  {run.path}/  config.yaml · events.jsonl · log.txt · tokenizer/ · checkpoints/ ({links})")
    voice.say(f'next   lumina generate {name} -p "your prompt"   or   lumina chat {name}')
    if voice.quiet:
        say(str(run.path))
    return run


def _print_event(event: Event) -> None:
    say(as_line(event))


def _tell_supervisor(event: Event) -> None:
    if event["t"] == "run":
        supervised.tell_run(Path(event["path"]))


def _nowhere(line: str) -> None:
    """`log.txt` is written all the same."""
