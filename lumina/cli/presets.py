"""`lumina presets`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from lumina.cli.output import Json, print_json, print_table


def presets(
    name: Annotated[
        str | None, typer.Argument(help="One preset: its shape, in all four kinds.", show_default=False)
    ] = None,
    kind: Annotated[str | None, typer.Option(help="dense, moe, mod or hybrid, not the preset's own.")] = None,
    json: Json = False,
) -> None:
    """What each preset costs: parameters, FLOPs, bytes.

    Active parameters are those that a token meets which takes every block; the mean counts a routed block by its
    capacity. The peak is what training takes in memory, one sequence at a time; it fits or not into this machine's.
    """
    from lumina.config.resolve import presets as names
    from lumina.config.schema.model import KINDS
    from lumina.telemetry.figures import count, size
    from lumina.training.memory import usable

    kinds = [kind] if kind else KINDS
    chosen = [(name, each) for each in kinds] if name else [(each, kind) for each in names()]
    rows = sorted((_row(*pair) for pair in chosen), key=lambda row: row["active"])
    if json:
        print_json(rows)
        return
    if name:
        keys = list(dict.fromkeys(key for row in rows for key in row["model"] if key != "kind"))
        shapes = [[key, *(str(row["model"].get(key, "-")) for row in rows)] for key in keys]
        print_table(["model.", *(row["kind"] for row in rows)], shapes)
        typer.echo()
    header = [
        "preset",
        "kind",
        "total",
        "active",
        "mean",
        "FLOP a trained token",
        "weights",
        "gradients",
        "optimizer",
        "peak",
        "KV a token",
    ]
    table = [
        [
            row["preset"],
            row["kind"],
            *(count(row[key]) for key in ("total", "active", "active_mean", "flops_per_token")),
            *(size(row[key]) for key in ("weights", "gradients", "moments", "peak", "kv_bytes_per_token", "kv_bytes")),
            "yes" if row["fits"] else "no",
        ]
        for row in rows
    ]
    print_table([*header, "KV full", "fits"], table, left=2)
    typer.echo(f"\nfits: into the {size(usable())} of main memory here, one sequence at a time")


def _row(name: str, kind: str | None) -> dict[str, Any]:
    from lumina.config.resolve import flatten, resolve
    from lumina.model.cost import count, state_bytes
    from lumina.planner.memory import memory
    from lumina.planner.remedies import smallest
    from lumina.training.memory import usable

    config = resolve(name, {"model.kind": kind} if kind else {}).config
    cost = count(config.model)
    state = state_bytes(config.model, config.train.optimizer, config.precision.mode)
    peak = memory(smallest(config)).total
    return {
        "preset": name,
        "kind": config.model.kind,
        **asdict(cost),
        "kv_bytes": cost.kv_bytes_per_token * config.model.seq_len,
        **asdict(state),
        "peak": peak,
        "fits": peak <= usable(),
        "model": {key.removeprefix("model."): v for key, v in flatten(config).items() if key.startswith("model.")},
    }
