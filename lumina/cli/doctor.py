"""`lumina doctor`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from lumina.cli.output import Json, print_json
from lumina.cli.train import Root
from lumina.run.exit_codes import USER_ERROR


def doctor(
    md: Annotated[bool, typer.Option("--md", help="As the block that a bug report or pull request wants.")] = False,
    json: Json = False,
    root: Root = Path("runs"),
) -> None:
    """What this machine is and can do, what is missing, and what to do about it.

    Exits with 0 if training can start here, else with 2.
    """
    from lumina.training.doctor import examine, usable_here

    report = examine(root)
    if json:
        print_json(report)
    else:
        lines = _lines(report)
        typer.echo(_nameless("\n".join(["```", *lines, "```"] if md else lines)))
    if not usable_here(report):
        raise typer.Exit(USER_ERROR)


def _nameless(text: str) -> str:
    """The home folder as ~: reports are public. A root as home names nobody, and is in every path."""
    home = str(Path.home())
    return text if home == "/" else re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text)


def _lines(report: dict[str, Any]) -> list[str]:
    from lumina.telemetry.figures import count, size

    lines = [f"! {what}\n  fix: {fix}" for what, fix in report["problems"]]
    versions = [f"{name} {value}" for name, value in report["versions"].items() if value]
    system, memory = report["system"], report["memory"]
    lines += [f"versions  {', '.join(versions)}", f"system    {system['platform']}"]
    if "cpu" in report["devices"]:
        cpu = report["devices"]["cpu"]
        cores = f"{cpu['cores_usable']} of {system['cores']} cores usable"
        lines.append(f"cpu       {system['cpu']}, {cores}, {' '.join(cpu['features']) or 'neither AVX nor AMX'}")
    limit = "" if memory["usable"] == memory["total"] else f", this container may use {size(memory['usable'])}"
    lines.append(f"memory    {size(memory['total'])}, {size(memory['available'])} free{limit}")
    for gpu in report["devices"].get("cuda", []):
        lines.append(f"cuda      {gpu['name']}, {size(gpu['memory'])}, compute capability {gpu['capability']}")
    if "mps" in report["devices"]:
        lines.append(f"mps       {'multiplies' if report['devices']['mps']['bf16'] else 'does not multiply'} bf16")
    if "cuda" not in report["devices"] and "mps" not in report["devices"]:
        lines.append("gpu       none found")
    lines += [f"auto      {key} = {value}" for key, value in report["choices"].items()]
    for folder in report["folders"]:
        state = f"{count(folder['free'] / 1e9)} GB free" if folder["writable"] else "not writable"
        lines.append(f"folder    {folder['what']}: {folder['path']}, {state}")
    for extra, facts in report["extras"].items():
        state = f"missing {', '.join(facts['missing'])}" if facts["missing"] else "here"
        lines.append(f"optional  [{extra}] {state}; gives {facts['gives']}")
    return lines
