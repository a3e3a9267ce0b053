"""What people ask of a run, as files: `runs/X/inbox/*.json`, read between two steps. No torch.

A request is written whole or not at all, is done once, and then stands in `inbox/done`, or in `inbox/refused` where it
could not be done or is no request. Whoever kills the run loses none: what was asked waits until it goes on.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lumina.errors import UserError
from lumina.run.folder import Run, write_json

ENDING = ".json"
LARGEST = 2**16  # bytes; a request has a hundred


@dataclass(frozen=True)
class Letter:
    """A file in the inbox: what it holds, or why that is nothing."""

    name: str
    content: dict[str, Any] | None
    problem: str = ""


class Inbox:
    """The inbox of a run; the folder is made with the first request."""

    def __init__(self, run: Run) -> None:
        self.folder = run.path / "inbox"

    def put(self, content: dict[str, Any]) -> str:
        """Leaves a request; returns the name of its file. Later ones are read later."""
        name = f"{time.time_ns():020d}-{secrets.token_hex(2)}{ENDING}"
        try:
            self.folder.mkdir(exist_ok=True)
            write_json(self.folder / name, content)
        except OSError as error:
            fix = "make the folder writable or free space on its disk"
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}", fix) from error
        return name

    def waiting(self, but: Collection[str] = ()) -> bool:
        """Whether somebody asks for something, `but` for these: a look at one folder, for a run does it after each
        step."""
        try:
            with os.scandir(self.folder) as entries:
                return any(entry.name.endswith(ENDING) and entry.name not in but for entry in entries)
        except OSError:  # there is none yet, or nobody can look at it now
            return False

    def letters(self) -> list[Letter]:
        """All that waits, the oldest first."""
        return [_read(path) for path in sorted(self.folder.glob(f"*{ENDING}"))]

    def aside(self, name: str, to: Literal["done", "refused"]) -> None:
        """Moves a letter that was answered: nobody reads it again."""
        folder = self.folder / to
        try:
            folder.mkdir(exist_ok=True)
            (self.folder / name).replace(folder / name)
        except OSError as error:
            fix = "make the folder writable, or delete the file: it was answered"
            raise UserError(f"{self.folder / name}: cannot be moved: {error.strerror}", fix) from error


def _read(path: Path) -> Letter:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(LARGEST))
    except OSError as error:
        return Letter(path.name, None, f"cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        return Letter(path.name, None, f"not JSON: {error}")
    if not isinstance(content, dict):
        return Letter(path.name, None, "not a JSON object")
    return Letter(path.name, content)
