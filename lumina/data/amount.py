"""How many tokens data holds, without preparing it: counted where that was done before, else estimated from its bytes.

The cache names its entries by what the files hold, and reading all of them takes its time: here an entry counts if it
was made of these very files, and none of them was written to since.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lumina.config.schema.data import DataConfig
from lumina.config.weights import split_weight
from lumina.data.files import DataFile, find_files
from lumina.data.meta import META, is_prepared, read_meta
from lumina.data.records import Problems
from lumina.errors import UserError

# Bytes a token of our BPE by its vocabulary: on the sample with 2,048 and 4,096 ids (docs/log.md and the demo, texts);
# beyond, what published tokenizers of 32,000 ids and more make of English.
BYTES_PER_TOKEN = ((1024, 1.0), (2048, 3.4), (4096, 3.9), (1 << 62, 4.4))
EXPANSION = {"gz": 3.5, "zst": 3.5, "parquet": 2.5}  # bytes of text in one of such a file, roughly


@dataclass(frozen=True)
class Amount:
    """Tokens to train on and held out, and whether they were `counted` or estimated, as `how` says.

    Estimates may be off by a quarter, and by more where files are compressed or hold little else than markup.
    """

    train: float
    heldout: float
    counted: bool
    how: str


def amount(data: DataConfig, vocab: int) -> Amount | None:
    """What `data.train` and `data.eval` hold, with a vocabulary of so many ids; None for data sets of the hub.

    Raises `UserError` if a file is not there.
    """
    problems = Problems(0)
    found = {side: _find(specs, problems) for side, specs in (("train", data.train), ("heldout", data.eval))}
    problems.raise_any()
    files = {side: list(chain.from_iterable(source for source in sources if isinstance(source, list)))
             for side, sources in found.items()}  # fmt: skip
    if any(file.container == "hub" for file in chain(*files.values())):
        return None
    folders = [source for source in found["train"] if isinstance(source, Path)]
    amounts = [_of_shards(read_meta(folder), f"{folder}, prepared") for folder in folders]
    if files["train"]:
        amounts.append(_cached(files, data, vocab) or _estimated(files, data, vocab))
    train, heldout = (sum(getattr(each, side) for each in amounts) for side in ("train", "heldout"))
    return Amount(train, heldout, all(each.counted for each in amounts), "; ".join(each.how for each in amounts))


def _find(specs: Sequence[str], problems: Problems) -> list[Path | list[DataFile]]:
    """Of each spec the folder of shards, or the files."""
    names = [split_weight(spec)[0] for spec in specs]
    return [
        Path(os.path.expanduser(name))
        if is_prepared(Path(os.path.expanduser(name)))
        else [file for file in find_files([name], problems) if file.container != "ignored"]
        for name in names
    ]


def _of_shards(meta: Mapping[str, Any], how: str) -> Amount:
    tokens = {
        side: sum(stream["tokens"] for stream in meta["streams"] if stream["side"] == side)
        for side in ("train", "heldout")
    }
    return Amount(tokens["train"], tokens["heldout"], True, f"counted: {how}")


def _cached(files: Mapping[str, list[DataFile]], data: DataConfig, vocab: int) -> Amount | None:
    """The newest entry of the cache that was made of these files, with this vocabulary if one was."""
    entries = list(_entries())
    if not entries:
        return None
    wanted = {str(file.path.resolve()) for file in chain(*files.values())}
    changed = max((_changed(path) for path in wanted), default=0.0)
    best: tuple[bool, float, Mapping[str, Any]] | None = None
    for entry in entries:
        try:
            meta, made = read_meta(entry), _changed(entry / META)
            there = {file["path"] for source in meta["sources"] for file in source["files"]}
            cleaned = "removed" in meta["facts"]
        except (UserError, LookupError, TypeError):
            continue
        if there == wanted and changed <= made and cleaned == data.quality.active:
            rank = (_is_of(entry, vocab, data.tokenizer), made)
            best = (*rank, meta) if best is None or rank > best[:2] else best
    if best is None:
        return None
    return _of_shards(best[2], "the prepared shards in the cache" + ("" if best[0] else ", of another vocabulary"))


def _entries() -> Iterator[Path]:
    folder = Path(os.environ.get("LUMINA_CACHE") or "~/.cache/lumina").expanduser()
    if folder.is_dir():
        yield from (entry for entry in folder.iterdir() if not entry.is_symlink() and (entry / META).is_file())


def _is_of(entry: Path, vocab: int, tokenizer: str) -> bool:
    """Whether an entry's tokenizer is our BPE of so many ids; of another's nothing is known without reading it."""
    stem = entry.name.rpartition("-")[0]
    link = entry.parent / f"{stem}-bpe{vocab}"
    return tokenizer == "bpe" and os.path.realpath(link) == os.path.realpath(entry)


def _changed(path: str | Path) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return float("inf")


def _estimated(files: Mapping[str, list[DataFile]], data: DataConfig, vocab: int) -> Amount:
    """From the sizes of the files."""
    from lumina.data.split import SHARE

    per_token = next(bytes_ for most, bytes_ in BYTES_PER_TOKEN if vocab <= most)
    train, heldout = (sum(map(_text_bytes, files[side])) for side in ("train", "heldout"))
    held = heldout if data.eval else SHARE * train
    kept = train if data.eval else train - held
    return Amount(
        kept / per_token, held / per_token, False, f"estimated from {train:.3g} bytes at {per_token:g} a token"
    )


def _text_bytes(file: DataFile) -> float:
    packed = "parquet" if file.container == "parquet" else file.compression
    try:
        return file.path.stat().st_size * EXPANSION.get(packed, 1.0)
    except OSError:
        return 0.0
