"""Files to documents. Every problem of the input is gathered, so that nobody mends them one run at a time.

    specs -> `find_files` -> `read_files` -> documents

A spec is a file, a glob, a folder or "sample", the embedded corpus. A folder is searched with its subfolders,
but not through links to folders and not in hidden ones. A `.jsonl` file holds one object a line with the
string key `text`; any other file is one text document.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lumina.data.families import near_duplicates
from lumina.data.sample import sample_files
from lumina.errors import UserError

SAMPLE = "sample"
FOLDER_SUFFIXES = (".txt", ".md", ".jsonl", ".py")
MAX_PROBLEMS = 20  # enough to see the pattern
NUL_SHARE = 0.1  # of a text that is none; UTF-16 without its mark is UTF-8 too, half of it NUL
SHOWN_KEYS = 8  # of a record without text
NO_FILE = "neither a file nor a folder; a broken link, a pipe or a device gives no text"


@dataclass(frozen=True, slots=True)
class Document:
    """`source` is "a.txt" or "b.jsonl:17"; documents of one `family` share their text and are split as one.

    An empty text is kept here, so that it can be counted.
    """

    text: str
    source: str
    family: str


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that a spec gives. `ignored` files lie in a folder but do not look like text."""

    path: Path
    name: str
    kind: Literal["text", "jsonl", "sample", "ignored"]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def raise_problems(problems: Sequence[str]) -> None:
    if problems:
        shown = list(problems[:MAX_PROBLEMS])
        if len(problems) >= MAX_PROBLEMS:
            shown.append("… reading stopped here; there may be more")
        fix = "mend these or leave them out of data.train and data.eval"
        raise UserError.collect(shown, "the data cannot be read", fix)


def find_files(specs: Sequence[str], problems: list[str], seen: dict[str, str] | None = None) -> list[DataFile]:
    """The files of all `specs`. `seen` says which spec gave a file: no two may give the same one."""
    seen = {} if seen is None else seen
    files: list[DataFile] = []
    for spec in specs:
        try:
            found = {os.path.realpath(file.path): file for file in _expand(spec, problems)}
        except OSError as error:
            problems.append(f"{spec}: {error.filename}: {error.strerror}")
            continue
        repeated = next((path for path in found if path in seen), None)
        if repeated:
            name = found[repeated].name
            problems.append(f"{spec}: {name} is already given by {seen[repeated]!r}; give every file once")
            continue
        seen.update(dict.fromkeys(found, spec))
        files += found.values()
    return files


def _expand(spec: str, problems: list[str]) -> list[DataFile]:
    if spec == SAMPLE:
        return [DataFile(path, name, "sample") for path, name in sample_files()]
    if not spec:  # Path would take it for the current folder
        problems.append("'': an empty name gives no file")
        return []
    path = Path(os.path.expanduser(spec))  # leaves alone what names nobody, where Path would raise
    if path.is_file():
        if path.stat().st_size == 0:
            problems.append(f"{spec}: the file is empty")
        return _data_file(path, problems)
    if path.is_dir():
        return _folder(path, problems)
    matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(spec) else []
    if not matches:
        problems.append(_missing(spec, path))
    files: list[DataFile] = []
    for match in map(Path, matches):
        files += _folder(match, problems) if match.is_dir() else _data_file(match, problems)
    return files


def _data_file(path: Path, problems: list[str]) -> list[DataFile]:
    if not path.is_file():
        problems.append(f"{path}: {NO_FILE}")
        return []
    return [DataFile(path, path.as_posix(), "jsonl" if path.suffix == ".jsonl" else "text")]


def _folder(folder: Path, problems: list[str]) -> list[DataFile]:
    files: list[DataFile] = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            if path.suffix in FOLDER_SUFFIXES:
                files += _data_file(path, problems)
            else:
                files.append(DataFile(path, path.as_posix(), "ignored"))
    if all(file.kind == "ignored" for file in files):
        others = f", only others such as {files[0].name}" if files else ""
        problems.append(f"{folder}: the folder has no {', '.join(FOLDER_SUFFIXES)} files{others}")
    return files


def _raise(error: OSError) -> None:
    raise error


