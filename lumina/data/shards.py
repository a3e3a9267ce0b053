"""Documents to two token streams on disk, training and held-out, cached by content.

A stream is `<end> tokens <end> tokens <end> …`: an end token is the target that closes a document and the input that
opens the next one. Documents come in the order of their hash, which is random and the same on every machine.

A cache entry is built under a lock and renamed into place, so a killed process leaves nothing that looks whole, and a
second process waits for the first and uses its work. Every entry is checked against its hashes when it is opened.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lumina.data import split
from lumina.data.documents import DataFile, Document, digest, find_files, raise_problems, read_files
from lumina.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from lumina.data.tokenizer import Tokenizer, train_bpe
from lumina.errors import UserError

FORMAT = 1  # of a cache entry
BPE = "bpe"
BPE_CHARACTERS = 1 << 26  # a tokenizer learns nothing more from longer text, and time grows with it
ENCODE_CHARACTERS = 1 << 22  # encoded at once

SIDES = ("train", "heldout")
META = "meta.json"


@dataclass(frozen=True)
class Shard:
    """One side of the corpus: `tokens` is the stream (uint16 or uint32), `text_bytes` the UTF-8 bytes of its text."""

    tokens: NDArray[Any]
    text_bytes: int
    documents: int


@dataclass(frozen=True)
class Corpus:
    """`fingerprint` names both streams and the tokenizer; `facts` are plain values for a reader."""

    train: Shard
    heldout: Shard
    tokenizer: Tokenizer
    fingerprint: str
    facts: dict[str, Any]


def prepare(
    *,
    train: Sequence[str],
    eval: Sequence[str] = (),
    tokenizer: str = BPE,
    vocab: int,
    seq_len: int,
    cache: Path | None = None,
) -> Corpus:
    """Token streams of `train`, with `eval` held out, or a part of `train` if there is none.

    `tokenizer` is "bpe", trained here on the training side with `vocab` ids, or the path of a `tokenizer.json`, which
    brings its own vocabulary. Raises `UserError` for data that cannot be read, or is shorter than one sequence of
    `seq_len` tokens on either side.
    """
    start = time.perf_counter()
    files = _find(train, eval)
    foreign = None if tokenizer == BPE else Tokenizer.load(tokenizer)
    request = [FORMAT, split.RULE, _fingerprint(*files), foreign.fingerprint if foreign else f"{BPE} {vocab}"]
    folder = cache or _default_cache()
    entry = folder / hashlib.sha256(json.dumps(request).encode()).hexdigest()[:24]

    damage = _damage(entry)
    cached = damage is None
    if not cached:
        with _locked(entry):
            damage = _damage(entry)  # another process may have built it meanwhile
            if damage is not None:
                _build(entry, *files, foreign, vocab)
    corpus = _open(entry)
    corpus.facts.update(
        ignored_files=sum(file.kind == "ignored" for side in files for file in side),
        cached=cached,
        seconds=round(time.perf_counter() - start, 3),
    )
    if damage and not cached:
        corpus.facts["rebuilt"] = damage
    _check_length(corpus, seq_len)
    return corpus


def data_fingerprint(train: Sequence[str], eval: Sequence[str] = ()) -> str:
    """Names the files' contents on both sides, whatever their names and order. Raises `UserError` like `prepare`."""
    return _fingerprint(*_find(train, eval))


def _find(train: Sequence[str], eval: Sequence[str]) -> tuple[list[DataFile], list[DataFile]]:
    if not train:
        raise UserError("data.train is empty", fix="give files, folders or globs, or sample")
    problems: list[str] = []
    seen: dict[Path, str] = {}
    sides = find_files(train, problems, seen), find_files(eval, problems, seen)
    if problems:  # show those inside the files too
        for side in sides:
            list(read_files(side, problems))
        raise_problems(problems)
    return sides


def _fingerprint(train: Sequence[DataFile], eval: Sequence[DataFile]) -> str:
    sides = [sorted(_file_digest(file) for file in side if file.kind != "ignored") for side in (train, eval)]
    return hashlib.sha256(json.dumps(sides).encode()).hexdigest()[:16]


def _file_digest(file: DataFile) -> str:
    try:
        with file.path.open("rb") as stream:
            return f"{file.kind} {hashlib.file_digest(stream, 'sha256').hexdigest()}"
    except OSError as error:
        raise UserError(f"{file.name}: {error.strerror}", fix="make the file readable") from None


def _default_cache() -> Path:
    return Path(os.environ.get("LUMINA_CACHE") or "~/.cache/lumina").expanduser()


