"""Shards on disk: opened, verified, vouched for.

A folder of shards holds its streams, the tokenizer that made them, and `meta.json` with the hash of every other file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from lumina.data.meta import META, is_prepared, read_meta
from lumina.data.records import Kind, digest
from lumina.data.streams import Stream
from lumina.data.tokenizer import Tokenizer
from lumina.errors import UserError
from lumina.progress import Tell, silent, whole

UNFINISHED = (KeyboardInterrupt, SystemExit)  # what leaves work behind that is gone on with


@dataclass(frozen=True)
class Shard:
    """One side of one source: `tokens` (uint16 or uint32), of conversations with `marks`, and where documents begin.

    `text_bytes` are bytes of UTF-8, `answer_bytes` those of the assistant's turns, whose `counted` tokens are marked.
    `difficulty` of each document is there if `lumina data difficulty` wrote it.
    """

    folder: Path
    name: str  # of the source
    stream: Stream
    dtype: str
    formats: dict[str, int]  # documents of the source by how they were written
    weight: float | None = None
    vouched: frozenset[str] = frozenset()  # the files that the folder's hashes cover

    @property
    def kind(self) -> Kind:
        return self.stream.kind

    @cached_property
    def tokens(self) -> NDArray[Any]:
        return np.memmap(self._file("tokens"), mode="r", dtype=self.dtype)

    @cached_property
    def marks(self) -> NDArray[np.uint8]:
        return np.memmap(self._file("marks"), mode="r", dtype=np.uint8)

    @cached_property
    def starts(self) -> NDArray[Any]:
        return np.memmap(self._file("starts"), mode="r", dtype="<u8")

    @cached_property
    def difficulty(self) -> NDArray[Any] | None:
        file = self._file("difficulty")
        return np.memmap(file, mode="r", dtype="<f4") if file.name in self.vouched else None

    def _file(self, what: str) -> Path:
        return self.folder / f"{self.stream.name}.{what}"


@dataclass(frozen=True)
class Corpus:
    """Both sides of all sources; `fingerprint` names the streams and the tokenizer; `facts` are for a reader."""

    train: tuple[Shard, ...]
    heldout: tuple[Shard, ...]
    tokenizer: Tokenizer
    fingerprint: str
    facts: dict[str, Any]

    def of(self, side: str, kind: Kind) -> tuple[Shard, ...]:
        return tuple(shard for shard in (self.train if side == "train" else self.heldout) if shard.kind == kind)


def damage(entry: Path) -> str | None:
    """What is wrong with a folder of shards: None if it is whole, "" if there is none."""
    if not os.path.exists(entry):  # False, too, where we may not look: `locked` will say so
        return ""
    try:
        stored = json.loads((entry / META).read_text(encoding="utf-8"))
        if digest(json.dumps(stored["meta"])) != stored["sha256"]:
            return f"{META} does not match its hash"
        for name, expected in stored["meta"]["files"].items():
            if sha256(entry / name) != expected:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read ({type(error).__name__}: {error})"
    return None


def open_shards(entry: Path) -> Corpus:
    """Opens whole shards. Their streams stay on disk until they are read."""
    meta = read_meta(entry)
    shards = [
        Shard(entry, source["name"], Stream(**values), meta["dtype"], source["formats"], None, frozenset(meta["files"]))
        for values in meta["streams"]
        for source in [meta["sources"][values["source"]]]
    ]
    tokenizer = Tokenizer.load(entry)
    names = [*meta["files"].values(), tokenizer.fingerprint]
    train, heldout = (tuple(s for s in shards if s.stream.side == side) for side in ("train", "heldout"))
    return Corpus(
        train, heldout, tokenizer, digest(" ".join(names))[:16], {**meta["facts"], "sources": meta["sources"]}
    )


def open_folder(folder: Path, progress: Tell = silent) -> Corpus:
    """The shards of a prepared folder. Raises `UserError` if it is none, or damaged."""
    if not is_prepared(folder):
        fix = "give one that was made so: lumina data prepare … --out DIR"
        raise UserError(f"{folder}: not a folder of prepared shards", fix)
    verify(str(folder), folder, progress)
    return open_shards(folder)


def replace_files(folder: Path, new: Mapping[str, Path]) -> bool:
    """Moves files into a prepared folder, under these names, and vouches for them; says whether anything changed.

    First it stops vouching for the old ones: whenever it is killed, the folder stays whole.
    """
    stored = read_meta(folder)
    hashes = {name: sha256(path) for name, path in new.items()}
    if all(stored["files"].get(name) == value for name, value in hashes.items()):
        for path in new.values():
            path.unlink()
        return False
    with locked(folder.parent, f".{folder.name}", f"the folder {folder.parent}", "make it writable, with room for it"):
        others = {name: value for name, value in stored["files"].items() if name not in new}
        write_meta(folder, stored | {"files": others})
        for name in new:
            (folder / name).unlink(missing_ok=True)
        for name, path in new.items():
            path.replace(folder / name)
        write_meta(folder, stored | {"files": dict(sorted((others | hashes).items()))})
    return True


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    aside = folder / f"{META}.tmp"
    aside.write_text(json.dumps({"sha256": digest(json.dumps(meta)), "meta": meta}), encoding="utf-8")
    aside.replace(folder / META)


def verify(name: str, folder: Path, progress: Tell) -> None:
    with whole(f"verifying {name}", progress):
        wrong = damage(folder)
    if wrong:
        raise UserError(f"{folder}: damaged shards: {wrong}", fix="prepare them again: lumina data prepare … --out")


@contextmanager
def locked(folder: Path, name: str, what: str, fix: str) -> Iterator[None]:
    """Holds a lock, which the system frees when the process ends, however it ends. `fix`: if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.lock"
        with _flocked(path):
            try:
                yield
            except UNFINISHED:
                raise
            except BaseException:  # half of it would only fill the disk
                shutil.rmtree(folder / f"{name}.building", ignore_errors=True)
                raise
            finally:
                path.unlink(missing_ok=True)
    except OSError as error:
        ours = (folder / f"{name}.building", folder / f"{name}.lock")
        where = Path(error.filename or folder)
        if where != folder and not any(where.is_relative_to(path) for path in ours):
            raise  # a source that cannot be read
        raise UserError(f"{what} cannot be written: {error}", fix) from None


def _flocked(path: Path) -> TextIO:
    """The file, locked. One that its holder deleted meanwhile locks nobody out: then another one is made."""
    while True:
        lock = path.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() and os.path.samefile(path, lock.fileno()):
            return lock
        lock.close()


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
