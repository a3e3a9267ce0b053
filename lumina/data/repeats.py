"""Exact copies among documents that come one after the other: their hashes and places lie on disk meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

HASH = 16  # bytes
RUN = 1 << 21  # documents that are sorted at once


class Repeats:
    """`add` every document, then ask for `pairs`. In memory are 2 MB while they come, 100 MB at the end."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="lumina-repeats-")
        folder = Path(self._folder.name)
        self._hashes, self._ends, self._places = ((folder / n).open("wb+") for n in ("hashes", "ends", "places"))
        self._end = self.count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in (self._hashes, self._ends, self._places):
            file.close()
        self._folder.cleanup()

    def add(self, digest: bytes, where: str) -> None:
        """The next document: `HASH` bytes that name its content, and where it is."""
        place = where.encode("utf-8", "surrogateescape")
        self._end += len(place)
        self._hashes.write(digest)
        self._places.write(place)
        self._ends.write(self._end.to_bytes(8, "little"))
        self.count += 1

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Each document that is a copy, and the first one of its kind; in order within passes of `RUN` documents."""
        if not self.count:
            return
        for file in (self._hashes, self._ends, self._places):
            file.flush()
        hashes = np.memmap(self._hashes, "<u8", "r", shape=(self.count, 2))
        passes = 1 << ((self.count - 1) // RUN).bit_length()
        for chosen in range(passes):
            copies, first = _copies(hashes, passes - 1, chosen)
            yield from zip(copies.tolist(), first.tolist(), strict=True)

    def where(self, document: int) -> str:
        self._ends.seek(8 * max(0, document - 1))
        raw = self._ends.read(16 if document else 8)
        begin = int.from_bytes(raw[:8], "little") if document else 0
        self._places.seek(begin)
        return self._places.read(int.from_bytes(raw[-8:], "little") - begin).decode("utf-8", "surrogateescape")


def hash_of(kind: str, parts: Sequence[str] = ()) -> hashlib.blake2b:
    """A hash that goes on with `update`; texts and conversations are never equal."""
    made = hashlib.blake2b(kind.encode(), digest_size=HASH)
    for part in parts:
        made.update(part.encode())
    return made


def _copies(hashes: NDArray[np.uint64], mask: int, chosen: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Of the documents whose hash ends in the bits `chosen`: those that repeat an earlier one, and that one."""
    starts = range(0, len(hashes), RUN)
    here = [np.flatnonzero(hashes[s : s + RUN, 0] & np.uint64(mask) == np.uint64(chosen)) + s for s in starts]
    rows = np.concatenate(here)
    mine = np.asarray(hashes[rows])
    order = np.lexsort((rows, mine[:, 1], mine[:, 0]))
    rows, mine = rows[order], mine[order]
    new = np.ones(len(rows), bool)
    new[1:] = (mine[1:] != mine[:-1]).any(axis=1)
    first = rows[np.flatnonzero(new)][np.cumsum(new) - 1]
    copies, first = rows[~new], first[~new]
    order = np.argsort(copies)
    return copies[order], first[order]
