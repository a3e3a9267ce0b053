"""How difficult each document of prepared shards is: a column beside each stream, for `data.curriculum`.

    tokens and starts of a stream -> a float32 a document, in `<stream>.difficulty`

Streams are read in parts; in memory are 8 bytes a document and 16 an id of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lumina.data.corpus import Corpus, Shard, open_folder, replace_files
from lumina.errors import UserError
from lumina.progress import Tell, silent, tracked

By = Literal["length", "rarity"]
PART = 1 << 24  # tokens looked at once
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
SHOWN = 3  # documents of either end
BEGINNING = 40  # tokens of one that is shown


@dataclass(frozen=True)
class Document:
    """One of the easiest or the hardest: its number in the stream, and how it begins."""

    number: int
    difficulty: float
    text: str


@dataclass(frozen=True)
class Spread:
    """What a stream of `source` was found to hold; `quantiles` are those of `QUANTILES`."""

    source: str
    kind: str
    documents: int
    quantiles: list[float]
    easiest: list[Document]
    hardest: list[Document]


@dataclass(frozen=True)
class Written:
    by: By
    changed: bool
    spreads: list[Spread]


def write(folder: Path, by: By, progress: Tell = silent) -> Written:
    """Writes the column of every training stream of a prepared folder, which changes its fingerprint if it is new.

    `length` counts tokens. `rarity` is the mean of -ln p over a document's tokens, p being the share that a token has
    in all training streams of the folder: sentence rarity (Platanios et al. 2019, arXiv:1903.09848, eq. 5) divided by
    the length, which would rule it otherwise. Raises `UserError` for a folder that is none, is damaged, or is empty.
    """
    corpus = open_folder(folder, progress)
    surprise = _surprise(corpus, progress) if by == "rarity" else None
    columns: dict[str, NDArray[np.float32]] = {}
    for shard in corpus.train:
        found = lengths(shard).astype(np.float32) if surprise is None else _rarity(shard, surprise, progress)
        columns[f"{shard.stream.name}.difficulty"] = found
    if not columns:
        raise UserError(f"{folder}: there are no training documents", fix="prepare some: lumina data prepare … --out")
    spreads = [_spread(shard, column, corpus) for shard, column in zip(corpus.train, columns.values(), strict=True)]
    return Written(by, _store(folder, columns), spreads)


def _store(folder: Path, columns: dict[str, NDArray[np.float32]]) -> bool:
    """Puts the columns beside their streams; says whether that changed anything."""
    new = {name: folder / f".{name}.tmp" for name in columns}
    try:
        for name, path in new.items():
            columns[name].astype("<f4").tofile(path)
        return replace_files(folder, new)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}", fix="make it writable, with room") from None
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)


def _borders(shard: Shard) -> NDArray[np.int64]:
    """Where each document begins, and where the last one ends. A text's own end token stands for the one before it."""
    end = len(shard.tokens) - (shard.kind == "text")
    return np.append(np.asarray(shard.starts, np.int64), end)


def lengths(shard: Shard) -> NDArray[np.int64]:
    """Tokens of each document; a text's end is one of them."""
    return np.diff(_borders(shard))


def _parts(shards: Sequence[Shard], what: str, progress: Tell) -> Iterator[tuple[Shard, int, NDArray[np.int64]]]:
    """The tokens of all shards in parts, each with its place."""
    places = [(shard, at) for shard in shards for at in range(0, len(shard.tokens), PART)]
    total = sum(len(shard.tokens) for shard in shards)
    for shard, at in tracked(places, what, total, progress, lambda place: min(PART, len(place[0].tokens) - place[1])):
        yield shard, at, np.asarray(shard.tokens[at : at + PART]).astype(np.int64)


def _surprise(corpus: Corpus, progress: Tell) -> NDArray[np.float64]:
    """-ln of each id's share of all training tokens; of an id that never occurs it does not matter."""
    counts = np.zeros(corpus.tokenizer.vocab_size, np.int64)
    for _, _, tokens in _parts(corpus.train, "counting tokens", progress):
        counts += np.bincount(tokens, minlength=len(counts))
    return -np.log(np.maximum(counts, 1) / max(1, int(counts.sum())))


def _rarity(shard: Shard, surprise: NDArray[np.float64], progress: Tell) -> NDArray[np.float32]:
    """The mean surprise of each document's tokens."""
    borders = _borders(shard)
    sums = np.zeros(len(borders) - 1)
    for _, at, tokens in _parts([shard], f"difficulty of {shard.name}", progress):
        tokens = tokens[: int(borders[-1]) - at]
        first = int(np.searchsorted(borders, at, "right")) - 1
        stop = int(np.searchsorted(borders[:-1], at + len(tokens)))
        if len(tokens):
            sums[first:stop] += np.add.reduceat(surprise[tokens], np.maximum(borders[first:stop], at) - at)
    return (sums / np.maximum(1, np.diff(borders))).astype(np.float32)


def _spread(shard: Shard, difficulty: NDArray[np.float32], corpus: Corpus) -> Spread:
    order = np.argsort(difficulty, kind="stable")
    ends = [
        [_document(shard, i, difficulty, corpus) for i in some.tolist()]
        for some in (order[:SHOWN], order[::-1][:SHOWN])
    ]
    quantiles = np.quantile(difficulty, QUANTILES).tolist()
    return Spread(shard.name, shard.kind, len(difficulty), quantiles, *ends)


def _document(shard: Shard, number: int, difficulty: NDArray[np.float32], corpus: Corpus) -> Document:
    begin, end = _borders(shard)[number : number + 2].tolist()
    begin += shard.kind == "text"
    ids = shard.tokens[begin : min(end, begin + BEGINNING)].tolist()
    return Document(number, float(difficulty[number]), corpus.tokenizer.decode(ids))
