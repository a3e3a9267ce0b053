"""What was measured on machines, kept so that the next plan is right: one JSON file in the user's cache folder.

A measurement is of one shape (all that a step's time depends on) on one device. A plan of the same shape takes its
figures as they are; of another shape on the same device, it takes how far the forecast was off (`correction`). What
finished runs tell of memory and loss is kept in the same way.

The file is small, read as a whole, and replaced as a whole under a lock. A damaged one is passed over with a warning:
it is worth a measurement, not a plan.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lumina.config.resolve import flatten
from lumina.config.schema.config import Config
from lumina.errors import UserError

VERSION = 1  # of the file; another version is another file
MOST = 500  # entries; the oldest go
# What changes a step's time, or the memory it takes, beside the model.
HOW = (
    "train.batch_tokens", "train.micro_batch", "train.optimizer", "train.recompute", "train.lora.rank",
    "train.deterministic", "precision.mode", "precision.eval", "parallel.device", "parallel.threads",
)  # fmt: skip
# What changes nothing of that, or is found by trying only where the run begins: whether grouped products and the
# compiler work, and pay.
WITHOUT = (
    "model.moe.bias_rate", "model.moe.temperature", "model.moe.kernel", "model.mod.anneal", "model.mod.decode",
    "model.rope_theta",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One measurement: `figures` are seconds, bytes, nats or ratios by name; `at` is seconds since 1970.

    Names in use: `step`, `step_low`, `step_high`, `start`, `evaluation`, `probe`, `save`, `end` (seconds), `compiled`
    (0 or 1), `memory` (bytes), `matmul_fp32` and so on (FLOP/s of one process); ratios actual / forecast: of a step
    by what bounds it (`ratio_arithmetic`, …), `memory_ratio`; and `loss_residual` (nats, actual - forecast).
    """

    device: str
    processes: int
    kind: str
    precision: str
    shape: str
    figures: Mapping[str, float]
    at: float = 0.0


@dataclass(frozen=True)
class Store:
    """All entries, oldest first; `problem` is what was wrong with the file."""

    entries: tuple[Entry, ...] = ()
    problem: str = ""
    path: Path = field(default_factory=Path)

    def lookup(self, device: str, config: Config, processes: int = 1) -> dict[str, float]:
        """The newest figure of each name that was measured of exactly this; empty if nothing was.

        Where `train.compile` is on or off, what was measured the other way is of something else.
        """
        found: dict[str, float] = {}
        shape, wanted = shape_of(config), {"on": (1.0,), "off": (0.0,)}.get(config.train.compile, (0.0, 1.0))
        for entry in self.entries:
            same = (entry.device, entry.processes, entry.shape) == (device, processes, shape)
            if same and entry.figures.get("compiled", wanted[0]) in wanted:
                found |= entry.figures
        return found

    def figures(self, name: str, device: str, kind: str = "", precision: str = "") -> list[float]:
        """All figures of a name on this device, oldest first; "" stands for any kind and any precision."""
        return [
            entry.figures[name]
            for entry in self.entries
            if entry.device == device and kind in ("", entry.kind) and precision in ("", entry.precision)
            if name in entry.figures
        ]


def path() -> Path:
    """$LUMINA_CACHE/planner-1.json, or that in ~/.cache/lumina."""
    folder = Path(os.environ.get("LUMINA_CACHE") or "~/.cache/lumina").expanduser()
    return folder / f"planner-{VERSION}.json"


def shape_of(config: Config) -> str:
    """Names all that a step's time and memory depend on, but the device: 16 hex digits."""
    values = {
        key: value
        for key, value in flatten(config).items()
        if (key.startswith("model.") and key not in WITHOUT) or key in HOW
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def load(file: Path | None = None) -> Store:
    """What the file holds; nothing, and its `problem`, if it is damaged."""
    file = file or path()
    try:
        stored = json.loads(file.read_bytes())
        return Store(tuple(_entry(values) for values in stored["entries"]), path=file)
    except FileNotFoundError:
        return Store(path=file)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        said = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        return Store(problem=f"{file}: not used: damaged ({said}); the next measurement replaces it", path=file)


def record(
    device: str, config: Config, processes: int, figures: Mapping[str, float], file: Path | None = None
) -> Store:
    """Adds a measurement and returns what the file then holds. Figures that are no finite numbers are left out.

    Raises `UserError` if the file cannot be written.
    """
    sound = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
    kind, precision = config.model.kind, config.precision.mode
    entry = Entry(device, processes, kind, precision, shape_of(config), sound, time.time())
    return _change(file or path(), lambda entries: [*entries, entry][-MOST:])


def _change(file: Path, change: Callable[[list[Entry]], list[Entry]]) -> Store:
    try:
        with _locked(file):
            entries = change(list(load(file).entries))
            aside = file.with_name(f"{file.name}.tmp-{os.getpid()}")
            aside.write_text(json.dumps({"entries": [asdict(entry) for entry in entries]}), encoding="utf-8")
            aside.replace(file)
    except OSError as error:
        fix = "set LUMINA_CACHE to a folder you can write"
        raise UserError(f"{file}: the measurement cannot be kept: {error.strerror}", fix) from error
    return Store(tuple(entries), path=file)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One writer at a time; the lock's file stays, so that all lock the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _entry(values: dict[str, Any]) -> Entry:
    """Raises `TypeError` or `ValueError` for what `record` did not write."""
    entry = Entry(**values)
    if not all(isinstance(value, str) for value in (entry.device, entry.kind, entry.precision, entry.shape)):
        raise TypeError("names are texts")
    return Entry(
        entry.device,
        int(entry.processes),
        entry.kind,
        entry.precision,
        entry.shape,
        {str(name): float(value) for name, value in entry.figures.items()},
        float(entry.at),
    )
