"""`lumina rescue`: a run is broken in front of you, and saved."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from lumina.cli.output import Json, print_json, say
from lumina.errors import UserError

LOG_EVERY = 50


def rescue(
    case: Annotated[str, typer.Option(help="What is done to it: a fault of `lumina gauntlet`.")] = "junk",
    kind: Annotated[str, typer.Option(help="dense, moe or mod.")] = "moe",
    seed: Annotated[int, typer.Option(min=0, help="Draws the weights, the data, and when it is broken.")] = 7,
    root: Annotated[Path, typer.Option(help="Folder for the run that is rescued.")] = Path("runs"),
    json: Json = False,
) -> None:
    """Break a small run on purpose, first with nobody watching, then with the orchestrator; under two minutes.

    Ends with the incident report. The rescued run stays, to be looked at.
    """
    from lumina.byhand import open_run
    from lumina.cli.act import report
    from lumina.events import as_plain
    from lumina.run.lock import RunLock
    from lumina.telemetry.console import Console
    from lumina.training.endings import Stopped
    from lumina.verify.gauntlet.arms import Arm, begin, lead
    from lumina.verify.gauntlet.cases import CASES, TUNED

    known = [name for name, one in CASES.items() if one.fault and not one.late]
    if case not in known:
        raise UserError(f"--case {case}: no fault of a short run", fix=f"known: {', '.join(known)}")
    if kind not in CASES[case].kinds:
        raise UserError(f"--kind {kind}: there is no such kind", fix=f"known: {', '.join(CASES[case].kinds)}")
    arms = {mode: Arm(case, kind, seed, mode, TUNED.name) for mode in ("off", "act")}
    step, text = arms["act"].step, CASES[case].text.format(size=TUNED.size(CASES[case])).partition(": ")[2]
    told = _nowhere if json else say
    ends: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory(prefix="lumina-rescue-") as folder:
        told(f"1. A healthy run, {arms['act'].root.steps} steps of it.\n")
        with Console(LOG_EVERY, _nowhere if json else None) as console:
            healthy = lead(arms["act"].root, Path(folder) / "healthy", [console])

        def train(title: str, arm: Arm, where: Path, name: str) -> Path:
            told(f"\n{title}\n")
            with Console(LOG_EVERY, _nowhere if json else _short) as console:
                session = begin(arm, healthy, where, [console])
                with suppress(Stopped), RunLock(session.run.lock):  # which the console has said
                    session.train()
            losses = [event["loss"] for event in session.run.events() if event["t"] == "eval"]
            ends[name] = losses[-1] if losses else None
            return session.run.path

        sound = Arm("healthy", kind, seed, "off", TUNED.name)
        train("2. Where it would go from there, if nothing happened.", sound, Path(folder) / "sound", "healthy")
        train(f"3. From step {step} on: {text}. Nobody watches.", arms["off"], Path(folder) / "alone", "alone")
        path = train("4. The same once more, and the orchestrator watches.", arms["act"], root, "watched")
    opened = open_run(str(path), root)
    if json:
        print_json(
            as_plain({"run": str(path), "fault": case, "step": step, "loss": ends, "decisions": opened.decisions()})
        )
        return
    told("\n5. What it says of it.\n")
    report(opened)
    shown = ", ".join(f"{name} {'no end' if loss is None else format(loss, '.4f')}" for name, loss in ends.items())
    told(f"\nFinal held-out loss, nats a token: {shown}.")
    told(f"See also  lumina decisions {path}   and docs/gauntlet.md")


def _short(line: str) -> None:
    """What becomes of the run, without what it is."""
    if line.startswith(("[Step", "[Eval", "!", "back", "end")):
        say(line)


def _nowhere(line: str) -> None:
    pass
