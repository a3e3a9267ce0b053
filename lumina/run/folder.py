"""The folder of one run: where everything is, and what happened in it.

runs/<preset>-<date>-<4 chars>/
  config.yaml  meta.json  events.jsonl  log.txt  lock  tokenizer/  checkpoints/
"""

from __future__ import annotations

import difflib
import json
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumina.errors import UserError
from lumina.events import Event, last_event, merged, read_events

REQUIRED = ("config.yaml", "meta.json")  # what makes a folder a run
ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"  # 32 characters that are not taken for one another


@dataclass(frozen=True)
class Run:
    """A run on disk. Nothing is read until it is asked for."""

    path: Path

    @classmethod
    def create(cls, root: Path, preset: str) -> Run:
        """A new empty folder below `root`, which is made if needed. Raises `UserError` if it cannot be."""
        try:
            root.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"[^\w.-]+", "-", preset)  # one that a shell takes without quotes
            return cls(_new_folder(root, f"{name}-{time.strftime('%Y%m%d')}"))
        except OSError as error:
            raise UserError(
                f"{root}: cannot make a run folder here: {error.strerror}",
                fix="choose another folder with --root",
            ) from error

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run. Raises `UserError`, with the runs of a similar name beside it, if it is none."""
        lacking = missing(path)
        if not lacking:
            return cls(path)
        wrong = f"not a run folder: it has no {' and no '.join(lacking)}" if path.is_dir() else "no such run"
        near = near_runs(path)
        fix = (
            f"did you mean {' or '.join(near)}?"
            if near
            else "name a folder that `lumina train` made; `lumina runs` lists them"
        )
        raise UserError(f"{path}: {wrong}", fix=fix)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def meta(self) -> Path:
        return self.path / "meta.json"

    @property
    def event_log(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def retry(self) -> Path:
        """Where a process that ran out of memory says what the next start should do."""
        return self.path / "retry.json"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def require_tokenizer(self) -> None:
        """Raises `UserError` if the run has lost its tokenizer."""
        if not self.tokenizer.exists():
            fix = "restore it from a backup: the weights know no other"
            raise UserError(f"{self.tokenizer}: the run's tokenizer is gone", fix)

    def events(self) -> list[Event]:
        """What happened, over all attempts: see `lumina.events.merged`. Empty if the run never started."""
        return merged(read_events(self.event_log)) if self.event_log.exists() else []

    def next_attempt(self) -> int:
        """0 for a run that never started; each start counts one more.

        Checkpoints without an event log are of attempt 0, whose log was lost: they are not begun anew.
        """
        last = self._last_event()
        if last is None:
            return int(self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))
        return int(last["attempt"]) + 1

    @property
    def finished(self) -> bool:
        """Whether the run came to its planned end."""
        last = self._last_event()
        return last is not None and last["t"] == "end" and last.get("reason") == "done"

    def _last_event(self) -> Event | None:
        """The last whole event. Raises `UserError` if it is one that no crash can have left."""
        last = last_event(self.event_log)
        if last is None or (type(last.get("t")) is str and type(last["attempt"]) is int):
            return last
        wrong = "its last line is no event: `t` must be a text, `attempt` a whole number"
        raise UserError(f"{self.event_log}: {wrong}", fix="restore the log, or delete the line")

    @property
    def id(self) -> str:
        """What tells this run from all others, also when its folder is copied or renamed.

        Raises `UserError` if meta.json is damaged. A run begun before there were ids has the time when it was created.
        """
        meta = self.read_meta()
        return str(meta.get("id") or meta.get("created", ""))

    def write_meta(self, facts: dict[str, Any]) -> None:
        """Writes meta.json: when the run was created (seconds since 1970), an id that no other has, and `facts`."""
        write_json(self.meta, {"created": time.time(), "id": secrets.token_hex(8), **facts})

    def read_meta(self) -> dict[str, Any]:
        """What `write_meta` wrote. Raises `UserError` if the file is damaged, or when a fact that it lacks is asked."""
        fix = "restore the file, or move this run folder away"
        try:
            meta = json.loads(self.meta.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.meta}: not JSON: {error}", fix) from None
        if not isinstance(meta, dict) or not isinstance(meta.get("created", 0.0), int | float):
            raise UserError(f"{self.meta}: not the facts of a run: an object with the time `created` is needed", fix)
        return _Facts(self.meta, meta)


class _Facts(dict[str, Any]):
    """Facts of a run. One that is not there was cut out of the file, or never written by a run."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        super().__init__(facts)
        self.path = path

    def __missing__(self, name: str) -> Any:
        raise UserError(f"{self.path}: damaged: it has no {name!r}", "restore the file, or move this run folder away")


def missing(path: Path) -> list[str]:
    """The files that make a folder a run and that `path` lacks; none for a run."""
    return [name for name in REQUIRED if not (path / name).is_file()]


def near_runs(path: Path) -> list[str]:
    """Runs beside `path` that it is the beginning of, newest first, or else resembles, best first; at most three."""
    names = [config.parent.name for config in path.parent.glob("*/config.yaml") if not missing(config.parent)]
    begun = [name for name in names if path.name and name.startswith(f"{path.name}-")]
    begun.sort(key=lambda name: (path.parent / name / "meta.json").stat().st_mtime, reverse=True)
    near = begun[:3] or difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return [str(path.parent / name) for name in near]


def write_json(path: Path, value: Any) -> None:
    """Replaces a file as a whole: a reader, or a crash, meets the old content or the new, never a part."""
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _new_folder(root: Path, prefix: str) -> Path:
    """A folder that did not exist, `<prefix>-<4 random characters>`."""
    while True:
        path = root / f"{prefix}-{''.join(secrets.choice(ALPHABET) for _ in range(4))}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
