"""`lumina bench`: what this machine reaches."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lumina.cli.output import Json, print_json, print_table
from lumina.errors import UserError

if TYPE_CHECKING:
    from lumina.bench.harness import Measurement, Suite
    from lumina.config.schema.config import Config

Settings = Annotated[list[str] | None, typer.Argument(help="Any training key: precision.mode=fp32 train.compile=on …")]
SeqLen = Annotated[int, typer.Option(min=2, help="Tokens in a sequence; a step has eight.")]
Rounds = Annotated[int, typer.Option(min=1, help="Turns that every arm takes.")]
Memory = Annotated[bool, typer.Option(help="Measure memory too, each arm in its own process.")]
Out = Annotated[Path | None, typer.Option(help="Folder for a dated report: Markdown and JSON.")]


def speed(
    settings: Settings = None,
    seq_len: SeqLen = 512,
    rounds: Rounds = 10,
    memory: Memory = True,
    out: Out = None,
    json: Json = False,
) -> None:
    """Training speed of dense, MoE, MoD and hybrid at benchmark shape P, side by side on this machine.

    The kinds take turns, and their ratios are of the same turns: other work on the machine slows all of them.
    """
    from lumina.bench import report
    from lumina.bench import speed as shape

    keys = _training_keys(settings)
    config = shape.configure("dense", seq_len, keys)
    measured = _measured(shape.suite, config, rounds, memory, json, {"seq_len": seq_len, "keys": keys})
    parts = (shape.FORWARD_BACKWARD, shape.OPTIMIZER)
    if out:
        heading = f"Shape P, {seq_len} tokens a sequence"
        page = report.markdown("Training speed of four kinds", {heading: (measured, "dense", parts)})
        path = report.write(out, _name(time.strftime("%Y-%m-%d-speed"), config), page, {heading: measured})
    if json:
        print_json(measured.as_json())
        return
    print_table(*report.rows(measured, "dense", parts))
    typer.echo(f"\n{report.circumstances(measured.about)}; {report.ceilings(measured)}")
    if out:
        typer.echo(f"wrote  {path} and .json")


def sparse(
    settings: Settings = None,
    seq_len: SeqLen = 512,
    rounds: Rounds = 10,
    memory: Memory = True,
    muon: Annotated[bool, typer.Option(help="Dense and MoE under Muon, too.")] = True,
    parts: Annotated[bool, typer.Option(help="One layer of each sort, too: where a step's time goes.")] = True,
    depths: Annotated[bool, typer.Option(help="MoD at capacities 1, 0.5 and 0.25, too.")] = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """What sparse layers keep of dense speed at shape P: bars, ideals, and the floor of each part of a step."""
    from lumina.bench import report
    from lumina.bench import sparse as suite
    from lumina.bench import speed as shape

    keys = _training_keys(settings)
    if "train.optimizer" in keys:
        raise UserError("train.optimizer: the bars are for AdamW", fix="leave it out; --muon shows Muon beside it")
    config = shape.configure("moe", seq_len, {**keys, "train.optimizer": "adamw"})
    chosen = {"seq_len": seq_len, "keys": keys, "muon": muon, "parts": parts, "depths": depths}
    measured = _measured(suite.suite, config, rounds, memory, json, chosen)
    title = f"Sparse layers at shape P: {', '.join(_setting(config))} tokens a sequence"
    page = suite.page(title, measured, config)
    if out:
        path = report.write(out, _name(time.strftime("%Y-%m-%d"), config), page, {title: measured})
    if json:
        print_json(
            measured.as_json() | {"bars": suite.bars(measured, config), "floors": suite.floors(measured, config)}
        )
        return
    typer.echo(page)
    if out:
        typer.echo(f"wrote  {path} and .json")


def gap(
    run: Annotated[str, typer.Argument(help="A run of kind mod or hybrid: its folder, or its name below --root.")],
    root: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    json: Json = False,
) -> None:
    """Held-out loss under training's choice of tokens, which looks ahead, and under both causal rules."""
    from lumina.bench import gap as looking_ahead
    from lumina.run import index

    found = index.find(root, run)
    step, losses = looking_ahead.measure(found)
    if json:
        print_json({"run": str(found.path), "step": step} | {rule: one._asdict() for rule, one in losses.items()})
        return
    typer.echo(f"step {step} of {found.path}, in fp32")
    print_table(looking_ahead.HEADER, looking_ahead.rows(losses))


