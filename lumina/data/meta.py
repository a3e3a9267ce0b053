"""`meta.json`, which makes a folder one of shards, as it stands there: nothing of it is verified."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lumina.errors import UserError

META = "meta.json"


def is_prepared(path: Path) -> bool:
    """Whether a folder looks like shards; `damage` says whether they are whole."""
    return os.path.isfile(path / META) and os.path.isfile(path / "tokenizer.json")  # no error for what is no path


def read_meta(entry: Path) -> dict[str, Any]:
    """What `meta.json` says, unverified. Raises `UserError` if it cannot be read."""
    try:
        meta: dict[str, Any] = json.loads((entry / META).read_text(encoding="utf-8"))["meta"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "prepare it again: lumina data prepare … --out"
        raise UserError(f"{entry / META}: cannot be read ({type(error).__name__}: {error})", fix) from None
    return meta
