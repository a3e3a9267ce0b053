"""The first look at a corpus: every document is read once, and a row of a table is kept of it.

What is wrong with the input comes up here, before anything is made of it. The table lies on the disk; what is held out
and what is removed follow from it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lumina.config.schema.data import QualityConfig
from lumina.data.files import DataFile
from lumina.data.formats import read_files
from lumina.data.quality import Quality
from lumina.data.records import KINDS, Kind, Problems, Record
from lumina.data.split import Split, decide, kept
from lumina.progress import Tell

ROW = np.dtype(
    [("key", "<u8"), ("bytes", "<u8"), ("chars", "<u8"), ("source", "<u4"), ("kind", "u1"), ("removed", "u1")]
)
ROWS = 1 << 14  # written at once
TOLD_BYTES = 1 << 20  # of text between two words on how far it is
JUDGED = 1 << 26  # characters that are looked at for quality; of a longer text the beginning, and it repeats nothing
TABLE, FACTS = "documents.bin", "scan.json"


@dataclass(frozen=True)
class Source:
    """One entry of `data.train` or `data.eval`, and its files."""

    name: str
    side: str
    files: tuple[DataFile, ...]
    weight: float | None = None


@dataclass
class Scan:
    """What was found: a row of each document that is not empty, the train side's first."""

    rows: NDArray[Any]
    facts: dict[str, Any]

    @cached_property
    def split(self) -> Split:
        return decide(self.rows[: self.facts["train_documents"]], self.facts["weighted"])

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of text that are kept of each source."""
        sources = len(self.facts["formats"])
        sums = sum((np.bincount(s["source"], s["bytes"], sources) for s in kept(self.rows)), np.zeros(sources))
        return [int(size) for size in sums.tolist()]

    @property
    def repeated(self) -> int:
        """How many held-out documents, if they were given, are in the training side too."""
        border = self.facts["train_documents"]
        asked = np.sort(self.rows["key"][border:])
        found = np.zeros(len(asked), np.bool_)
        for some in kept(self.rows[:border]):
            found |= np.isin(asked, some["key"])
        return int(found.sum())


@dataclass
class _Open:
    """The document whose parts are being read."""

    key: int
    source: int
    kind: Kind
    size: int = 0
    chars: int = 0
    parts: list[str] = field(default_factory=list)  # of its text, for `Quality`


@dataclass
class _Table:
    """Rows on their way to the disk."""

    path: Path
    rows: list[tuple[int, ...]] = field(default_factory=list)
    count: int = 0

    def add(self, row: tuple[int, ...]) -> None:
        self.rows.append(row)
        self.count += 1
        if len(self.rows) >= ROWS:
            self.flush()

    def flush(self) -> None:
        with self.path.open("ab") as file:
            np.array(self.rows, dtype=ROW).tofile(file)
        self.rows = []


Check = Callable[[Record], None]


def documents(
    sources: Sequence[Source], problems: Problems, progress: Tell, what: str, check: Check | None = None
) -> Iterator[tuple[int, Record]]:
    """Every record of all sources with its source's number, in the order that is the same in each reading.

    `check` raises `ValueError` for a record that is of no use.
    """
    files = [(number, file) for number, source in enumerate(sources) for file in source.files]
    total, before = sum(file_size(file) for _, file in files), 0
    progress(what, 0, total)
    for number, file in files:
        if problems.enough:
            return
        size, read, told = file_size(file), 0, 0
        for record in read_files([file], problems):
            try:
                if check:
                    check(record)
            except ValueError as error:
                problems.record(f"{record.where}: {error}")
                continue
            yield number, record
            read += record.size
            if read - told >= TOLD_BYTES:  # of text, which a compressed file has more of than it is long
                told = read
                progress(what, before + min(read, size), total)
        before += size
        progress(what, before, total)
    progress(what, total, total)


def file_size(file: DataFile) -> int:
    try:
        return file.path.stat().st_size
    except OSError:
        return 0


def scan(
    sources: Sequence[Source],
    folder: Path,
    quality: QualityConfig,
    problems: Problems,
    progress: Tell,
    check: Check | None = None,
) -> Scan:
    """Reads everything, and leaves the table in `folder`. Raises `UserError` with all problems."""
    table = _Table(folder / TABLE)
    table.path.unlink(missing_ok=True)
    judge = Quality(quality, folder) if quality.active else None
    facts: dict[str, Any] = {"empty": 0, "train_documents": 0}
    formats: list[Counter[str]] = [Counter() for _ in sources]
    current: _Open | None = None
    for number, record in documents(sources, problems, progress, "reading the data", check):
        current = current or _Open(record.key, number, record.kind)
        current.size += record.size
        current.chars += len(record.text)
        if judge and current.chars <= JUDGED:
            current.parts.append(record.content)
        if not record.last:
            continue
        if current.size and judge and sources[number].side == "train":
            content = "".join(current.parts)
            own = record.identity if record.messages else "" if current.chars <= JUDGED else f"{content}{record.where}"
            judge.add(content, record.where, own or content)
        if current.size:
            table.add((current.key, current.size, current.chars, number, KINDS.index(current.kind), 0))
            facts["train_documents"] += sources[number].side == "train"
            formats[number][record.format] += 1
        else:
            facts["empty"] += 1
        current = None
    problems.raise_any()
    table.flush()
    facts["weighted"] = [source.weight is not None for source in sources]
    facts |= {"skipped": problems.skipped, "formats": [dict(counter) for counter in formats]}
    rows = np.memmap(table.path, dtype=ROW, mode="r+") if table.count else np.zeros(0, ROW)
    if judge:
        rows["removed"][: facts["train_documents"]] = judge.finish()
        facts["removed"] = judge.report()
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    return Scan(rows, facts)


def reopen(folder: Path) -> Scan:
    """What an earlier `scan` left there. Raises `OSError` or `ValueError` if it did not finish."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return Scan(np.memmap(folder / TABLE, dtype=ROW, mode="r"), facts)
