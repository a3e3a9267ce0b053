"""`lumina verify`: what is promised of a run, checked on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lumina.cli.output import Json, print_json, print_table
from lumina.run.exit_codes import BUG

if TYPE_CHECKING:
    from lumina.verify.resume import Event, Outcome

Preset = Annotated[str, typer.Argument(help="The preset whose runs are killed.")]
Kills = Annotated[int, typer.Option(min=1, help="How many, spread over configurations that cover all pairs.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the moments; those by the clock fall elsewhere every time.")]
Workers = Annotated[int, typer.Option(min=1, help="Configurations side by side, one core each.")]
Configuration = Annotated[str, typer.Option(help="All kills in this one, such as hybrid-muon-fp32-x2-base.")]
Out = Annotated[Path | None, typer.Option(help="Folder for a dated report: Markdown, and every kill as a JSON line.")]


def resume(
    preset: Preset = "tiny",
    kills: Kills = 20,
    seed: Seed = 0,
    workers: Workers = 2,
    configuration: Configuration = "",
    out: Out = None,
    json: Json = False,
) -> None:
    """Kill runs at random moments and hold what they become against runs that were left alone, at zero tolerance."""
    from lumina.telemetry.console import Console
    from lumina.verify import report
    from lumina.verify import resume as resuming

    outcome = resuming.plan(preset, kills, seed, configuration)
    name = f"{time.strftime('%Y-%m-%d')}-resume-{preset}"
    log = report.Raw(out / f"{name}.jsonl" if out else None)
    try:
        with Console(1, quiet=json) as console:
            console.progress("killing runs", 0, kills)

            def listen(event: Event) -> None:
                log(event)
                if event["t"] == "verdict":
                    console.write(report.verdict_line(outcome, event))
                console.progress("killing runs", len(outcome.kills), kills)

            resuming.verify(outcome, workers, listen)
    finally:  # also of what was found before an interruption
        _tell(outcome, out / f"{name}.md" if out else None, json)
    if outcome.failed:
        raise typer.Exit(BUG)


def _tell(outcome: Outcome, out: Path | None, json: bool) -> None:
    from lumina.verify import report

    if out:
        with report.refusing(out):
            out.write_text(report.page(outcome), encoding="utf-8")
    if json:
        print_json(report.as_json(outcome))
        return
    if outcome.kills:
        typer.echo("")
        print_table(*report.moments(outcome))
    typer.echo(f"\n{report.summary(outcome)}")
    for line in report.complaints(outcome):
        typer.echo(line)
    if out:
        typer.echo(f"wrote  {out} and .jsonl")


def corruption(json: Json = False) -> None:
    """Damage copies of a run in every known way: it must be seen, said, and never loaded."""
    from lumina.telemetry.console import Console
    from lumina.verify import corruption as damaging

    with Console(1, quiet=json) as console:
        findings, kept = damaging.verify(console.progress)
    wrong = sum(bool(finding.problem) for finding in findings)
    if json:
        print_json({"damages": damaging.as_json(findings), "wrong": wrong, "kept": str(kept) if kept else None})
    else:
        print_table(*damaging.rows(findings), left=5)
        verdict = f"{wrong} met in the wrong way" if wrong else "each one seen, said and passed over"
        typer.echo(f"\n{len(findings)} kinds of damage, {verdict}")
        if kept:
            typer.echo(f"! the damaged copies lie in {kept}")
    if wrong:
        raise typer.Exit(BUG)
