"""Which documents of a corpus are removed: duplicates, near duplicates, repetitive, symbolic and short ones.

Documents come once, in order; what has to be known about all of them at the end lies in columns on disk. In memory are
a byte a document while they come, about ten at the end, some 200 MB of sorting whatever the corpus, and a few times the
document at hand. On disk are, for every document, some 32 bytes and its first characters, and for near duplicates
520 + 12·bands bytes more.

What a document is by itself is judged first: a copy of a repetitive document is called repetitive. Exact duplicates
come next, near duplicates last, each among what is left; so a document never goes for the sake of one that goes too.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lumina.config.schema.data import QualityConfig

REASONS = ("kept", "exact duplicate", "near duplicate", "repetitive", "symbols", "short")
KEPT, EXACT, NEAR, REPETITIVE, SYMBOLS, SHORT = range(len(REASONS))
EXAMPLES = 3  # a reason, in the report
SHOWN = 120  # characters of an example

PIECE = 5  # words: what Lee et al. 2022 (arXiv:2107.06499) deduplicate C4 by, and within Gopher's 5 to 10
PERMUTATIONS = 128  # standard error of a similarity: sqrt(J(1-J)/128), 0.035 at J = 0.8
MISSED = 0.01  # share of the pairs at the threshold that no band brings together
BUCKET = 64  # kept documents of a bucket, the latest ones, that a document is compared with
RUN = 1 << 21  # rows that are sorted, or looked at, at once
_STRIDE = 2048  # pieces hashed at once: 1 MB, which caches hold
_SLICE = 1 << 20  # characters whose words are listed at once
_BASE = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_RANDOM = np.random.default_rng(1997)  # fixed, so that the same corpus always loses the same documents
_MULTIPLY = _RANDOM.integers(1 << 32, size=(PERMUTATIONS, 1), dtype=np.uint32) | np.uint32(1)
_ADD = _RANDOM.integers(1 << 32, size=(PERMUTATIONS, 1), dtype=np.uint32)
_WEIGHTS = _RANDOM.integers(1 << 63, size=PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_WORD = re.compile(r"\w+")
_GAP = re.compile(r"\s")
_PLAIN = re.compile(r"[\w\s]+")


class Quality:
    """Judges the documents of a corpus: `add` every one of them, then `finish`.

    Args:
        config: the limits; a document is removed that lies beyond one, not at it (`near`: from it on).
        folder: where the columns are meanwhile; `finish` removes them.
    """

    def __init__(self, config: QualityConfig, folder: Path) -> None:
        if not config.active:
            raise ValueError("data.quality removes nothing: every limit is 0")
        self._config = config
        self._store = _Store(folder)
        self._verdicts = bytearray()
        self._sizes = self._store.column("sizes", np.uint64)
        self._prefixes = self._store.column("prefixes", np.uint64) if config.exact else None
        self._near = _Near(self._store, config.near) if config.near else None
        self._notes = _Notes(self._store) if config.exact or config.near else None
        self._examples: dict[int, list[dict[str, Any]]] = {reason: [] for reason in range(len(REASONS))}
        self._report: dict[str, Any] | None = None

    def add(self, content: str, where: str, identity: str | None = None) -> None:
        """The next document. `where` names it in the report; equal documents have an equal `identity`, or content."""
        encoded = (content if identity is None else identity).encode()
        words = _Words(content) if self._config.near or self._config.repetition else _Words("")
        reason, value = self._judge(content, words)
        if reason != KEPT and len(self._examples[reason]) < EXAMPLES:
            self._examples[reason].append({"where": where, "text": content[:SHOWN], "of": None, "value": value})
        if reason == KEPT and self._near and len(words.pieces):
            self._near.add(len(self._verdicts), words.pieces)
        if self._prefixes:
            self._prefixes.append(np.frombuffer(hashlib.sha256(encoded).digest(), np.uint64, count=1))
        if self._notes:
            self._notes.append(where, content[:SHOWN])
        self._sizes.append(len(content.encode()))
        self._verdicts.append(reason)

    def _judge(self, content: str, words: _Words) -> tuple[int, float]:
        """What is wrong with the document by itself, cheapest question first, and the measure that says so."""
        config = self._config
        if config.min_chars and (count := len(content.strip())) < config.min_chars:
            return SHORT, count
        if config.symbols and (share := symbols(content)) > config.symbols:
            return SYMBOLS, share
        if config.repetition and (share := max(repeated_lines(content), words.repeated())) > config.repetition:
            return REPETITIVE, share
        return KEPT, 0.0

    def finish(self) -> NDArray[np.uint8]:
        """For every document, in order, the index of its verdict in `REASONS`. Once; there is no `add` after it."""
        if self._report is not None:
            raise ValueError("finish was called before")
        verdicts = np.frombuffer(self._verdicts, np.uint8)
        sizes = self._sizes.read()
        of = self._store.zeros("of", np.int64, (len(verdicts),))
        if self._prefixes:
            _mark_exact(self._prefixes.read(), sizes, verdicts, of)
        if self._near:
            self._near.mark(verdicts, of)
        if self._notes:
            self._show_duplicates(self._notes, verdicts, of)
        self._report = {reason: self._count(k, verdicts, sizes) for k, reason in enumerate(REASONS)}
        del sizes, of
        self.close()
        return verdicts

    def close(self) -> None:
        """Removes the columns. `finish` does, so that only who gives up before it has to."""
        self._store.close()

    def _show_duplicates(self, notes: _Notes, verdicts: NDArray[np.uint8], of: NDArray[np.int64]) -> None:
        """Examples of duplicates, which `add` could not know."""
        for reason in (EXACT, NEAR):
            for document in np.flatnonzero(verdicts == reason)[:EXAMPLES].tolist():
                original = int(of[document])
                (where, text), (first, _) = notes.read(document), notes.read(original)
                value = self._near.similarity(document, original) if self._near and reason == NEAR else 1.0
                self._examples[reason].append({"where": where, "text": text, "of": first, "value": value})

    def _count(self, reason: int, verdicts: NDArray[np.uint8], sizes: NDArray[np.uint64]) -> dict[str, Any]:
        documents = size = 0
        for start in range(0, len(verdicts), RUN):
            here = verdicts[start : start + RUN] == reason
            documents += int(np.count_nonzero(here))
            size += int(sizes[start : start + RUN][here].sum())
        return {"documents": documents, "bytes": size, "examples": self._examples[reason]}

    def report(self) -> dict[str, Any]:
        """For each of `REASONS` the `documents`, their `bytes` of UTF-8, and `examples`, the first three.

        An example is `where`, `text`, its beginning, `of`, where the document is that it repeats (None, if that is not
        the reason), and `value`: the similarity (1 for exact duplicates, estimated for near ones), the share of
        repeated characters or of symbols, or the number of characters.
        """
        if self._report is None:
            raise ValueError("there is a report after finish only")
        return self._report


def symbols(content: str) -> float:
    """Share of the characters that are no letter, digit or whitespace; vowel signs and accents belong to letters."""
    rest = _PLAIN.sub("", content)
    marks = 0 if rest.isascii() else sum(unicodedata.category(character)[0] == "M" for character in rest)
    return (content.count("_") + len(rest) - marks) / max(1, len(content))


def repeated_lines(content: str) -> float:
    """Share of the characters in lines that occurred before (Gopher, Rae et al. 2021, arXiv:2112.11446, table A1).

    Blank lines and indentation do not count, neither above nor below the fraction line.
    """
    seen: set[str] = set()
    total = repeated = 0
    for line in filter(None, map(str.strip, content.splitlines())):
        total += len(line)
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / max(1, total)


class _Words:
    """The words of a text, casefolded: their lengths, and the hashes of all `PIECE` consecutive ones, in order."""

    def __init__(self, content: str) -> None:
        parts = [_hashed(_WORD.findall(part.casefold())) for part in _slices(content)]
        self.lengths, hashes = np.concatenate(parts, axis=1) if parts else np.zeros((2, 0), np.uint32)
        self.pieces: NDArray[np.uint64] = np.zeros(max(0, len(hashes) - PIECE + 1), np.uint64)
        for k in range(PIECE if len(self.pieces) else 0):
            self.pieces = self.pieces * _BASE + hashes[k : k + len(self.pieces)]

    def repeated(self) -> float:
        """Share of the words' characters in pieces that occurred before, none counted twice (Gopher, table A1)."""
        order = np.argsort(self.pieces, kind="stable")
        again = np.zeros(len(self.pieces), bool)
        again[order[1:]] = self.pieces[order[1:]] == self.pieces[order[:-1]]
        covered = np.zeros(len(self.lengths), bool)
        for k in range(PIECE if len(again) else 0):
            covered[k : k + len(again)] |= again
        return int(self.lengths[covered].sum()) / max(1, int(self.lengths.sum()))


