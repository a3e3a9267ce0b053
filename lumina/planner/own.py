"""The user's own scaling law, on disk: `law.json` in the user's cache folder, read and written as plain values."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lumina.errors import UserError

VERSION = 1
FIX = "fit it again, or go back to the default with: lumina fit-laws --forget"


def path() -> Path:
    """$LUMINA_CACHE/law.json, or ~/.cache/lumina/law.json."""
    return Path(os.environ.get("LUMINA_CACHE") or "~/.cache/lumina").expanduser() / "law.json"


def read() -> dict[str, Any] | None:
    """What `write` wrote, None if there is nothing. Raises `UserError` if it is damaged or of another version.

    A plan by another law than the user's would be a silent change of every number in it.
    """
    try:
        values = json.loads(path().read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path()}: cannot be read: {error.strerror}", FIX) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path()}: damaged: not JSON: {error}", FIX) from None
    if not isinstance(values, dict) or values.pop("version", None) != VERSION:
        raise UserError(f"{path()}: not a scaling law of version {VERSION}", FIX)
    return values


def write(values: dict[str, Any]) -> Path:
    """Replaces the file as a whole and returns its path. Raises `UserError` if it cannot be written."""
    aside = path().with_name(f"law.json.tmp-{os.getpid()}")
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps({"version": VERSION, **values}), encoding="utf-8")
        aside.replace(path())
    except OSError as error:
        fix = "set LUMINA_CACHE to a folder you can write"
        raise UserError(f"{path()}: the law cannot be kept: {error.strerror}", fix) from error
    return path()


def forget() -> bool:
    """Removes the law, damaged or not; whether there was one."""
    there = path().exists()
    path().unlink(missing_ok=True)
    return there
