"""What became of interventions, kept from run to run: one file a version below the runs' folder. No torch.

    runs/.verdicts/<code>-<architecture>.jsonl   all that runs of this version learned, one verdict a line
    runs/X/verdicts.jsonl                        what was known when run X began

A run knows what was known when it began and no more, so that it decides the same when it goes on. The store is only
ever appended to, each time by one write. A line that is none, as the torn last one of a killed process, is passed over:
it is worth an arm's place in the order, not a run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lumina.config.resolve import flatten
from lumina.config.schema.config import Config
from lumina.errors import DiskRefused
from lumina.run.folder import Run

FOLDER, NAME, ENDING = ".verdicts", "verdicts.jsonl", ".jsonl"
KEY = ("id", "run", "step", "fault", "action")  # which verdict it is; the others say what it came to
# What decides: which fault it is, what is tried, what that does, how arms are run and held against one another. All of
# the orchestrator counts but what only tells. A changed comment counts, too: to tell it apart is not worth a parser.
DECIDES = ("orchestrator", "config/overlay.py", "training/arms.py", "training/controls.py", "training/edits.py")
TELLS = ("alarms.py", "confidence.py", "ledger.py")
# Between runs that differ in one of these a verdict is not carried over; sizes, data and rates are not among them, for
# what is known would be of one run alone.
ARCHITECTURE = (
    "model.kind", "model.moe.score", "model.mod.routing", "model.mod.decode", "train.optimizer", "train.schedule",
)  # fmt: skip

Values = dict[str, Any]


def version(config: Config) -> str:
    """Names what a verdict is comparable within: `3f2a9c1b-mod-learned-predictor-muon-wsd`."""
    known = flatten(config)
    adapted = ["adapters"] if config.train.lora.rank else []
    return "-".join([code(), *(str(known[key]) for key in ARCHITECTURE if key in known), *adapted])


@functools.cache
def code() -> str:
    """Names the code that decides: 8 hex digits."""
    package, made = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(file for name in DECIDES for file in _sources(package / name)):
        made.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return made.hexdigest()[:8]


def _sources(path: Path) -> Iterable[Path]:
    return [path] if path.is_file() else (file for file in path.rglob("*.py") if file.name not in TELLS)


def known(run: Run) -> list[Values]:
    """What was known when the run began. Raises `DiskRefused` if it cannot be read."""
    return _read(run.path / NAME)


def copy_into(run: Run, version: str) -> None:
    """Gives a new run what is known now; nothing if that is nothing. Raises `OSError` if it cannot be written."""
    verdicts = _read(_store(run.path.parent, version))
    if not verdicts:
        return
    aside = run.path / f"{NAME}.tmp-{os.getpid()}"
    aside.write_bytes(_lines(verdicts))
    aside.replace(run.path / NAME)


def keep(root: Path, version: str, verdicts: Sequence[Mapping[str, Any]]) -> int:
    """Adds those that the store does not end with already, and returns how many those were.

    A run may bring all of its verdicts each time; no other one brings the same. Raises `DiskRefused`.
    """
    file = _store(root, version)
    there = {_key(verdict): verdict for verdict in (_read(file) if verdicts else ())}
    news = [verdict for verdict in verdicts if there.get(_key(verdict)) != verdict]
    if not news:
        return 0
    try:
        file.parent.mkdir(exist_ok=True)
        with file.open("a+b", buffering=0) as store:
            end = store.seek(0, os.SEEK_END)
            store.seek(max(0, end - 1))
            content = (b"" if store.read() in (b"", b"\n") else b"\n") + _lines(news)
            if store.write(content) < len(content):  # the next one begins on a line of its own
                raise OSError(0, "it has no room left")
    except OSError as error:
        fix = "free space there or make it writable; what was learned stays in the run's log"
        raise DiskRefused(f"{file}: verdicts not kept: {error.strerror}", fix) from error
    return len(news)


def stores(root: Path) -> dict[str, list[Values]]:
    """All that was ever kept below this folder of runs, by version. Raises `DiskRefused` if it cannot be read."""
    return {file.stem: _read(file) for file in sorted((root / FOLDER).glob(f"*{ENDING}"))}


def _store(root: Path, version: str) -> Path:
    return root / FOLDER / f"{version}{ENDING}"


def _key(verdict: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(str(verdict.get(name)) for name in KEY)


def _lines(verdicts: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(one, allow_nan=False, separators=(",", ":")).encode() + b"\n" for one in verdicts)


def _read(file: Path) -> list[Values]:
    """All lines that hold an object; none if there is no such file."""
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        fix = "make it readable, or move it away: runs go on without it"
        raise DiskRefused(f"{file}: cannot be read: {error.strerror}", fix) from error
    return [verdict for line in lines if (verdict := _parse(line)) is not None]


def _parse(line: bytes) -> Values | None:
    try:
        verdict = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return verdict if isinstance(verdict, dict) else None