def _missing(spec: str, path: Path) -> str:
    if glob.has_magic(spec):
        return f"{spec}: no file matches (in {Path.cwd()})"
    if os.path.lexists(path):
        return f"{spec}: {NO_FILE}"
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; did you mean {(path.parent / close[0]).as_posix()}?" if close else f" (in {Path.cwd()})"
    return f"{spec}: no such file or folder{hint}"


def read_files(files: Iterable[DataFile], problems: list[str]) -> Iterator[Document]:
    """The documents of `files`, in order. Problems are appended; reading stops at `MAX_PROBLEMS` of them."""
    sample: list[tuple[str, str]] = []
    for file in files:
        if len(problems) >= MAX_PROBLEMS:
            return
        try:
            if file.kind == "jsonl":
                yield from _read_jsonl(file, problems)
            elif file.kind == "text":
                text = _read_text(file)
                yield Document(text, file.name, digest(text))
            elif file.kind == "sample":
                sample.append((_read_text(file), file.name))
        except OSError as error:
            problems.append(f"{file.name}: {error.strerror}")
        except ValueError as error:
            problems.append(str(error))
    leaders = near_duplicates([text for text, _ in sample])
    for (text, name), leader in zip(sample, leaders, strict=True):
        yield Document(text, name, digest(sample[leader][0]))


def _read_text(file: DataFile) -> str:
    raw = file.path.read_bytes()
    try:
        text = raw.decode().removeprefix("\ufeff")  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(_not_utf8(f"{file.name}:{line}", raw, error.start)) from None
    if text.count("\0") > NUL_SHARE * len(text):
        offset = raw.index(b"\0")
        line = raw.count(b"\n", 0, offset) + 1
        hint = "it looks like UTF-16 or a binary file: convert it with iconv -f utf-16le -t utf-8, or give text"
        raise ValueError(f"{file.name}:{line}: a NUL byte at offset {offset}; {hint}")
    return text


def _not_utf8(where: str, raw: bytes, offset: int) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        hint = "it looks like UTF-16: convert it with iconv -f utf-16 -t utf-8"
    elif b"\0" in raw:
        hint = "it looks like a binary file: give text or .jsonl"
    else:
        hint = "convert it, for example with iconv -f latin1 -t utf-8"
    return f"{where}: not UTF-8, byte 0x{raw[offset]:02x} at offset {offset}; {hint}"


def _read_jsonl(file: DataFile, problems: list[str]) -> Iterator[Document]:
    """One document a line; blank lines hold none."""
    offset = 0
    with file.path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            where = f"{file.name}:{number}"
            try:
                if raw.strip():
                    text = _record(raw, where, offset)
                    yield Document(text, where, digest(text))
            except ValueError as error:
                problems.append(str(error))
                if len(problems) >= MAX_PROBLEMS:
                    return
            offset += len(raw)


_JSON_NAMES = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number",
    str: "a string", list: "an array", dict: "an object",
}  # fmt: skip


def _keys(record: dict[str, Any]) -> str:
    """The first keys, each shortened and without signs that could steer a terminal."""
    shown = [key if key.isprintable() else ascii(key)[1:-1] for key in (key[:40] for key in list(record)[:SHOWN_KEYS])]
    more = len(record) - SHOWN_KEYS
    return ", ".join([*shown, f"and {more} more"] if more > 0 else shown) or "none"


def _record(raw: bytes, where: str, offset: int) -> str:
    """The text of one JSON line. Raises `ValueError` saying what is wrong with it."""
    try:
        record = json.loads(raw.rstrip().decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise ValueError(f"{where}: not UTF-8, byte 0x{byte:02x} at offset {offset + error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON, {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{where}: not readable JSON, nested too deeply") from None
    except ValueError:  # Python's limit for whole numbers
        raise ValueError(f"{where}: not readable JSON, a number with more digits than can be meant") from None
    if not isinstance(record, dict):
        raise ValueError(f'{where}: must be an object such as {{"text": "…"}}, is {_JSON_NAMES[type(record)]}')
    if "text" not in record:
        raise ValueError(f'{where}: must have the key "text"; its keys: {_keys(record)}')
    text = record["text"]
    if not isinstance(text, str):
        raise ValueError(f'{where}: "text" must be a string, is {_JSON_NAMES[type(text)]}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f'{where}: "text" has half a surrogate pair, \\u{code:04x}, no character') from None
    return text
