"""`lumina gauntlet`: does the orchestrator rescue broken runs, and leave sound ones alone?"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lumina.cli.output import Json, print_json, print_table
from lumina.errors import UserError
from lumina.run.exit_codes import BUG

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
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for a dated report: Markdown, and every run as a JSON line (--score: Markdown alone)."),
]


def gauntlet(
    subset: Subset = "tuned",
    case: Case = None,
    kind: Kind = None,
    mode: Mode = None,
    others: Others = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each case and kind.")] = None,
    first: Annotated[int | None, typer.Option(min=0, help="The first seed.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side, one core each.")] = 2,
    calibration: Calibration = None,
    score: Score = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Break runs on purpose, and set traps for sound ones: what the orchestrator makes of them, in tables.

    With --out, runs that an earlier one of this commit and machine had done are not taken again. Exit code 1 if a run
    of `--subset ci` does not end as it has to.
    """
    from lumina.telemetry.console import Console
    from lumina.verify import report
    from lumina.verify.gauntlet import page, raw, running, scoring
    from lumina.verify.gauntlet.arms import watcher
    from lumina.verify.gauntlet.cases import CASES, CI, KINDS, SUITES

    named: dict[str, Any] = {
        "--subset": subset if subset != "tuned" else None,
        "--case": case,
        "--kind": kind,
        "--mode": mode,
    }
    named |= {"--others": others or None, "--seeds": seeds, "--first": first, "--calibration": calibration}
    asked = {name: given for name, given in named.items() if given is not None}
    if score:
        if asked:
            raise UserError(f"{next(iter(asked))}: --score takes whatever is in its files", "leave it out")
        _score(score, out, json)
        return
    names, kinds, modes = case or list(CASES), kind or list(KINDS), mode or ["act"]
    for given, there_are, what in (
        ([subset], list(SUITES), "subset"),
        (names, list(CASES), "case"),
        (kinds, list(KINDS), "kind"),
    ):
        if strange := [one for one in given if one not in there_are]:
            raise UserError(f"--{what} {strange[0]}: there is no such {what}", fix=f"known: {', '.join(there_are)}")
    for who in modes:
        watcher(who)
    suite = SUITES[subset]
    begin, count = suite.seeds[0] if first is None else first, seeds or len(suite.seeds)
    of = range(begin, begin + count)
    arms = running.arms(suite, [CASES[name] for name in names], kinds, of, [one for one in modes if one != "off"])
    if not arms:
        told = "the healthy runs are taken with the faults that are held against them, and a set may have few cases"
        raise UserError(f"--case {', '.join(names)}: none for these kinds in {subset}: {told}", "name others")
    arms += [arm for arm in running.others(arms, of) if arm not in arms] if others else []
    frozen = raw.frozen(calibration, arms) if calibration else {}
    options = list(_options(asked))
    stem = "-".join([time.strftime("%Y-%m-%d"), subset, *options, *_commit()]) if out else ""
    path, log_path = (out / f"{stem}.md", out / f"{stem}.jsonl") if out else (None, None)
    known = [frozen[arm] for arm in arms if arm in frozen]
    known += [one for one in (raw.earlier(out, arms) if out else []) if one.arm not in frozen]
    there = raw.logged(log_path) if log_path else []
    log = report.Raw(log_path, keep=bool(there))
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
        command = " ".join(["lumina gauntlet", *_command(asked)])
        told = f"{len(frozen)} of the {len(arms)} runs, which nobody watched, are those of `{calibration}`."
        _write(path, page.page(results, command, told if frozen else ""))
    _show(results, json)
    if path and not json:
        typer.echo(f"wrote  {path} and .jsonl")
    if crashed := [one for one in results if one.crashed]:
        raise UserError(
            f"{len(crashed)} runs crashed, the first: {crashed[0].crashed}", "run it again: the others are kept"
        )
    if suite is CI and (bad := page.wrong(scoring.scores(results))):
        typer.echo(f"! not as it has to be: {'; '.join(bad)}", err=True)
        raise typer.Exit(BUG)


def _score(files: Sequence[Path], out: Path | None, json: bool) -> None:
    """Of runs that were taken already; the page is named as the last file."""
    from lumina.verify.gauntlet import page, raw

    results = raw.read(files)
    path = out / f"{files[-1].stem}.md" if out else None
    if path:
        command = " ".join(["lumina gauntlet", *(f"--score {shlex.quote(str(file))}" for file in files)])
        _write(path, page.page(results, command, taken=raw.origins(files)))
    _show(results, json)
    if path and not json:
        typer.echo(f"wrote  {path}")


def _write(path: Path, page: str) -> None:
    from lumina.verify.report import refusing

    with refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")


def _command(asked: Mapping[str, Any]) -> Iterator[str]:
    """The options that it was asked for."""
    for option, given in asked.items():
        values = given if isinstance(given, list) else [given]
        yield from (option if one is True else f"{option} {shlex.quote(str(one))}" for one in values)


def _options(asked: Mapping[str, Any]) -> Iterator[str]:
    """What makes it a part, or another one: so that the reports of several lie beside each other."""
    if asked.get("--mode") == ["off"]:
        asked = {**asked, "--mode": ["alone"]}
    for option in ("--case", "--kind", "--mode"):
        yield from (re.sub(r"[^\w.]+", "_", name) for name in asked.get(option, ()) if name != "act")
    for option, said in (("--others", "others"), ("--seeds", "{}_seeds"), ("--first", "from_{}")):
        if option in asked:
            yield said.format(asked[option])


def _commit() -> list[str]:
    from lumina.verify.report import about

    return [said.replace("+", "-changed")] if (said := about()["commit"]) else []


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
    for line in (page.summary(found), page.unknown(found)):
        if line:
            typer.echo(f"\n{line}")
