"""Configuration files of earlier versions, read as if they were written today.

A file says its `schema_version`; one that says none is current. `MIGRATIONS[n]` changes the dotted values of a file of
version n, in place, into those of version n + 1, and returns a sentence for each change. A key that changes its name
or meaning needs one, with a test. There has been only version 1 so far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lumina.errors import UserError

Migration = Callable[[dict[str, Any]], list[str]]
MIGRATIONS: dict[int, Migration] = {}


def current() -> int:
    """The version that this program writes."""
    return 1 + len(MIGRATIONS)


def migrate(values: dict[str, Any], version: object) -> list[str]:
    """Brings the values of a file up to date, in place; returns what changed.

    Raises `UserError` for a version that is not known.
    """
    if type(version) is not int or not 1 <= version <= current():
        fix = f"this version of LuminaAI reads 1 to {current()}; use the version that wrote the file"
        raise UserError(f"schema_version is {version}", fix)
    return [note for n in range(version, current()) for note in MIGRATIONS[n](values)]
