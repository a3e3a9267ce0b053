"""Which runs there are, and which one a request or a name means."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from lumina.errors import UserError
from lumina.run.folder import Run, missing

Status = Literal["none", "finished", "unfinished"]


def runs(root: Path) -> list[Run]:
    """Every run below `root`, newest first; one with a damaged meta.json is none."""
    paths = root.iterdir() if root.is_dir() else ()
    created: dict[Run, float] = {}
    for run in (Run(path) for path in paths if not missing(path)):
        with suppress(UserError):
            created[run] = run.read_meta().get("created", 0.0)
    return sorted(created, key=created.__getitem__, reverse=True)


def newest(root: Path, request: str) -> tuple[Run | None, Status]:
    """The newest unfinished run whose meta.json holds this `request` hash; else the newest finished one."""
    same = [run for run in runs(root) if run.read_meta().get("request") == request]
    for run in same:
        if not run.finished:
            return run, "unfinished"
    return (same[0], "finished") if same else (None, "none")


def find(root: Path, name: str) -> Run:
    """The run called `name` below `root`, or at the path `name`. Raises `UserError` if there is none."""
    below, here = root / name, Path(name)
    is_path = here.is_dir() or os.sep in name
    return Run.open(here if is_path and missing(below) else below)
