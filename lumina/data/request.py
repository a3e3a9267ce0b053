"""What is asked for: the files and shards of `data.train` and `data.eval`, and whether they serve the mode."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumina.config.schema.data import DataConfig
from lumina.config.weights import split_weight
from lumina.data.containers import hub_revision
from lumina.data.corpus import Corpus, sha256
from lumina.data.files import DataFile, find_files
from lumina.data.meta import is_prepared
from lumina.data.records import Kind, Problems
from lumina.data.scan import Scan, Source, documents, file_size
from lumina.errors import UserError
from lumina.progress import Tell, silent, tracked


@dataclass(frozen=True)
class Request:
    """What is to be prepared, and where what was prepared lies."""

    sources: tuple[Source, ...]
    folders: tuple[tuple[str, Path, float | None], ...]  # name, shards, weight
    ignored: int
    hashes: dict[DataFile, tuple[str, tuple[int, int]]] = field(default_factory=dict)  # and size, time of change


def find(data: DataConfig) -> Request:
    """All files of both sides, each side's in the order of their content. Raises `UserError` with all problems."""
    problems, seen = Problems(data.skip_bad), dict[str, str]()
    sources: list[Source] = []
    folders: list[tuple[str, Path, float | None]] = []
    ignored = 0
    for side, specs in (("train", data.train), ("heldout", data.eval)):
        for spec in specs:
            name, weight = split_weight(spec)
            path = Path(os.path.expanduser(name))
            if is_prepared(path):
                if given := seen.get(str(path.resolve())):
                    problems.file(f"{name}: is already given by {given!r}; give every folder once")
                seen[str(path.resolve())] = spec
                if side == "heldout":
                    problems.file(f"{name}: prepared shards bring their own held-out side; give files to data.eval")
                folders.append((name, path, weight))
                continue
            files = find_files([name], problems, seen)
            ignored += sum(file.container == "ignored" for file in files)
            sources.append(Source(name, side, tuple(f for f in files if f.container != "ignored"), weight))
    if problems.fatal and sources:  # say what is wrong inside the other files too
        for _ in documents(sources, problems, silent, ""):
            pass
    problems.raise_any()
    if not any(source.side == "train" for source in sources) and not folders:
        raise UserError("data.train is empty", fix="give files, folders or globs, or sample")
    return Request(tuple(sources), tuple(folders), ignored)


def contents(request: Request, progress: Tell) -> list[Any]:
    """The hashes of all files, by side and source; the request keeps them."""
    files = [file for source in request.sources for file in source.files]
    for file in tracked(files, "hashing the data", sum(map(file_size, files)), progress, file_size):
        before = stamp(file)  # so that a change while it is hashed is one, too
        request.hashes[file] = file_digest(file), before
    return [[s.side, s.weight, sorted(request.hashes[file][0] for file in s.files)] for s in request.sources]


def stamp(file: DataFile) -> tuple[int, int]:
    """Changes when the file does."""
    if file.container == "hub":
        return 0, 0
    try:
        status = file.path.stat()
    except OSError as error:
        raise UserError(f"{file.name}: {error.strerror}", fix="make the file readable") from None
    return status.st_size, status.st_mtime_ns


def file_digest(file: DataFile) -> str:
    """What names a file's content and how it is read."""
    if file.container == "hub":
        return f"hub {file.name} {hub_revision(file)}"
    try:
        return f"{file.container} {file.compression} {sha256(file.path)}"
    except OSError as error:
        raise UserError(f"{file.name}: {error.strerror}", fix="make the file readable") from None


def identity(file: DataFile, digest: str) -> dict[str, Any]:
    """A source file as it was: a later look tells whether it changed."""
    path = str(file.path.resolve()) if file.container != "hub" else file.name
    return {"path": path, "digest": digest, "container": file.container, "compression": file.compression}


def has_changed(recorded: dict[str, Any]) -> bool:
    """Whether a file that shards were made of is another one now; one that is gone is not."""
    path = Path(recorded["path"])
    try:
        file = DataFile(path, path.name, recorded["container"], recorded["compression"])
        return path.is_file() and file_digest(file) != str(recorded["digest"])
    except (OSError, UserError):  # not known
        return False


def kinds_of(scanned: Scan, sources: Sequence[Source]) -> list[tuple[str, Kind, str]]:
    """The name, kind and format of what each source of the training side holds."""
    found: list[tuple[str, Kind, str]] = []
    for source, formats in zip(sources, scanned.facts["formats"], strict=True):
        if source.side == "train":
            found += [(source.name, "text" if name == "text" else "chat", name) for name in formats]
    return found


def check_kinds(data: DataConfig, found: Sequence[tuple[str, Kind, str]], whole: bool = True) -> None:
    """Raises `UserError` if there is what `data.mode` has no use for or, in the `whole`, not what it needs."""
    words = {"text": "texts", "chat": "conversations"}
    has = {kind for _, kind, _ in found}
    problems = [
        f"{name} holds {words[kind]}" + (f" ({format})" if kind == "chat" else "")
        for name, kind, format in found
        if kind not in data.kinds
    ]
    problems += [f"there are no {words[kind]}" for kind in sorted(data.kinds - has) if whole]
    if problems:
        modes = "hybrid_interleaved or hybrid_sequential" if len(has) > 1 else "base" if has == {"text"} else "finetune"
        needs = " and ".join(words[kind] for kind in sorted(data.kinds))
        fix = f"set data.mode={modes}, or give it what it reads in data.train"
        raise UserError.collect(problems, f"data.mode={data.mode} reads {needs}", fix)


def check_length(corpus: Corpus, seq_len: int) -> None:
    """Of texts both sides fill at least one sequence: `seq_len` inputs and their targets, one token more."""
    sides = {"training": corpus.of("train", "text"), "held-out": corpus.of("heldout", "text")}
    tokens = {side: sum(len(shard.tokens) for shard in shards) for side, shards in sides.items() if shards}
    if not corpus.heldout:
        raise UserError("nothing can be held out of so little", fix="give more, or hold out a file with data.eval=FILE")
    short = [f"the {side} side has {count} tokens" for side, count in tokens.items() if count <= seq_len]
    if short:
        given = corpus.facts.get("split") == "given"
        longest = min(tokens.values()) - 1
        raise UserError(
            f"corpus shorter than one sequence: {' and '.join(short)}; "
            f"one sequence of model.seq_len={seq_len} needs {seq_len + 1}",
            fix="give more text"
            + ("" if given else ", or hold out a file of your own with data.eval=FILE")
            + (f", or set model.seq_len to at most {longest}" if longest else ""),
        )