def data(
    rounds: Rounds = 6,
    copies: Annotated[int, typer.Option(min=1, help="How often the standard library's sources, about 10 MB.")] = 2,
    memory: Annotated[bool, typer.Option(help="The peak memory of preparing files of each --size, too.")] = True,
    size: Annotated[list[int] | None, typer.Option(min=1, help="MB; 10, 100 and 1000 if none is given.")] = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """How fast files become shards, beside the tokenizer alone and `datasets.map` (if installed); memory; batches."""
    from lumina.bench import data as files
    from lumina.bench import harness, report
    from lumina.telemetry.console import Console

    used = files.memory(size or (10, 100, 1000)) if memory else {}
    with Console(1, quiet=json) as console:
        measured = harness.measure(files.suite(copies), rounds, warm=1, progress=console.progress)
    page = report.markdown("Files to shards", {"Speed": (measured, files.CEILING, ())})
    page += report.table("Bars", ("bar", "measured", "verdict"), files.bars(measured))
    if used:
        cells = [[f"{megabytes} MB", f"{peak / 2**20:.0f} MiB"] for megabytes, peak in used.items()]
        page += report.table("Peak memory of preparing one file", ("file", "above an empty process"), cells)
    made = measured.as_json() | {"bars": files.bars(measured), "peak_bytes": {str(k): v for k, v in used.items()}}
    _tell("prepare", page, made, out, json)


def checkpoint(
    millions: Annotated[
        list[int] | None, typer.Option(help="Parameters of the state: 1, 10 or 100; 10 and 100.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps a run, with one save in their middle.")] = 16,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="That training uses; all cores, and one less.", show_default=False)
    ] = None,
    rounds: Rounds = 7,
    folder: Annotated[Path, typer.Option(help="Where to save; it is deleted after each run.")] = Path("runs/saves"),
    out: Out = None,
    json: Json = False,
) -> None:
    """What a save costs training, beside torch.save and DCP's async_save: lost time, blocked time, time to the disk.

    By default once with training on all cores, once with one left free.
    """
    from lumina.bench import checkpoint as saves
    from lumina.bench import report
    from lumina.compat import usable_cores
    from lumina.telemetry.console import Console

    wanted = millions or [10, 100]
    if unknown := [str(one) for one in wanted if one not in saves.SHAPES]:
        known = ", ".join(map(str, saves.SHAPES))
        raise UserError(f"--millions {unknown[0]}: there is no such state", fix=f"use one of: {known}")
    if folder.exists():
        raise UserError(f"{folder}: exists, and would be deleted", fix="name a folder that does not, with --folder")
    page, made = "# What a save costs training\n", {}
    with Console(1, quiet=json) as console:
        for size, used in ((size, used) for size in wanted for used in threads or saves.choices(usable_cores())):
            measured = saves.take(size, used, steps, rounds, folder, console.progress)
            about = f"{report.circumstances(measured.about)}. {saves.said(measured)}"
            page += report.table(saves.heading(measured), saves.HEADER, saves.rows(measured), about)
            page += "\n" + report.plain(("bar", "less lost time", "verdict"), saves.bars(measured))
            made[saves.heading(measured)] = measured.as_json() | {"bars": saves.bars(measured)}
    _tell("checkpoint", page, made, out, json)


def tuning(
    settings: Settings = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often, each time from other weights.")] = 3,
    base_steps: Annotated[int, typer.Option(min=1, help="Steps of the base model.")] = 300,
    tune_steps: Annotated[int, typer.Option(min=1, help="Steps that the tuned models take more.")] = 100,
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions that each model is asked.")] = 100,
    folder: Annotated[Path, typer.Option(help="Where data and runs go.")] = Path("runs/tuning"),
    out: Out = None,
    json: Json = False,
) -> None:
    """What fine-tuning and interleaving teach a base model to answer, and what they make it forget, over several seeds.

    The debug preset on the embedded corpus; whole files of it are held out.
    """
    from lumina.bench import report
    from lumina.bench import tuning as answers
    from lumina.telemetry.console import Console
    from lumina.training import machine

    plan = answers.Plan(seeds, base_steps, tune_steps, questions=questions)
    with Console(1, quiet=json) as console:
        outcomes = answers.measure(plan, folder, {"train.eval_every": 0, **_training_keys(settings)}, console.progress)
    made = answers.as_json(plan, outcomes) | {"machine": machine.facts("cpu"), "date": time.strftime("%Y-%m-%d")}
    table = report.table("Tuning", answers.HEADER, answers.rows(outcomes), answers.said(plan))
    _tell("tuning", table.lstrip(), made, out, json)


