"""Files to records: text, JSON, JSON lines, parquet, data sets of the hub, plain or compressed, within memory.

    files -> `read_files` -> records

Every problem of the input is gathered in `Problems`. A bad record can be left out, a file that ends too early cannot:
nothing is silently shorter than it was given. Records come in the shapes that are around, see `normalise`; the first
good one of a file says in which shape all of that file are.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache

from lumina.data.containers import (
    UnreadableError,
    decoded,
    hub_rows,
    is_json_lines,
    json_lines,
    json_values,
    open_file,
    parquet_rows,
)
from lumina.data.families import near_duplicates
from lumina.data.files import DataFile
from lumina.data.records import Message, Problems, Record, digest
from lumina.data.sample import sample_files
from lumina.data.shapes import normalised
from lumina.data.tokenizer import PIECE_BORDER

PART = 1 << 22  # characters of a text that are held at once
LONGEST_PART = 8  # times `PART`: a text without a line that ends is cut anywhere
CHUNK = 1 << 20  # bytes read at once
NUL_SHARE = 0.1  # of a text that is none; UTF-16 without its mark is UTF-8 too, half of it NUL


def read_files(files: Iterable[DataFile], problems: Problems) -> Iterator[Record]:
    """The records of `files`, in order. Reading stops when there are enough problems."""
    for file in files:
        if problems.enough:
            return
        yield from read_file(file, problems)


def read_file(file: DataFile, problems: Problems, part: int = PART) -> Iterator[Record]:
    """The records of one file; a text longer than `part` characters comes in several of them.

    Raises `UserError` if a library that this kind of file needs is not installed.
    """
    read = 0
    try:
        for record in _records(file, problems, part):
            read += record.last
            yield record
    except EOFError:
        problems.file(f"{file.name}: the file ends in the middle ({_packed(file)}){_read(read)}")
    except (OSError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or f"not readable as {_packed(file)}, {error}"
        problems.file(f"{file.name}: {reason}{_read(read)}")
    except UnreadableError as error:
        problems.file(f"{error}{_read(read)}")


def _packed(file: DataFile) -> str:
    return {"": file.container, "gz": "gzip", "zst": "zstd"}[file.compression]


def _read(records: int) -> str:
    return f"; {records} records before that were read" if records else ""


def _records(file: DataFile, problems: Problems, part: int) -> Iterator[Record]:
    match file.container:
        case "text":
            yield from _text(file, problems, part)
        case "sample":
            yield from _text(file, problems, part, _sample_families().get(file.name))
        case "sample_chat":
            yield from _sample_chat(file, problems)
        case "jsonl":
            yield from normalised(json_lines(file), problems)
        case "json":
            yield from normalised(json_lines(file) if is_json_lines(file) else json_values(file), problems)
        case "parquet":
            yield from normalised(parquet_rows(file), problems)
        case "hub":
            yield from normalised(hub_rows(file), problems)


# -- text


def _text(file: DataFile, problems: Problems, part: int, family: str | None = None) -> Iterator[Record]:
    """The text in parts. It is read twice: the first time says whether it is one, before any part is given away."""
    try:
        _check_text(file)
    except ValueError as error:
        problems.record(str(error))
        return
    with open_file(file) as stream:
        try:
            for text, last in cut(decoded(stream, file.name), part):
                family = family or digest(text)
                yield Record(file.name, text=text, family=family, last=last)
        except ValueError as error:
            raise UnreadableError(f"{error}; the file changed while it was read") from None


def cut(chunks: Iterable[str], part: int) -> Iterator[tuple[str, bool]]:
    """The text that `chunks` make up in parts of `part` characters or more, and whether a part is the last one.

    Where it is cut depends on the text, not on the chunks, and the tokenizer ends a word there. If no line ends within
    `LONGEST_PART` times that, the cut may lie anywhere.
    """
    held, searched, longest = "", part, LONGEST_PART * part
    for chunk in chunks:
        held += chunk
        while len(held) > part:
            border = PIECE_BORDER.search(held, searched)
            if border is None and len(held) <= longest:
                searched = max(part, len(held) - 3)  # where a border may begin that ends in the next chunk
                break
            end = min(longest, border.end()) if border else longest
            yield held[:end], False
            held, searched = held[end:], part
    yield held, True


def _check_text(file: DataFile) -> None:
    """Raises `ValueError` if this is no text in UTF-8."""
    size = nuls = 0
    with open_file(file) as stream:
        for text in decoded(stream, file.name):
            size += len(text)
            nuls += text.count("\0")
    if nuls > NUL_SHARE * size:
        line, offset = _first_nul(file)
        hint = "it looks like UTF-16 or a binary file: convert it with iconv -f utf-16le -t utf-8, or give text"
        raise ValueError(f"{file.name}:{line}: a NUL byte at offset {offset}; {hint}")


def _first_nul(file: DataFile) -> tuple[int, int]:
    """Its line, from 1, and its offset in bytes."""
    line, offset = 1, 0
    with open_file(file) as stream:
        while (raw := stream.read(CHUNK)) and b"\0" not in raw:
            line, offset = line + raw.count(b"\n"), offset + len(raw)
    found = raw.index(b"\0")
    return line + raw.count(b"\n", 0, found), offset + found


# -- the embedded corpus


@lru_cache(maxsize=1)
def _sample_families() -> dict[str, str]:
    """The family of each file: near-duplicates are one."""
    files = sample_files()
    texts = [path.read_bytes().decode(errors="replace").removeprefix("\ufeff") for path, _ in files]
    leaders = near_duplicates(texts)
    return {name: digest(texts[leader]) for (_, name), leader in zip(files, leaders, strict=True)}


def _sample_chat(file: DataFile, problems: Problems) -> Iterator[Record]:
    from lumina.data.sample_chat import conversations

    text = "".join(record.text for record in _text(file, problems, PART))
    family = _sample_families().get(file.name) or digest(text)
    for i, (question, answer) in enumerate(conversations(text, file.name), 1):
        messages = (Message("user", question), Message("assistant", answer))
        yield Record(f"{file.name}:{i}", messages=messages, family=family, format="docstrings")
