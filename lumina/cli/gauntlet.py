"""`lumina gauntlet`: does the orchestrator rescue broken runs, and leave sound ones alone?"""

from __future__ import annotations

import json as json_
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lumina.cli.output import Json, print_json, print_table
from lumina.errors import UserError

if TYPE_CHECKING:
    from lumina.verify.gauntlet.arms import Result

Subset = Annotated[str, typer.Option(help="Which runs: tuned, held-out, long, or ci, a few in about a minute.")]
Case = Annotated[list[str] | None, typer.Option(help="This fault or trap alone; may be repeated.", show_default=False)]
Kind = Annotated[list[str] | None, typer.Option(help="This kind alone; may be repeated.", show_default=False)]
Mode = Annotated[
    list[str] | None,
    typer.Option(
        help="Who watches: off, advise, act, another policy, or module:name of yours; may be repeated.",
        show_default="act",
    ),
]
Others = Annotated[bool, typer.Option("--others", help="All other policies, too, on dense runs of two seeds.")]
Calibration = Annotated[Path | None, typer.Option(help="Raw file whose runs alone are not taken again.")]
Score = Annotated[
    list[Path] | None,
    typer.Option(help="Raw files of results, of any trainer: score them, and train nothing.", show_default=False),
]
Out = Annotated[Path | None, typer.Option(help="Folder for a dated report: Markdown, and every run as a JSON line.")]


def gauntlet(
    subset: Subset = "tuned",
    case: Case = None,
    kind: Kind = None,
    mode: Mode = None,
    others: Others = False,
    seeds: Annotated[int, typer.Option(help="Runs of each case and kind.", show_default="the subset's")] = 0,
    first: Annotated[int, typer.Option(help="The first seed.", show_default="the subset's")] = -1,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side, one core each.")] = 2,
    calibration: Calibration = None,
    score: Score = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Break runs on purpose, and set traps for sound ones: what the orchestrator makes of them, in tables.

    With --out, runs that an earlier one of this commit had done are not taken again.
    """
    from lumina.telemetry.console import Console
    from lumina.verify import report
    from lumina.verify.gauntlet import page, running
    from lumina.verify.gauntlet.arms import watcher
    from lumina.verify.gauntlet.cases import CASES, KINDS, SUITES

    if score:
        _show([result for path in score for result in _read(path)], json)
        return
    names, kinds, modes = case or list(CASES), kind or list(KINDS), mode or ["act"]
    for given, there_are, what in (
        ([subset], list(SUITES), "subset"),
        (names, list(CASES), "case"),
        (kinds, list(KINDS), "kind"),
    ):
        if unknown := [one for one in given if one not in there_are]:
            raise UserError(f"--{what} {unknown[0]}: there is no such {what}", fix=f"known: {', '.join(there_are)}")
    for who in modes:
        watcher(who)
    suite = SUITES[subset]
    begin, count = first if first >= 0 else suite.seeds[0], seeds or len(suite.seeds)
    of = range(begin, begin + count)
    arms = running.arms(suite, [CASES[name] for name in names], kinds, of, [one for one in modes if one != "off"])
    if not arms:
        fits = ", ".join(CASES[names[0]].kinds)
        raise UserError(f"--case {names[0]}: not for --kind {', '.join(kinds)}", fix=f"it is for {fits}")
    arms += [arm for arm in running.others(arms, of) if arm not in arms] if others else []
    alone = "-alone" if set(modes) == {"off"} else ""
    path = out / f"{time.strftime('%Y-%m-%d')}-{subset}{alone}.md" if out else None
    raw = path.with_suffix(".jsonl") if path else None
    frozen = {one.arm: one for one in _read(calibration) if one.arm.mode == "off"} if calibration else {}
    known = running.earlier(out, subset, arms) if out else []
    log, there = report.Raw(raw, keep=bool(report.earlier(raw))), report.earlier(raw)
    for one in known:
        if one.plain() not in there and one.arm not in frozen:  # of another day
            log(one.plain())
    known += [frozen[arm] for arm in arms if arm in frozen and arm not in {one.arm for one in known}]
    done = len(known)
    with Console(1, quiet=json) as console:
        console.progress("runs", done, len(arms))

        def tell(result: Result) -> None:
            nonlocal done
            done += 1
            log(result.plain())
            console.progress("runs", done, len(arms))

        results = running.take_all(arms, workers, tell, known)
    if path:
        options = [f"--subset {subset}"] if subset != "tuned" else []
        options += [f"--case {shlex.quote(name)}" for name in case or []] + [f"--kind {one}" for one in kind or []]
        options += [f"--mode {shlex.quote(one)}" for one in mode or []] + (["--others"] if others else [])
        options += [f"--seeds {seeds}"] * bool(seeds) + [f"--first {first}"] * (first >= 0)
        options += [f"--calibration {calibration}"] if calibration else []
        told = f"Runs that nobody watched, and healthy ones, are those of `{calibration}`." if calibration else ""
        with report.refusing(path):
            path.write_text(page.page(results, " ".join(["lumina gauntlet", *options]), told), encoding="utf-8")
    _show(results, json)
    if path and not json:
        typer.echo(f"wrote  {path} and .jsonl")


def _show(results: Sequence[Result], json: bool) -> None:
    from lumina.verify.gauntlet import page
    from lumina.verify.gauntlet.scoring import scores

    if json:
        print_json(page.as_json(results))
        return
    found = scores(results)
    for title, made in page.tables(found, results):
        if made[1]:
            typer.echo(f"\n{title}")
            print_table(*made, left=3)
    if found:
        typer.echo(f"\n{page.summary(found)}")


def _read(path: Path) -> list[Result]:
    """The results of a raw file; its first line says what it is of."""
    from lumina.verify.gauntlet.arms import Result

    try:
        rows = [json_.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        return [Result.of(row) for row in rows if row.get("t", "arm") == "arm"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "name a .jsonl file of `--out`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        wrong = f"{path}: not results of a gauntlet: {type(error).__name__}: {error}"
        raise UserError(wrong, "each line is an object with case, kind, seed, mode and loss") from error