def memory(
    device: Annotated[
        str, typer.Option(help="cuda: this GPU's allocator; fake: PyTorch's MemTracker; cpu: resident memory.")
    ] = "cuda",
    case: Annotated[
        list[str] | None, typer.Option(help="This case alone, or with --device fake this preset; may be repeated.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="The .json of an earlier report: measure nothing, forecast it anew.")
    ] = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """What training takes in memory, beside what the planner says: the error of each forecast."""
    from lumina.bench import allocator, resident, tracker
    from lumina.bench import memory as walks
    from lumina.telemetry.console import Console
    from lumina.training.machine import choose_device

    meters = {"cuda": allocator, "fake": tracker, "cpu": resident}
    if device not in meters:
        raise UserError(f"--device {device}: memory is not measured so", fix=f"use one of: {', '.join(meters)}")
    if measured:
        if case:
            raise UserError("--case chooses what is measured, and --measured measures nothing", fix="drop one of them")
        page, found = meters[device].beside(walks.earlier(measured, device))
        _tell(f"memory-{device}", page, {"device": device, **found}, out, json)
        return
    if device == "cuda":
        choose_device(device)
    known = meters[device].NAMES
    if unknown := [name for name in case or () if name not in known]:
        raise UserError(f"--case {unknown[0]!r}: there is no such case", fix=f"use one of: {', '.join(known)}")
    with Console(1, quiet=json) as console:
        page, found = meters[device].report(case or known, console.progress)
    _tell(f"memory-{device}", page, {"device": device, **found}, out, json)


def orchestrator(
    settings: Settings = None,
    size: Annotated[str, typer.Option(help="tiny: the preset; P: benchmark shape P.")] = "tiny",
    kind: Annotated[list[str] | None, typer.Option(help="This kind alone; may be repeated.")] = None,
    rounds: Rounds = 21,
    harm: Annotated[int, typer.Option(min=0, help="Instead: after so many tiny steps, is anything another?")] = 0,
    out: Out = None,
    json: Json = False,
) -> None:
    """What it costs to be watched: a step with figures, invariants, looks, restore points and orchestrator, without."""
    from lumina.bench import harness, report
    from lumina.bench import orchestrator as watched
    from lumina.config.schema.model import KINDS
    from lumina.telemetry.console import Console

    if size not in watched.AT_ONCE:
        raise UserError(f"--size {size}: there is no such size", fix=f"use one of: {', '.join(watched.AT_ONCE)}")
    if unknown := [one for one in kind or () if one not in KINDS]:
        raise UserError(f"--kind {unknown[0]}: there is no such kind", fix=f"use one of: {', '.join(KINDS)}")
    keys = _training_keys(settings)
    if harm:
        with Console(1, quiet=json) as console:
            harmed = {one: watched.harm(one, harm, keys, console.progress) for one in kind or KINDS}
        lines = [[one, str(harm), found or "equal to the bit"] for one, found in harmed.items()]
        page = report.table("Watched and not watched", ("kind", "steps", "result"), lines).lstrip()
        _tell("no-harm", page, {"steps": harm, "harm": harmed}, out, json)
        return
    with Console(1, quiet=json) as console:
        arms = watched.suite(size, kind or KINDS, keys)
        device = watched.device(size, keys)
        measured = harness.measure(arms, rounds, device=device, progress=console.progress, settings=keys, size=size)
    found = watched.rows(measured, size)
    said = f"{report.circumstances(measured.about)}; {report.ceilings(measured)}."
    page = report.table(f"What watching costs, {size}", watched.HEADER, found, said).lstrip()
    bars = [dict(zip(watched.HEADER, row, strict=True)) for row in found]
    _tell(f"orchestrator-{size}", page, measured.as_json() | {"bars": bars}, out, json)


def _tell(name: str, page: str, made: dict[str, Any], out: Path | None, json: bool) -> None:
    """Prints a page, or its JSON, and writes both into `out` under today's date, if asked for."""
    from lumina.bench import report

    path = report.write_pair(out, f"{time.strftime('%Y-%m-%d')}-{name}", page, made) if out else None
    if json:
        print_json(made)
        return
    typer.echo(page)
    if path:
        typer.echo(f"wrote  {path} and .json")


def _training_keys(settings: list[str] | None) -> dict[str, object]:
    """The settings by key, checked; shape P sets the others."""
    from lumina.config.resolve import resolve

    return {key: value for key, value in resolve("debug", settings or []).request.items() if key != "preset"}


def _measured(
    suite: Suite, config: Config, rounds: int, memory: bool, quiet: bool, chosen: dict[str, Any]
) -> Measurement:
    """The arms of `suite(**chosen)` in turns; the memory of those that train, if asked for."""
    from lumina.bench import harness
    from lumina.telemetry.console import Console
    from lumina.training.precision import DTYPES

    arms, used = suite(**chosen), dict[str, int]()
    with Console(1, quiet=quiet) as console:
        if memory:
            names = [arm.name for arm in arms if arm.unit == "tok"]
            used = harness.memory_of(suite, names, progress=console.progress, **chosen)
        return harness.measure(
            arms, rounds, device=config.parallel.device, dtype=DTYPES[config.precision.mode], memory=used,
            progress=console.progress, settings=chosen["keys"], seq_len=chosen["seq_len"],
        )  # fmt: skip


def _setting(config: Config) -> tuple[str, str, str]:
    """Precision, eager or compiled, tokens a sequence."""
    mode = "compiled" if config.train.compile == "on" else "eager"
    return config.precision.mode, mode, str(config.model.seq_len)


def _name(first: str, config: Config) -> str:
    """`<first>-<precision>-<eager|compiled>-<tokens a sequence>`"""
    return "-".join([first, *_setting(config)])