@contextmanager
def _locked(entry: Path) -> Iterator[None]:
    """Holds the entry's lock; the system frees it when the process ends, however it ends."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = entry.with_suffix(".lock").open("w")
    except OSError as error:
        raise UserError(
            f"the token cache {entry.parent} cannot be written: {error.strerror}",
            fix="set LUMINA_CACHE to a folder you can write",
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(
    entry: Path, train: Sequence[DataFile], eval: Sequence[DataFile], foreign: Tokenizer | None, vocab: int
) -> None:
    sides, facts = _documents(train, eval)
    tokenizer = foreign or train_bpe(_first_texts(sides[0]), vocab)
    building = entry.with_suffix(".building")
    shutil.rmtree(building, ignore_errors=True)  # of a killed process: we hold the lock
    tokenizer.save(building)
    meta: dict[str, Any] = {
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        "facts": facts,
    }
    for name, documents in zip(SIDES, sides, strict=True):
        _write_stream(building / f"{name}.bin", documents, tokenizer, meta["dtype"])
        text_bytes = sum(len(document.text.encode()) for document in documents)
        meta[name] = {"text_bytes": text_bytes, "documents": len(documents)}
    meta["files"] = {path.name: _sha256(path) for path in sorted(building.iterdir())}
    (building / META).write_text(json.dumps({"sha256": digest(json.dumps(meta)), "meta": meta}))
    shutil.rmtree(entry, ignore_errors=True)  # damaged
    building.rename(entry)


def _documents(
    train: Sequence[DataFile], eval: Sequence[DataFile]
) -> tuple[tuple[list[Document], list[Document]], dict[str, Any]]:
    """Both sides in their final order, and what a reader should know of them."""
    problems: list[str] = []
    given = [list(read_files(side, problems)) for side in (train, eval)]
    raise_problems(problems)
    texts, held = ([document for document in side if document.text] for side in given)
    facts: dict[str, Any] = {"empty": sum(map(len, given)) - len(texts) - len(held), "split": "given"}
    for name, documents, asked in (("data.train", texts, train), ("data.eval", held, eval)):
        if asked and not documents:
            raise UserError(
                f"{name}: no documents, all {facts['empty']} are empty", fix="give files with text"
            )
    if eval:
        trained = {document.family for document in texts}
        facts["eval_in_train"] = sum(document.family in trained for document in held)
    else:
        texts, held, facts["split"] = split.split(texts)
    return (_shuffled(texts), _shuffled(held)), facts


def _shuffled(documents: Iterable[Document]) -> list[Document]:
    return sorted(documents, key=lambda document: digest(document.text))


def _first_texts(documents: Sequence[Document]) -> Iterator[str]:
    """Texts of the first documents, `BPE_CHARACTERS` long together, the first one at any length."""
    lengths = accumulate((len(document.text) for document in documents[:-1]), initial=0)
    pairs = zip(documents, lengths, strict=True)
    return (document.text for document, before in takewhile(lambda pair: pair[1] < BPE_CHARACTERS, pairs))


def _write_stream(path: Path, documents: Sequence[Document], tokenizer: Tokenizer, dtype: str) -> None:
    end = np.array([tokenizer.end_id], dtype)
    with path.open("wb") as stream:
        stream.write(end)
        for texts in _batches(documents):
            for ids in tokenizer.encode_batch(texts):
                stream.write(np.array(ids, dtype))
                stream.write(end)


def _batches(documents: Sequence[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        if size >= ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _damage(entry: Path) -> str | None:
    """What is wrong with an entry: None if it is whole, "" if there is none."""
    if not entry.exists():
        return ""
    try:
        stored = json.loads((entry / META).read_text())
        if digest(json.dumps(stored["meta"])) != stored["sha256"]:
            return f"{META} does not match its hash"
        for name, expected in stored["meta"]["files"].items():
            if _sha256(entry / name) != expected:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read ({type(error).__name__}: {error})"
    return None


def _open(entry: Path) -> Corpus:
    """Opens a whole entry. Its streams stay on disk until they are read."""
    meta = json.loads((entry / META).read_text())["meta"]
    train, heldout = (
        Shard(np.memmap(entry / f"{name}.bin", mode="r", dtype=meta["dtype"]), **meta[name]) for name in SIDES
    )
    tokenizer = Tokenizer.load(entry / TOKENIZER_FILE)
    streams = [meta["files"][f"{name}.bin"] for name in SIDES]
    facts = {
        "documents": {"train": train.documents, "heldout": heldout.documents},
        "bytes": {"train": train.text_bytes, "heldout": heldout.text_bytes},
        "tokens": {"train": len(train.tokens), "heldout": len(heldout.tokens)},
        "bytes_per_token": round(train.text_bytes / len(train.tokens), 3),
        "vocab": tokenizer.vocab_size,
        **meta["facts"],
    }
    fingerprint = digest(" ".join([*streams, tokenizer.fingerprint]))[:16]
    return Corpus(train, heldout, tokenizer, fingerprint, facts)


def _check_length(corpus: Corpus, seq_len: int) -> None:
    """A sequence is `seq_len` inputs and their targets: one token more."""
    sides = {"training": len(corpus.train.tokens), "held-out": len(corpus.heldout.tokens)}
    short = [f"the {side} side has {count} tokens" for side, count in sides.items() if count <= seq_len]
    if short:
        smallest = min(sides.values()) - 1
        lower = f", or set model.seq_len to {smallest} or less" if smallest >= 1 else ""
        give_eval = (
            "" if corpus.facts["split"] == "given" else " (or hold out a file of your own with data.eval)"
        )
        raise UserError(
            f"corpus shorter than one sequence: {' and '.join(short)}, model.seq_len={seq_len} needs {seq_len + 1}",
            fix=f"give more text{give_eval}{lower}",
        )