def _hashed(words: list[str]) -> NDArray[np.uint32]:
    """(2, words): lengths and hashes."""
    hashed = np.empty((2, len(words)), np.uint32)
    hashed[0] = np.fromiter(map(len, words), np.uint32, len(words))
    hashed[1] = np.fromiter(map(zlib.crc32, map(str.encode, words)), np.uint32, len(words))
    return hashed


def _slices(content: str) -> Iterator[str]:
    """The text in parts of about `_SLICE` characters, cut before whitespace: a list of words is ten times its text."""
    start = 0
    while start < len(content):
        gap = _GAP.search(content, start + _SLICE)
        stop = gap.start() if gap else len(content)
        yield content[start:stop]
        start = stop


def bands(near: float) -> tuple[int, int]:
    """How many bands of how many rows the signatures are cut into; at most `PERMUTATIONS` rows in all.

    Two documents of similarity s agree in a row with probability s, so they miss each other in all of b bands of r rows
    with (1 - s^r)^b. One row a band misses least, but brings everything together; what is brought together is
    verified, so that too many candidates cost time only. Hence the longest bands that miss at most `MISSED` of the
    pairs at the threshold: 21 of 6 for 0.8 (0.2 %), where 16 of 8 would miss 5 %.
    """
    for rows in range(PERMUTATIONS, 1, -1):
        count = PERMUTATIONS // rows
        if (1 - near**rows) ** count <= MISSED:
            return count, rows
    return PERMUTATIONS, 1


