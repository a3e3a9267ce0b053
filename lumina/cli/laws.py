"""`lumina fit-laws`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lumina.cli.output import Json, print_json, print_table
from lumina.errors import UserError
from lumina.visible import visible

if TYPE_CHECKING:
    from lumina.planner.laws import Interval, Law

BUDGETS = (1, 10, 100)  # times the most compute of a point
NAMES = {"E": "E", "A": "A", "B": "B", "alpha": "α", "beta": "β"}


def fit_laws(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of finished runs, or one CSV file: params,tokens,loss.", show_default=False),
    ] = None,
    counts: Annotated[
        Literal["active", "total", "non_embedding"], typer.Option(help="Which parameters a CSV file counts.")
    ] = "active",
    bootstrap: Annotated[int, typer.Option(min=100, help="Draws for the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    forget: Annotated[bool, typer.Option("--forget", help="Remove my law; the default is used again.")] = False,
    json: Json = False,
) -> None:
    """Fit my own scaling law, with intervals; plans use it from then on.

    L = E + A/N^α + B/D^β in nats a token. At least 3 sizes at 3 numbers of tokens each, of one text, tokenizer,
    sequence length and kind of model.
    """
    from lumina.planner import own
    from lumina.planner.fit import fit
    from lumina.planner.laws import to_values

    if forget:
        _forget(bool(sources), json)
        return
    points, source, traits, said = _points(sources or [], counts)
    law = fit(points, bootstrap, seed, source, counts, traits)
    before = own.path().exists()
    told = _told(law) | said | {"saved": str(own.write(to_values(law)))}
    if json:
        print_json(told)
        return
    _say(law, told)
    typer.echo(f"kept in {told['saved']}{', instead of the one before' * before}; plans use it from now on")
    typer.echo("back to the default: lumina fit-laws --forget")


def _forget(more: bool, json: bool) -> None:
    from lumina.planner import own
    from lumina.planner.laws import DEFAULT

    if more:
        raise UserError("--forget takes no runs and no file", "forget first, then fit")
    there = own.forget()
    if json:
        print_json({"forgotten": there, "law": DEFAULT})
    else:
        typer.echo(f"{'your law is gone' if there else 'there was no law of yours'}; plans use {DEFAULT}")


def _points(sources: list[Path], counts: str) -> tuple[list[Any], str, dict[str, str], dict[str, Any]]:
    """The points, where they are from, what their runs have in common, and what is to be said about them."""
    from lumina.planner.points import points_of, read_points

    files = [source for source in sources if source.is_file()]
    if not sources or len(files) > 1 or (files and len(sources) > 1):
        fix = "lumina fit-laws runs/*, or lumina fit-laws points.csv with a first line params,tokens,loss"
        raise UserError("a law is fitted to folders of runs, or to one CSV file", fix)
    if files:
        return read_points(files[0]), f"points of {files[0].name}", {}, {"left_out": [], "warnings": []}
    if counts != "active":
        raise UserError(f"--counts {counts}: of runs the active parameters count", "leave it out")
    runs = points_of(sources)
    if not runs.points:
        problems = runs.left_out[:5] + ["…"] * (len(runs.left_out) > 5)
        raise UserError.collect(problems, "none of these is a finished run", "finish some: lumina resume RUN")
    about = ", ".join(f"{name} {value}" for name, value in runs.traits.items() if value)
    return (
        runs.points,
        f"{len(runs.points)} runs of lumina: {about}",
        runs.traits,
        {"left_out": runs.left_out, "warnings": runs.warnings},
    )


def _told(law: Law) -> dict[str, Any]:
    """The law as plain values, each constant with intervals."""
    assert law.span
    most = 6 * law.span.params[1] * law.span.tokens[1]
    return {
        "law": law.name,
        "source": law.source,
        "counts": law.counts,
        **{key: _constant(law, key) for key in NAMES},
        "note": law.note,
        "span": {"params": list(law.span.params), "tokens": list(law.span.tokens)},
        "optimum": [_optimum(law, times * most) for times in BUDGETS],
        "draws": len(law.draws),
    }


def _constant(law: Law, key: str) -> dict[str, Any]:
    def value(law: Law) -> float:
        return float(getattr(law, key))

    return {
        "value": value(law),
        **{f"{level:.0%}": _ends(law.interval(value, level)) for level in (0.8, 0.95)},
    }


def _optimum(law: Law, flops: float) -> dict[str, Any]:
    """The best split of `flops`, with its 80 % intervals, and whether the law was fitted to such runs."""
    best = law.optimum(flops)
    return {
        "flops": flops,
        "params": best.params,
        "params_80%": _ends(law.interval(lambda law: law.optimum(flops).params)),
        "tokens": best.tokens,
        "tokens_80%": _ends(law.interval(lambda law: law.optimum(flops).tokens)),
        "loss": law.loss(*best),
        "loss_80%": _ends(law.interval(lambda law: law.loss(*law.optimum(flops)))),
        "outside": law.outside(*best),
    }


def _ends(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def _say(law: Law, told: dict[str, Any]) -> None:
    typer.echo(visible(f"L = E + A/N^α + B/D^β, nats a token; N: {law.counts} parameters, D: tokens"))
    typer.echo(visible(law.source))
    for fact in law.note.split("; "):
        typer.echo(f"{'! ' * fact.startswith('doubtful')}{fact}")
    typer.echo()
    constants = [
        [NAMES[key], f"{told[key]['value']:.4g}", *(_range(told[key][level]) for level in ("80%", "95%"))]
        for key in NAMES
    ]
    print_table(["", "value", "80 %", "95 %"], constants)
    typer.echo(f"80 and 95 % of {told['draws']} draws; they cover the fit's error, not that the form may be wrong\n")
    rows = [
        [
            f"{row['flops']:.2g}",
            *(f"{row[key]:.3g} ({_range(row[f'{key}_80%'])})" for key in ("params", "tokens")),
            f"{row['tokens'] / row['params']:.3g}",
            f"{row['loss']:.3f} ({_range(row['loss_80%'])})",
            "extrapolated" if row["outside"] else "",
        ]
        for row in told["optimum"]
    ]
    print_table(["FLOPs", "best parameters (80 %)", "tokens (80 %)", "a parameter", "loss (80 %)", ""], rows)
    low, high = law.span.params if law.span else (0, 0)
    first, last = law.span.tokens if law.span else (0, 0)
    typer.echo(f"fitted to {low:.3g} to {high:.3g} parameters and {first:.3g} to {last:.3g} tokens\n")
    for sentence in told["left_out"]:
        typer.echo(visible(f"left out {sentence}"))
    for sentence in told["warnings"]:
        typer.echo(visible(f"! {sentence}"))


def _range(ends: list[float]) -> str:
    return f"{ends[0]:.4g} to {ends[1]:.4g}"
