"""What verifying found, as tables for people and as plain values for programs."""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import lumina
from lumina.bench.report import table
from lumina.compat import usable_cores
from lumina.errors import UserError
from lumina.planner.hardware import cpu_name
from lumina.telemetry.figures import duration
from lumina.training.host import commit
from lumina.verify.configurations import EVERY, STEPS
from lumina.verify.moments import PLACES
from lumina.verify.resume import Event, Outcome

PLACE = ("machine", "torch", "python")  # what equal bits need; the sample text is that of Python's own library
Table = tuple[list[str], list[list[str]]]
ORDER = [*(place.name for place in PLACES), "between", "preparing"]

MEANING = (
    f"Each run trains {STEPS} steps and saves every {EVERY}. SIGKILL ends its process and the same command goes on, "
    "again and again, until it comes to its end; then every tensor of the final checkpoint (bit by bit), its plain "
    "values, and every event that training determines are compared with those of the same run left alone. A kill is "
    "*exact* before, inside (at one function call, or at one operation on the disk) or after a function of the run, or "
    "by the *clock*, at a random time. Lost are the steps that were computed and have to be computed again."
)


def summary(outcome: Outcome) -> str:
    """One sentence."""
    failed = len(outcome.failed)
    lost = [kill["lost"] for kill in outcome.kills] or [0]
    early = "" if outcome.complete else f"stopped early, {outcome.wanted} were wanted: "
    return (
        f"{early}{_count(len(outcome.kills), 'kill')} in {_count(len(outcome.verdicts), 'configuration')}, "
        f"{_count(failed, 'mismatch', 'mismatches')}; lost steps: {statistics.median(lost):g} in the median, "
        f"{max(lost)} at most, with a checkpoint every {EVERY}; {duration(outcome.seconds)}"
    )


def moments(outcome: Outcome) -> Table:
    """Kills by what the run was doing."""
    seen = sorted({kill["moment"] for kill in outcome.kills}, key=lambda name: (_order(name), name))
    rows = []
    for name in seen:
        kills = [kill for kill in outcome.kills if kill["moment"] == name]
        ways = [str(sum(_way(kill) == way for kill in kills)) for way in ("before", "inside", "after", "clock")]
        rows.append([name, str(len(kills)), *ways, *_lost(kills)])
    return ["killed while", "kills", "before", "inside", "after", "by the clock", "lost, median", "most"], rows


def configurations(outcome: Outcome) -> Table:
    """What each configuration went through."""
    rows = []
    for verdict in outcome.verdicts:
        kills = [kill for kill in outcome.kills if kill["configuration"] == verdict["configuration"]]
        result = "NOT EQUAL" if verdict["problems"] else "equal"
        figures = [str(len(kills)), str(verdict["rounds"]), *_lost(kills), f"{verdict['seconds']:.1f}", result]
        rows.append([verdict["configuration"], *figures])
    return ["configuration", "kills", "runs", "lost, median", "most", "seconds", "result"], rows


def complaints(outcome: Outcome) -> list[str]:
    """What failed, with what differs first, where it lies and how it is reproduced."""
    lines = []
    for verdict in outcome.failed:
        name = verdict["configuration"]
        kills = next(job.kills for job in outcome.jobs if job.name == name)
        lines += [f"! {name}, seed {outcome.seed}: {problem}" for problem in verdict["problems"]]
        lines.append(f"    its runs:     {outcome.folder}/{name}")
        settings = f"--kills {kills} --seed {outcome.seed} --configuration {name}"
        lines.append(f"    again:        lumina verify resume {shlex.quote(outcome.preset)} {settings}")
    return lines


def verdict_line(outcome: Outcome, verdict: Event) -> str:
    """What is said when a configuration is done."""
    width = max(len(job.name) for job in outcome.jobs)
    result = "! NOT EQUAL" if verdict["problems"] else "equal"
    kills = [kill["lost"] for kill in outcome.kills if kill["configuration"] == verdict["configuration"]]
    runs = _count(verdict["rounds"], "run")
    lost = f"lost {_count(max(kills), 'step')} at most" if any(kills) else "nothing lost"
    done = f"{_count(verdict['kills'], 'kill')} in {runs}, {lost}, {verdict['seconds']:.0f}s"
    return f"{result}  {verdict['configuration']:{width}}  {done}"


def page(outcome: Outcome) -> str:
    """The dated report."""
    lines = [f"# Resuming after SIGKILL, {outcome.preset}", "", f"**{summary(outcome)}.** {circumstances()}."]
    lines += ["", MEANING, "", f"Seed {outcome.seed}. Raw: every kill is a line of the file beside this one."]
    if outcome.failed:
        lines += ["", "```", *complaints(outcome), "```"]
    told = "\n".join(lines) + "\n"
    return told + table("Moments", *moments(outcome)) + table("Configurations", *configurations(outcome))


def earlier(path: Path | None) -> list[Event]:
    """What a raw log holds already, if it is of this commit and `PLACE`; nothing otherwise."""
    if path is None or not path.exists():
        return []
    with refusing(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    try:  # a kill may have torn the last line
        rows = [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]
    except ValueError:  # none of ours
        return []
    if not all(isinstance(row, dict) for row in rows):
        return []
    (first, *rest), now = rows or [{}], about()
    named = now["commit"] and not now["commit"].endswith("+")
    same = all(first.get(name) == now[name] for name in ("commit", *PLACE))
    return rest if named and same else []


class Raw:
    """The raw log of an outcome: one JSON object a line, written as it comes, behind what is kept of one that is there;
    nothing without a path."""

    def __init__(self, path: Path | None, keep: bool = False) -> None:
        self.path = path
        if path and not keep:
            with refusing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"t": "about", **about()}) + "\n", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        if self.path:
            with refusing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}", fix="choose another folder") from error


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Everything, kills and verdicts included."""
    return {
        "about": about(),
        "preset": outcome.preset,
        "seed": outcome.seed,
        "complete": outcome.complete,
        "mismatches": len(outcome.failed),
        "seconds": round(outcome.seconds, 1),
        "verdicts": outcome.verdicts,
        "kills": outcome.kills,
    }


def about() -> dict[str, Any]:
    """Machine, versions and commit."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": f"{cpu_name()} ({platform.machine()}, {usable_cores()} cores)",
        "lumina": lumina.__version__,
        "commit": commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def circumstances(facts: Mapping[str, Any] | None = None) -> str:
    """`about`, or what is known of these facts, in one sentence."""
    facts = about() if facts is None else facts
    code = {"lumina": f"{facts['lumina']} at {facts.get('commit') or 'no commit'}"} if "lumina" in facts else {}
    known = {"date": "", "machine": "", "lumina": "lumina ", "torch": "torch ", "python": "Python "}
    return ", ".join(f"{word}{(dict(facts) | code)[name]}" for name, word in known.items() if name in facts)


def _way(kill: Event) -> str:
    """before, inside, after, or clock"""
    first = str(kill["when"]).split(" ", 1)[0]
    return "clock" if kill["way"] == "clock" else first if first in ("before", "after") else "inside"


def _lost(kills: Sequence[Event]) -> list[str]:
    lost = [kill["lost"] for kill in kills]
    return [f"{statistics.median(lost):g}", str(max(lost))] if lost else ["-", "-"]


def _order(name: str) -> int:
    first = name.split(" + ")[0]
    return ORDER.index(first)


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"
