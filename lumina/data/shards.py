"""Documents to two token streams on disk, training and held-out, cached by content.

A stream is `<end> tokens <end> tokens <end> …`: an end token is the target that closes a document and the
input that opens the next one. Documents come in the order of their hash, which is random and the same on
every machine.

A cache entry is built under a lock and renamed into place, so a killed process leaves nothing that looks
whole, and a second process waits for the first and uses its work. Every entry is checked against its hashes
when it is opened.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lumina.data import split
from lumina.data.documents import DataFile, Document, digest, find_files, raise_problems, read_files
from lumina.data.tokenizer import Tokenizer, pieces, train_bpe
from lumina.errors import UserError
from lumina.progress import Tell, silent, tracked, whole

FORMAT = f"v1.{split.RULE}"  # of a cache entry
BPE = "bpe"
SIDES = ("train", "heldout")
META = "meta.json"
ENCODE_CHARACTERS = 1 << 22  # encoded at once


@dataclass(frozen=True)
class Shard:
    """One side of the corpus: `tokens` (uint16 or uint32) of `documents` with `text_bytes` bytes of UTF-8."""

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


@dataclass(frozen=True)
class _Sources:
    """The files of both sides; `fingerprint` names their contents."""

    train: list[DataFile]
    eval: list[DataFile]

    def fingerprint(self, progress: Tell) -> str:
        sides = [[file for file in side if file.kind != "ignored"] for side in (self.train, self.eval)]
        files = [file for side in sides for file in side]
        sizes = {file.path: _size(file.path) for file in files}
        hashing = tracked(files, "hashing the data", sum(sizes.values()), progress, lambda file: sizes[file.path])
        digests = [_file_digest(file) for file in hashing]
        border = len(sides[0])
        return digest(json.dumps([sorted(digests[:border]), sorted(digests[border:])]))[:16]


def prepare(
    *,
    train: Sequence[str],
    eval: Sequence[str] = (),
    tokenizer: str = BPE,
    vocab: int,
    seq_len: int,
    cache: Path | None = None,
    progress: Tell = silent,
) -> Corpus:
    """Token streams of `train`, with `eval` held out, or a part of `train` if there is none.

    `tokenizer` is "bpe", trained here on the training side with at most `vocab` ids, or the path of a
    tokenizer.json, which brings its own ids. `cache` is $LUMINA_CACHE or ~/.cache/lumina. Raises `UserError`
    for data that cannot be read, and for a side shorter than one sequence of `seq_len` tokens.
    """
    start = time.perf_counter()
    sources = _find(train, eval)
    foreign = None if tokenizer == BPE else Tokenizer.load(tokenizer)
    folder = cache or Path(os.environ.get("LUMINA_CACHE") or "~/.cache/lumina").expanduser()
    name = f"{FORMAT}-{sources.fingerprint(progress)}"
    entry = folder / f"{name}-{foreign.fingerprint if foreign else f'{BPE}{vocab}'}"

    built, damage = False, _damage(entry)
    if damage is not None:
        with _locked(folder, name):
            damage = _damage(entry)  # another process may have built it meanwhile
            if damage is not None:
                built = True
                _build(folder / name, entry, sources, foreign, vocab, progress)
    corpus = _open(entry)
    corpus.facts["ignored_files"] = sum(file.kind == "ignored" for file in sources.train + sources.eval)
    corpus.facts["cached"] = not built
    if damage:
        corpus.facts["rebuilt"] = damage
    corpus.facts["seconds"] = round(time.perf_counter() - start, 3)
    _check_length(corpus, seq_len)
    return corpus


def data_fingerprint(train: Sequence[str], eval: Sequence[str] = (), progress: Tell = silent) -> str:
    """Names the contents of both sides' files, whatever the files' names and order.

    Raises `UserError` with all problems if a file is missing.
    """
    return _find(train, eval).fingerprint(progress)


def _find(train: Sequence[str], eval: Sequence[str]) -> _Sources:
    if not train:
        raise UserError("data.train is empty", fix="give files, folders or globs, or sample")
    problems: list[str] = []
    seen: dict[str, str] = {}
    sources = _Sources(find_files(train, problems, seen), find_files(eval, problems, seen))
    if problems:
        _read(sources, problems)  # raises, with what is wrong inside the other files too
    return sources


def _read(sources: _Sources, problems: list[str], progress: Tell = silent) -> tuple[list[Document], list[Document]]:
    read = [
        list(read_files(tracked(side, "reading the data", len(side), progress), problems))
        for side in (sources.train, sources.eval)
    ]
    raise_problems(problems)
    return read[0], read[1]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _file_digest(file: DataFile) -> str:
    try:
        return f"{file.kind} {_sha256(file.path)}"
    except OSError as error:
        raise UserError(f"{file.name}: {error.strerror}", fix="make the file readable") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Holds a lock, which the system frees when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            except BaseException:  # half an entry would only fill the disk
                shutil.rmtree(folder / f"{name}.building", ignore_errors=True)
                raise
    except OSError as error:
        raise UserError(
            f"the token cache {folder} cannot be written: {error}",
            fix="set LUMINA_CACHE to a folder you can write, with room for it",
        ) from None


def _build(name: Path, entry: Path, sources: _Sources, foreign: Tokenizer | None, vocab: int, progress: Tell) -> None:
    """Writes the entry of these sources and their tokenizer; the caller holds the lock of `name`.

    Entries are named after their tokenizer, so that a run which brings its own BPE back finds it; "bpe" is a
    link.
    """
    building = Path(f"{name}.building")
    shutil.rmtree(building, ignore_errors=True)  # of a killed process
    sides, facts = _sides(sources, progress)
    tokenizer = foreign or _train(sides[0], vocab, progress)
    tokenizer.save(building)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    meta: dict[str, Any] = {"dtype": dtype, "facts": facts}
    for side, documents in zip(SIDES, sides, strict=True):
        _write_stream(building / f"{side}.bin", documents, tokenizer, dtype, progress)
        text_bytes = sum(len(document.text.encode()) for document in documents)
        meta[side] = {"text_bytes": text_bytes, "documents": len(documents)}
    meta["files"] = {path.name: _sha256(path) for path in sorted(building.iterdir())}
    (building / META).write_text(json.dumps({"sha256": digest(json.dumps(meta)), "meta": meta}))

    final = Path(f"{name}-{tokenizer.fingerprint}")
    shutil.rmtree(final, ignore_errors=True)  # if it was damaged
    building.rename(final)
    if entry != final:
        entry.unlink(missing_ok=True)
        entry.symlink_to(final.name)


def _train(documents: Sequence[Document], vocab: int, progress: Tell) -> Tokenizer:
    with whole("training the tokenizer", progress):
        return train_bpe((document.text for document in documents), vocab)


def _sides(sources: _Sources, progress: Tell) -> tuple[tuple[list[Document], list[Document]], dict[str, Any]]:
    """Both sides in their final order, and what a reader should know of them."""
    read = _read(sources, [], progress)
    train, heldout = ([document for document in side if document.text] for side in read)
    facts: dict[str, Any] = {"empty": sum(map(len, read)) - len(train) - len(heldout)}
    for key, files, documents in (("train", sources.train, train), ("eval", sources.eval, heldout)):
        if files and not documents:
            raise UserError(f"data.{key}: no document has any text", fix="give files with text")
    if sources.eval:
        families = {document.family for document in train}
        facts |= {"split": "given", "eval_in_train": sum(document.family in families for document in heldout)}
    else:
        train, heldout, facts["split"] = split.split(train)
    for side in (train, heldout):
        side.sort(key=lambda document: digest(document.text))
    return (train, heldout), facts


def _write_stream(path: Path, documents: Sequence[Document], tokenizer: Tokenizer, dtype: str, progress: Tell) -> None:
    end = np.array([tokenizer.end_id], dtype).tobytes()
    characters = sum(len(document.text) for document in documents)
    batches = _batches(documents)
    with path.open("wb") as stream:
        stream.write(end)
        for texts, closing in tracked(batches, "encoding", characters, progress, lambda b: sum(map(len, b[0]))):
            for ids, closes in zip(tokenizer.encode_batch(texts), closing, strict=True):
                stream.write(np.array(ids, dtype).tobytes() + (end if closes else b""))


def _batches(documents: Sequence[Document]) -> Iterator[tuple[list[str], list[bool]]]:
    """Pieces of about `ENCODE_CHARACTERS` together, and whether each closes its document."""
    texts: list[str] = []
    closing: list[bool] = []
    size = 0
    for document in documents:
        *others, last = pieces(document.text)
        for text, closes in (*((other, False) for other in others), (last, True)):
            texts.append(text)
            closing.append(closes)
            size += len(text)
            if size >= ENCODE_CHARACTERS:
                yield texts, closing
                texts, closing, size = [], [], 0
    yield texts, closing


def _damage(entry: Path) -> str | None:
    """What is wrong with an entry: None if it is whole, "" if there is none."""
    if not os.path.exists(entry):  # False, too, where we may not look: `_locked` will say so
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
        Shard(np.memmap(entry / f"{side}.bin", mode="r", dtype=meta["dtype"]), **meta[side]) for side in SIDES
    )
    tokenizer = Tokenizer.load(entry)
    names = [*(meta["files"][f"{side}.bin"] for side in SIDES), tokenizer.fingerprint]
    facts = {
        "documents": {"train": train.documents, "heldout": heldout.documents},
        "bytes": {"train": train.text_bytes, "heldout": heldout.text_bytes},
        "tokens": {"train": len(train.tokens), "heldout": len(heldout.tokens)},
        "bytes_per_token": round(train.text_bytes / len(train.tokens), 3),
        "vocab": tokenizer.vocab_size,
        **meta["facts"],
    }
    return Corpus(train, heldout, tokenizer, digest(" ".join(names))[:16], facts)


def _check_length(corpus: Corpus, seq_len: int) -> None:
    """A sequence is `seq_len` inputs and their targets: one token more."""
    tokens = {"training": len(corpus.train.tokens), "held-out": len(corpus.heldout.tokens)}
    short = [f"the {side} side has {count} tokens" for side, count in tokens.items() if count <= seq_len]
    if short:
        given = corpus.facts["split"] == "given"
        longest = min(tokens.values()) - 1
        raise UserError(
            f"corpus shorter than one sequence: {' and '.join(short)}; "
            f"one sequence of model.seq_len={seq_len} needs {seq_len + 1}",
            fix="give more text"
            + ("" if given else ", or hold out a file of your own with data.eval=FILE")
            + (f", or set model.seq_len to at most {longest}" if longest else ""),
        )
