"""`lumina gauntlet`: does the orchestrator rescue broken runs, and leave sound ones alone?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from lumina.cli.output import Json, print_json, print_table
from lumina.errors import UserError

Case = Annotated[list[str] | None, typer.Option(help="This fault or trap alone; may be repeated.", show_default=False)]
Kind = Annotated[list[str] | None, typer.Option(help="This kind alone; may be repeated.", show_default=False)]
Mode = Annotated[list[str] | None, typer.Option(help="advise or act; may be repeated.", show_default="act")]
Out = Annotated[Path | None, typer.Option(help="Folder for a dated report: Markdown, and every run as a JSON line.")]


def gauntlet(
    case: Case = None,
    kind: Kind = None,
    mode: Mode = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each case and kind.")] = 1,
    first: Annotated[int, typer.Option(min=0, help="The first seed.")] = 80,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side, one core each.")] = 2,
    out: Out = None,
    json: Json = False,
) -> None:
    """Break runs on purpose, and set traps for sound ones: what the orchestrator makes of them, in tables.

    With --out, runs that an interrupted one of this commit and day had done are not taken again.
    """
    from lumina.telemetry.console import Console
    from lumina.verify import gauntlet as running
    from lumina.verify import report, scoring
    from lumina.verify.faults import CASES, KINDS, SOUND

    cases = [name for name in CASES if name not in SOUND]
    names, kinds, modes = case or cases, kind or list(KINDS), mode or ["act"]
    for given, known, what in (
        (names, list(CASES), "case"),
        (kinds, list(KINDS), "kind"),
        (modes, ["advise", "act"], "mode"),
    ):
        if unknown := [one for one in given if one not in known]:
            raise UserError(f"--{what} {unknown[0]}: there is no such {what}", fix=f"known: {', '.join(known)}")
    arms = running.arms([CASES[name] for name in names], kinds, range(first, first + seeds), modes)
    if not any(arm.mode != "off" for arm in arms):
        of = ", ".join(CASES[names[0]].kinds)
        raise UserError(f"--case {names[0]}: not for --kind {', '.join(kinds)}", fix=f"it is for {of}")
    path = out / f"{time.strftime('%Y-%m-%d')}-gauntlet.md" if out else None
    raw = path.with_suffix(".jsonl") if path else None
    before = [running.Result.of(row) for row in report.earlier(raw)]
    before = [result for result in before if result.arm in arms]
    log, done = report.Raw(raw, keep=bool(before)), len(before)
    with Console(1, quiet=json) as console:
        console.progress("runs", done, len(arms))

        def tell(result: running.Result) -> None:
            nonlocal done
            done += 1
            log(result.plain())
            console.progress("runs", done, len(arms))

        results = running.train_all(arms, workers, tell, before)
    if path:
        options = [f"--case {name!r}" for name in case or []]
        options += [f"--kind {one}" for one in kind or []] + [f"--mode {one}" for one in mode or []]
        command = " ".join(["lumina gauntlet", *options, f"--seeds {seeds} --first {first}"])
        with report.refusing(path):
            path.write_text(scoring.page(results, command), encoding="utf-8")
    if json:
        print_json(scoring.as_json(results))
        return
    found = running.scores(results)
    for _, made in scoring.tables(found):
        if made[1]:
            typer.echo("")
            print_table(*made, left=3)
    typer.echo(f"\n{scoring.summary(found)}")
    if path:
        typer.echo(f"wrote  {path} and .jsonl")
