"""Every kind of damage done to copies of a small run: what is damaged is passed over, said, and never loaded."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumina.checkpoint import store
from lumina.errors import UserError
from lumina.progress import Tell, silent, tracked
from lumina.run.folder import Run
from lumina.training.trainer import Trainer, resume
from lumina.verify.comparison import differences
from lumina.verify.configurations import write_data
from lumina.verify.damage import SAVED, Damage, damages

EVERY, STEPS = 2, 8  # between checkpoints, and of the whole run
SHOWN = 72  # characters of a reason


@dataclass(frozen=True)
class Finding:
    """What a damage led to: the reason given for passing over, and the first thing that was not as it has to be."""

    damage: Damage
    said: str
    problem: str = ""


# -- what must hold -------------------------------------------------------------------------------------------------


def verify(progress: Tell = silent) -> tuple[list[Finding], Path | None]:
    """Does every damage to a fresh copy of a run. Returns the findings, and where the copies lie if some failed."""
    folder = Path(tempfile.mkdtemp(prefix="lumina-verify-"))
    findings: list[Finding] = []
    try:
        with _own_cache(folder / "cache"):
            whole, cut = _runs(folder)
            every = damages()
            for i, damage in enumerate(tracked(every, "damaging checkpoints", len(every), progress)):
                copy = Run(folder / f"copy-{i + 1:02d}")
                shutil.copytree(cut.path, copy.path, symlinks=True)
                findings.append(_examine(damage, copy, whole))
                if not findings[-1].problem:
                    shutil.rmtree(copy.path)
    finally:
        kept = any(finding.problem for finding in findings)
        if not kept:
            shutil.rmtree(folder)
    return findings, folder if kept else None


def _examine(damage: Damage, run: Run, whole: Run) -> Finding:
    newest, older = (store.folder(run.checkpoints, step) for step in SAVED[:2])
    damage.hurt(newest, older)
    said: list[str] = []
    try:
        problem = next(_problems(damage, run, whole, said), "")
    except Exception as error:  # whatever was not foreseen is a finding, and no reason to leave out the others
        problem = f"{type(error).__name__}: {error}"
    return Finding(damage, said[0] if said else "", problem)


def _problems(damage: Damage, run: Run, whole: Run, said: list[str]) -> Iterator[str]:
    """Whatever is not as it has to be; fills `said` with the reasons given. Resuming comes last: it changes the run."""
    before = _contents(run.path)
    found, skipped = store.newest(run.checkpoints, own=run.id)
    said += [reason for _, reason in skipped]
    step = found.step if found else None
    if step != damage.left:
        yield f"the newest checkpoint found is {step}, not {damage.left}"
    if not said or not all(said):
        yield "nothing is said of what is passed over"
    for path, _ in skipped:
        if not path.is_symlink() and _opens(path, run.id):
            yield f"{path.name} is passed over, but opened when it is named"
    if damage.left is None:
        yield from _refusal(run)
    if _contents(run.path) != before:
        yield "looking for a checkpoint changed the run"
    if damage.resumed:
        yield from _resumed(run, whole, damage.left)


def _opens(path: Path, own: str) -> bool:
    try:
        store.read(path, own=own)
    except UserError:
        return False
    return True


def _refusal(run: Run) -> Iterator[str]:
    try:
        resume(run)
    except UserError as error:
        if "damaged" not in error.message:
            yield f"refused for another reason: {error.message}"
    else:
        yield "every checkpoint is damaged, and the run went on"


def _resumed(run: Run, whole: Run, left: int | None) -> Iterator[str]:
    """The run goes on from the right step, says what it passed over, and ends like the one that was left alone."""
    resume(run)
    began = [event for event in run.events() if event["t"] == "run"][-1]
    if began["parent_step"] != left:
        yield f"the run went on from step {began['parent_step']}, not {left}"
    if not began["skipped_checkpoints"]:
        yield "the run does not say what it passed over"
    yield from differences(whole, run)


# -- the run to damage ----------------------------------------------------------------------------------------------


class _Cut(Exception):  # noqa: N818 - what stands for a crash
    pass


def _runs(folder: Path) -> tuple[Run, Run]:
    """A run that was left alone, and an equal one that was cut off after its third checkpoint."""
    write_data(folder)
    keys = {
        "data.train": [str(folder / "text.txt")],
        "train.steps": STEPS,
        "train.compile": "off",
        "checkpoint.every": EVERY,
        "checkpoint.keep_last": len(SAVED),
    }

    def cut(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] > SAVED[0]:
            raise _Cut  # a save that is under way may still end

    whole = Trainer("tiny", keys, root=folder / "whole").fit()
    with suppress(_Cut):
        Trainer("tiny", keys, root=folder / "cut", listeners=[cut]).fit()
    run = Run(next((folder / "cut").iterdir()))
    if [store.step_of(path) for path in store.checkpoints(run.checkpoints)] != list(SAVED):
        raise RuntimeError(f"{run.checkpoints}: not the checkpoints of steps {SAVED}")
    return whole, run


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """Prepared data goes into `folder`."""
    before = os.environ.get("LUMINA_CACHE")
    os.environ["LUMINA_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LUMINA_CACHE"]
        else:
            os.environ["LUMINA_CACHE"] = before


def _contents(folder: Path) -> dict[str, str]:
    """What every name below a folder is; who holds the lock is no content."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path)] = f"-> {os.readlink(path)}"
        elif path.is_file() and path.name != "lock":
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


# -- told -----------------------------------------------------------------------------------------------------------


def rows(findings: list[Finding]) -> tuple[list[str], list[list[str]]]:
    """Header and one row a damage."""
    cells = []
    for damage, said, problem in ((finding.damage, finding.said, finding.problem) for finding in findings):
        left = "refuses" if damage.left is None else f"step {damage.left}"
        tried = "yes" if damage.resumed or damage.left is None else "-"
        short = re.sub(r"/[^/ ]*\.safetensors", "/….safetensors", said)
        reason = short if len(short) <= SHOWN else f"{short[: SHOWN - 1]}…"
        cells.append([damage.name, "WRONG" if problem else "holds", left, tried, problem or reason])
    return ["damage", "result", "goes on from", "resumed", "what is said of it"], cells


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    return [
        {
            "damage": finding.damage.name,
            "left": finding.damage.left,
            "resumed": finding.damage.resumed,
            "said": finding.said,
            "problem": finding.problem,
        }
        for finding in findings
    ]
