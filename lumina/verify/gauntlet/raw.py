"""Raw files of results: a line for each run, an object, of our trainer or of any other's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lumina.errors import UserError
from lumina.verify import report
from lumina.verify.gauntlet.arms import Arm, Result
from lumina.verify.gauntlet.cases import CASES, SUITES, TUNED
from lumina.verify.gauntlet.policies import POLICIES

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # who stopped a run that has to be taken again


class _Read(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Decision(_Read):
    step: int
    kind: Literal["act", "advise"]
    rule: str = ""
    action: str = ""
    cause: str = ""
    reason: str = ""


class _Row(_Read):
    case: str
    kind: str
    seed: int
    mode: str
    loss: float | None
    suite: str = TUNED.name
    steps: int = 0
    stopped: str = ""
    crashed: str = ""
    failed: str = ""
    decisions: list[_Decision] | None = None
    trials: list[dict[str, Any]] = []
    taken: float = 0.0
    digest: str = ""
    fault: int | None = None
    seconds: float = 0.0
    told: bool = True
    shared: int | None = None


def result(row: Any) -> Result:
    """The run of a line. Only case, kind, seed, mode and loss have to be there; a loss of null or NaN is infinite, and
    that of a run that did not come to its end.

    Raises `ValueError` where something is missing, of another type, or of a case that nobody knows.
    """
    one = _Row.model_validate(row)
    for name, known in ((one.case, CASES), (one.suite, SUITES)):
        if name not in known:
            raise ValueError(f"{name}: known are {', '.join(known)}")
    if one.taken and not one.steps:
        raise ValueError("taken: is compared with steps, which are missing")
    arm = Arm(one.case, one.kind, one.seed, one.mode, one.suite)
    deaf = {"off", *(name for name, policy in POLICIES.items() if policy.mode == "off")}  # `told` came later
    shared = arm.root.steps if "terms" in row else 0  # ours, written before `shared` was
    return Result(
        arm,
        math.inf if one.loss is None or math.isnan(one.loss) or one.stopped or one.crashed else one.loss,
        decisions=[said.model_dump() for said in one.decisions or ()],
        told=one.decisions is not None and one.told and one.mode not in deaf,
        shared=shared if one.shared is None else one.shared,
        trials=[{"kind": "", "undone": False, "reason": ""} | trial for trial in one.trials],
        **one.model_dump(include={"steps", "stopped", "crashed", "failed", "taken", "digest", "fault", "seconds"}),
    )


def read(paths: Sequence[Path]) -> list[Result]:
    """All results of these files.

    Raises `UserError` where one cannot be read, a line is no result, or a run is told twice; what crashed, or was
    stopped by a signal, may have been taken again.
    """
    found: dict[Arm, Result] = {}
    for path in paths:
        for number, row in _rows(path):
            if row.get("t", "arm") == "arm":
                one = _result(path, number, row)
                first = found.get(one.arm)
                if first and not _void(first):
                    wrong = f"{path}:{number}: {', '.join(map(str, one.arm.run))}, {one.arm.mode} is told a second time"
                    raise UserError(wrong, "leave one of them out")
                found[one.arm] = one
    return list(found.values())


def origins(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Where and when the runs of these files were taken, as far as they say."""
    return [row for path in paths for _, row in _rows(path) if row.get("t") == "about"]


def frozen(path: Path, wanted: Sequence[Arm]) -> dict[Arm, Result]:
    """The runs alone of a file that are `wanted`, taken as they are.

    Raises `UserError` if they are of another machine, torch or Python, where no run is the same to the bit, if what
    is done to a run is not what it was, or if none is wanted.
    """
    found, here, asked = dict[Arm, Result](), report.about(), set(wanted)
    for number, row in _rows(path):
        if row.get("t") == "about" and (other := [name for name in report.PLACE if row.get(name) != here[name]]):
            there = ", ".join(f"{name} {row.get(name)}" for name in other)
            raise UserError(
                f"{path}:{number}: its runs were taken with {there}; here it is "
                f"{', '.join(str(here[name]) for name in other)}, and no run would be the same to the bit",
                "take the runs alone here: --mode off",
            )
        if row.get("t", "arm") != "arm" or row.get("mode") != "off":
            continue
        one = _result(path, number, row)
        if one.arm in asked and not one.crashed:
            if row.get("terms") != one.arm.terms:
                wrong = f"{path}:{number}: {one.arm.case} is not what it was when this was taken"
                raise UserError(wrong, "take the runs alone again: --mode off")
            found[one.arm] = one
    if not found:
        raise UserError(
            f"{path}: none of its runs is one of these", "name the file of this set, with --subset as it was"
        )
    return found


def earlier(out: Path, wanted: Sequence[Arm]) -> list[Result]:
    """The results of these arms in raw files of this commit and place; what crashed, was stopped by a signal, or is
    another policy's, which may be another by now, is taken again."""
    found: dict[Arm, Result] = {}
    for log in sorted(out.glob("*.jsonl")):
        for row in report.earlier(log):
            if row.get("t") == "arm" and ":" not in row["mode"]:
                one = result(row)
                if row.get("terms") == one.arm.terms and not _void(one):
                    found[one.arm] = one
    return [found[arm] for arm in wanted if arm in found]


def logged(path: Path) -> list[Arm]:
    """Which arms a raw file holds that can be gone on with.

    Raises `UserError` if it holds results of a state of the code that nobody can name, and would be lost.
    """
    arms = [result(row).arm for row in report.earlier(path) if row.get("t") == "arm"]
    if not arms and path.exists() and any(row.get("t") == "arm" for _, row in _rows(path)):
        wrong = f"{path}: holds results already, and not of a commit that could be gone on with here"
        raise UserError(wrong, "commit what was changed, or name another folder")
    return arms


def _void(one: Result) -> bool:
    return bool(one.crashed) or one.stopped in SIGNALS


def _result(path: Path, number: int, row: dict[str, Any]) -> Result:
    try:
        return result(row)
    except ValidationError as error:
        first = error.errors()[0]
        said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except ValueError as error:
        said = str(error)
    wrong = f"{path}:{number}: not a result of a gauntlet: {said}"
    raise UserError(wrong, "each line is an object with case, kind, seed, mode and loss")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line with its number, from 1; a last one that a kill has torn is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}", "name a .jsonl file of `--out`") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                return
            row = error
        if not isinstance(row, dict):
            wrong = f"{path}:{number}: not a result of a gauntlet: no JSON object"
            raise UserError(wrong, "each line is an object with case, kind, seed, mode and loss")
        yield number, row
