"""`lumina gauntlet`: does the orchestrator rescue broken runs, and leave sound ones alone?"""

from __future__ import annotations

import json as json_
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lumina.cli.output import Json, print_json, print_table
from lumina.errors import UserError

if TYPE_CHECKING:
    from lumina.verify.gauntlet.arms import Arm, Result

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
        told = "the healthy runs are taken with the faults that are held against them, and a set may have few cases"
        raise UserError(f"--case {', '.join(names)}: none for these kinds in {subset}: {told}", "name others")
    arms += [arm for arm in running.others(arms, of) if arm not in arms] if others else []
    frozen = {one.arm: one for one in _read(calibration, frozen=True)} if calibration else {}
    path = out / f"{'-'.join(_stem(subset, case, modes))}.md" if out else None
    raw = path.with_suffix(".jsonl") if path else None
    known = [frozen[arm] for arm in arms if arm in frozen]
    known += [one for one in (running.earlier(out, arms) if out else []) if one.arm not in frozen]
    log, there = report.Raw(raw, keep=bool(report.earlier(raw))), {_arm(row) for row in report.earlier(raw)}
    for one in known:
        if one.arm not in there and one.arm not in frozen:  # of another day
            log(one.plain())
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
        used = sum(arm in frozen for arm in arms)
        told = f"{used} of the {len(arms)} runs, which nobody watched, are those of `{calibration}`." if used else ""
        with report.refusing(path):
            path.write_text(page.page(results, " ".join(["lumina gauntlet", *options]), told), encoding="utf-8")
    _show(results, json)
    if path and not json:
        typer.echo(f"wrote  {path} and .jsonl")
    if crashed := [one for one in results if one.crashed]:
        raise UserError(
            f"{len(crashed)} runs crashed, the first: {crashed[0].crashed}", "run it again: the others are kept"
        )


def _stem(subset: str, case: Sequence[str] | None, modes: Sequence[str]) -> Iterator[str]:
    """Of the file's name: reports of other commits, and of a part, lie beside it."""
    from lumina.verify.report import about

    yield time.strftime("%Y-%m-%d")
    yield subset
    yield from (name.replace(" ", "_") for name in case or ())
    yield from ["alone"] if set(modes) == {"off"} else []
    yield from [said.replace("+", "-changed")] if (said := about()["commit"]) else []


def _arm(row: dict[str, Any]) -> Arm:
    from lumina.verify.gauntlet.arms import Result

    return Result.of(row).arm


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


def _read(path: Path, frozen: bool = False) -> list[Result]:
    """The results of a raw file, whose first line may say what it is of; `frozen` ones are of nobody watching, and
    refused where what is done to a run is not what it was."""
    from lumina.verify.gauntlet.arms import Result
    from lumina.verify.gauntlet.cases import CASES, SUITES

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}", "name a .jsonl file of `--out`") from error
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json_.loads(line)
            if row.get("t", "arm") != "arm":
                continue
            result = Result.of(row)
            for name, known in ((result.arm.case, CASES), (result.arm.suite, SUITES)):
                if name not in known:
                    raise ValueError(f"{name}: known are {', '.join(known)}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wrong = f"{path}:{number}: not a result of a gauntlet: {type(error).__name__}: {error}"
            raise UserError(wrong, "each line is an object with case, kind, seed, mode and loss") from error
        if frozen and result.arm.mode == "off" and not result.crashed:
            if row.get("terms") != result.arm.terms:
                wrong = f"{path}:{number}: {result.arm.case} is not what it was when this was taken"
                raise UserError(wrong, "take the runs alone again: --mode off")
            found.append(result)
        elif not frozen:
            found.append(result)
    return found