def signature(pieces: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """MinHash (Broder 1997): for each permutation the smallest value it gives to one of `pieces`.

    Two signatures agree in about the share of places that their documents have of pieces in common (Jaccard). A
    permutation is x ↦ ax + b modulo 2^32, a odd, of hashes mixed before: a piece's last word is in the low half only.
    """
    mixed = (((pieces ^ (pieces >> _HALF)) * _BASE) >> _HALF).astype(np.uint32)
    smallest = np.full(PERMUTATIONS, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(mixed), _STRIDE):
        permuted = _MULTIPLY * mixed[start : start + _STRIDE]
        permuted += _ADD
        np.minimum(smallest, permuted.min(axis=1), out=smallest)
    return smallest


class _Near:
    """Near duplicates among the documents that are added: MinHash, cut into bands, then a walk in order.

    Documents whose signatures agree in a whole band are in one bucket of it. The walk compares a document with the kept
    ones in its buckets, and keeps it if none is similar; so in a chain, where each is like its neighbours only, every
    other one stays, and whatever goes has a kept earlier one that it is like.
    """

    def __init__(self, store: _Store, near: float) -> None:
        self._store, self._threshold = store, near
        self._bands, self._rows = bands(near)
        self._documents = store.column("documents", np.int64)
        self._signatures = store.column("signatures", np.uint32, PERMUTATIONS)

    def add(self, document: int, pieces: NDArray[np.uint64]) -> None:
        self._documents.append(document)
        self._signatures.append(signature(pieces))

    def mark(self, verdicts: NDArray[np.uint8], of: NDArray[np.int64]) -> None:
        """Marks the near duplicates among the kept in `verdicts`, and in `of` the earliest that each is like."""
        documents, signatures = self._documents.read(), self._signatures.read()
        live = verdicts[documents] == KEPT
        leaders = self._leaders(signatures, live)
        kept = _Buckets(leaders, *(self._store.zeros(name, np.uint32, leaders.shape) for name in ("heads", "next")))
        for start in range(0, len(documents), RUN // PERMUTATIONS):
            crowded = leaders[:, start : start + RUN // PERMUTATIONS].any(axis=0)
            for row in (start + np.flatnonzero(crowded)).tolist():
                others = kept.others(row)
                like = others[similarities(signatures[row], signatures[others]) >= self._threshold]
                if len(like):
                    verdicts[documents[row]], of[documents[row]] = NEAR, documents[like.min()]
                else:
                    kept.add(row)

    def _leaders(self, signatures: NDArray[np.uint32], live: NDArray[np.bool_]) -> NDArray[np.uint32]:
        """(band, row): 1 + the first row of the row's bucket; 0 where it is alone there."""
        leaders = self._store.zeros("leaders", np.uint32, (self._bands, len(live)))
        for band in range(self._bands):
            columns = slice(band * self._rows, (band + 1) * self._rows)
            hashes = np.empty(len(live), np.uint64)
            for start in range(0, len(live), RUN // PERMUTATIONS):
                part = signatures[start : start + RUN // PERMUTATIONS, columns]
                hashes[start : start + len(part)] = part.astype(np.uint64) @ _WEIGHTS[columns]
            for rows, first in _groups(hashes, live):
                crowded = rows != first
                crowded[:-1] |= crowded[1:]  # a first row, if another one follows it
                leaders[band, rows[crowded]] = first[crowded] + 1
        return leaders

    def similarity(self, document: int, other: int) -> float:
        """Of two of the documents, as estimated."""
        pair = np.searchsorted(self._documents.read(), (document, other))
        first, second = self._signatures.read()[pair]
        return float(similarities(first, second[None])[0])


def similarities(one: NDArray[np.uint32], others: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Estimated Jaccard similarity of a signature and each of others."""
    shares: NDArray[np.float64] = np.count_nonzero(others == one, axis=1) / PERMUTATIONS
    return shares


class _Buckets:
    """The kept rows of every bucket, in lists from the latest on. All arrays are (band, row): 1 + a row, or 0."""

    def __init__(self, leaders: NDArray[np.uint32], heads: NDArray[np.uint32], following: NDArray[np.uint32]) -> None:
        self._leaders, self._heads, self._following = leaders, heads, following

    def others(self, row: int) -> NDArray[np.intp]:
        """The latest `BUCKET` kept rows of each of the row's buckets."""
        band = np.flatnonzero(self._leaders[:, row])
        at = self._heads[band, self._leaders[band, row] - 1]
        found = []
        for _ in range(BUCKET):
            band, at = band[at > 0], at[at > 0] - 1
            if not len(at):
                break
            found.append(at)
            at = self._following[band, at]
        return np.unique(np.concatenate(found)).astype(np.intp) if found else np.empty(0, np.intp)

    def add(self, row: int) -> None:
        """Keeps a row."""
        band = np.flatnonzero(self._leaders[:, row])
        bucket = self._leaders[band, row] - 1
        self._following[band, row] = self._heads[band, bucket]
        self._heads[band, bucket] = row + 1


def _mark_exact(
    prefixes: NDArray[np.uint64], sizes: NDArray[np.uint64], verdicts: NDArray[np.uint8], of: NDArray[np.int64]
) -> None:
    """Marks the kept documents whose hash and size an earlier kept one has."""
    for rows, first in _groups(prefixes, verdicts == KEPT):
        again = (rows != first) & (sizes[rows] == sizes[first])
        verdicts[rows[again]], of[rows[again]] = EXACT, first[again]


def _groups(keys: NDArray[np.uint64], live: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """The live rows, sorted by key, and for each the first row with its key; in passes of about `RUN` rows.

    The keys are hashes: their low bits tell the passes apart, and equal ones are in the same pass.
    """
    passes = 1 << (max(0, len(keys) - 1) // RUN).bit_length()
    mask = np.uint64(passes - 1)
    for chosen in range(passes):
        starts = range(0, len(keys), RUN)
        parts = [
            np.flatnonzero(live[start : start + RUN] & (keys[start : start + RUN] & mask == chosen)) + start
            for start in starts
        ]
        rows = np.concatenate(parts) if parts else np.empty(0, np.intp)
        order = np.argsort(keys[rows], kind="stable")
        rows = rows[order]
        new = np.ones(len(rows), bool)
        new[1:] = keys[rows[1:]] != keys[rows[:-1]]
        yield rows, rows[np.flatnonzero(new)][np.cumsum(new) - 1]


class _Store:
    """A temporary folder of columns."""

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        self._folder = TemporaryDirectory(prefix="quality-", dir=parent)
        self._columns: list[_Column] = []

    def column(self, name: str, kind: DTypeLike, width: int = 0) -> _Column:
        self._columns.append(_Column(Path(self._folder.name) / name, kind, width))
        return self._columns[-1]

    def zeros(self, name: str, kind: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
        """An array on disk; what is never written takes no room there."""
        if 0 in shape:
            return np.zeros(shape, kind)
        return np.asarray(np.memmap(Path(self._folder.name) / name, kind, "w+", shape=shape))

    def close(self) -> None:
        for column in self._columns:
            column.file.close()
        self._folder.cleanup()


class _Column:
    """A column on disk that grows at its end: (rows,), or (rows, width)."""

    def __init__(self, path: Path, kind: DTypeLike, width: int) -> None:
        self.file = path.open("wb")
        self._kind, self._shape = np.dtype(kind), (-1, width) if width else (-1,)

    def append(self, values: Any) -> None:
        self.file.write(np.asarray(values, self._kind).tobytes())

    def read(self) -> NDArray[Any]:
        """All of it; nothing is appended any more."""
        self.file.close()
        path = Path(self.file.name)
        if not path.stat().st_size:
            return np.empty(0, self._kind).reshape(0, *self._shape[1:])
        return np.asarray(np.memmap(path, self._kind, "r")).reshape(self._shape)


class _Notes:
    """Where the documents are and how they begin, on disk."""

    def __init__(self, store: _Store) -> None:
        self._text, self._ends = store.column("notes", np.uint8), store.column("ends", np.int64)
        self._end = 0

    def append(self, where: str, text: str) -> None:
        note = json.dumps((where, text)).encode()
        self._text.append(np.frombuffer(note, np.uint8))
        self._end += len(note)
        self._ends.append(self._end)

    def read(self, document: int) -> tuple[str, str]:
        """(where, text)"""
        text, ends = self._text.read(), self._ends.read()
        where, beginning = json.loads(bytes(text[ends[document - 1] if document else 0 : ends[document]]))
        return where, beginning
