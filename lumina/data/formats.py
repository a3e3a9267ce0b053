"""Files to records: text, JSON, JSON lines, parquet, data sets of the hub, plain or compressed, within memory.

    files -> `read_files` -> records

Every problem of the input is gathered in `Problems`. A bad record can be left out, a file that ends too early cannot:
nothing is silently shorter than it was given. Records come in the shapes that are around, see `normalise`; the first
good one of a file says in which shape all of that file are.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from lumina.data.families import near_duplicates
from lumina.data.files import HUB, DataFile, parse_hub
from lumina.data.records import Message, Problems, Record, Role, digest
from lumina.data.sample import sample_files
from lumina.data.tokenizer import _PIECE_BORDER
from lumina.errors import UserError

PART = 1 << 22  # characters of a text that are held at once
LONGEST_PART = 8  # times `PART`: a text without a line that ends is cut anywhere
CHUNK = 1 << 20  # bytes read at once
ZSTD_CHUNK = 1 << 12  # a thousand blocks at most, of at most 128 KiB each
LONGEST = 1 << 26  # bytes of one record; a longer one is no record but a file without line ends
BATCH = 1024  # rows of parquet
NUL_SHARE = 0.1  # of a text that is none; UTF-16 without its mark is UTF-8 too, half of it NUL
SHOWN_KEYS = 8  # of a record of no known format


class UnreadableError(Exception):
    """A file that cannot be read, or not any further; the message names it."""


class Item(NamedTuple):
    """A value where a record should be, or what is wrong with it."""

    where: str
    value: object


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
            yield from _normalised(_json_lines(file), problems)
        case "json":
            yield from _normalised(_json_lines(file) if _is_json_lines(file) else _json(file), problems)
        case "parquet":
            yield from _normalised(_parquet(file), problems)
        case "hub":
            yield from _normalised(_hub(file), problems)


# -- text


def _text(file: DataFile, problems: Problems, part: int, family: str | None = None) -> Iterator[Record]:
    """The text in parts. It is read twice: the first time says whether it is one, before any part is given away."""
    try:
        _check_text(file)
    except ValueError as error:
        problems.record(str(error))
        return
    with _open(file) as stream:
        try:
            for text, last in cut(_decoded(stream, file.name), part):
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
            border = _PIECE_BORDER.search(held, searched)
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
    with _open(file) as stream:
        for text in _decoded(stream, file.name):
            size += len(text)
            nuls += text.count("\0")
    if nuls > NUL_SHARE * size:
        line, offset = _first_nul(file)
        hint = "it looks like UTF-16 or a binary file: convert it with iconv -f utf-16le -t utf-8, or give text"
        raise ValueError(f"{file.name}:{line}: a NUL byte at offset {offset}; {hint}")


def _first_nul(file: DataFile) -> tuple[int, int]:
    """Its line, from 1, and its offset in bytes."""
    line, offset = 1, 0
    with _open(file) as stream:
        while (raw := stream.read(CHUNK)) and b"\0" not in raw:
            line, offset = line + raw.count(b"\n"), offset + len(raw)
    found = raw.index(b"\0")
    return line + raw.count(b"\n", 0, found), offset + found


def _decoded(stream: io.BufferedIOBase, name: str) -> Iterator[str]:
    """The text of a stream of UTF-8, without its byte-order mark. Raises `ValueError` naming the first bad byte."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    head, nul, fed, line, raw = b"", False, 0, 1, b"?"
    while raw:
        raw = stream.read(CHUNK)
        nul = nul or b"\0" in raw
        head = (head + raw[:2])[:2]
        offset = fed - len(decoder.getstate()[0])  # of the first byte that is not decoded yet
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            bad = f"not UTF-8, byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"
            raise ValueError(f"{name}:{line}: {bad}; {_hint(head, nul)}") from None
        line += text.count("\n")
        fed += len(raw)
        yield text if offset else text.removeprefix("\ufeff")


def _hint(head: bytes, nul: bool) -> str:
    if head in (b"\xff\xfe", b"\xfe\xff"):
        return "it looks like UTF-16: convert it with iconv -f utf-16 -t utf-8"
    if nul:
        return "it looks like a binary file: give text or .jsonl"
    return "convert it, for example with iconv -f latin1 -t utf-8"


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
        yield Record(f"{file.name}:{i}", messages=messages, family=family)


# -- compression


def _open(file: DataFile) -> io.BufferedIOBase:
    """The bytes inside. Reading raises `EOFError` if the file ends before its compression does."""
    if file.compression and file.path.stat().st_size == 0:
        raise EOFError
    if file.compression == "gz":
        return gzip.open(file.path)
    return io.BufferedReader(_Zstd(file)) if file.compression == "zst" else file.path.open("rb")


class _Zstd(io.RawIOBase):
    """The bytes inside one or more frames. The library's own reader takes a file that was cut for a whole one."""

    def __init__(self, file: DataFile) -> None:
        self._name = file.name
        self._library = _library("zstandard", file.name)
        self._source = file.path.open("rb")
        self._frame: Any = None
        self._rest = b""  # after the frame that ended
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._fill():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _fill(self) -> bool:
        packed = self._rest or self._source.read(ZSTD_CHUNK)
        if not packed:
            if self._frame is not None:
                raise EOFError
            return False
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(packed))
        except self._library.ZstdError as error:
            raise UnreadableError(f"{self._name}: not readable as zstd, {error}") from None
        self._rest = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame
        return True

    def close(self) -> None:
        self._source.close()
        super().close()


def _library(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fix = "pip install 'lumina-ai[data]'"
        raise UserError(f"{name}: reading it needs {module.partition('.')[0]} ({error})", fix) from None


# -- JSON


def _json_lines(file: DataFile) -> Iterator[Item]:
    """One value a line; blank lines hold none."""
    number = offset = 0
    with _open(file) as stream:
        while raw := stream.readline(LONGEST + 1):
            number += 1
            if len(raw) > LONGEST and not raw.endswith(b"\n"):
                yield Item(f"{file.name}:{number}", ValueError(f"a line longer than {LONGEST} bytes"))
                offset += _skip_line(stream)
            elif raw.strip():
                yield Item(f"{file.name}:{number}", _parse(raw, offset))
            offset += len(raw)


def _skip_line(stream: io.BufferedIOBase) -> int:
    skipped = 0
    while rest := stream.readline(CHUNK):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


def _parse(raw: bytes, offset: int) -> object:
    """The value of a line of JSON, or what is wrong with it."""
    try:
        return json.loads(raw.rstrip().decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8, byte 0x{raw[error.start]:02x} at offset {offset + error.start}")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON, {_reason(error)} at column {error.colno}")
    except (RecursionError, ValueError) as error:
        return ValueError(_unmeant(error))


def _reason(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at")  # "Unterminated string starting at"


def _unmeant(error: Exception) -> str:
    """JSON that Python refuses: too deep, or beyond its limit for whole numbers."""
    if isinstance(error, RecursionError):
        return "not readable JSON, nested too deeply"
    return "not readable JSON, a number with more digits than can be meant"


def _is_json_lines(file: DataFile) -> bool:
    """Whether the first line that is not blank is an object by itself."""
    with _open(file) as stream:
        first = b"\n"
        while first and first in b"\xef\xbb\xbf \t\r\n":
            first = stream.read(1)
        return first == b"{" and isinstance(_parse(first + stream.readline(LONGEST), 0), dict)


def _json(file: DataFile) -> Iterator[Item]:
    """The values of an array, or one object, or several; after a mistake nobody knows where the next one begins."""
    with _open(file) as stream:
        try:
            yield from _values(_Window(_decoded(stream, file.name), file.name))
        except ValueError as error:
            raise UnreadableError(f"{error}; the rest of the file cannot be read") from None


def _values(window: _Window) -> Iterator[Item]:
    if window.next() != "[":
        while window.next():
            yield window.value()
        return
    window.advance(1)
    more = window.next() != "]"
    while more:
        yield window.value()
        if window.next() not in ("]", ","):
            raise window.error("Expecting ',' delimiter" if window.next() else "the array has no end", window.position)
        if more := window.next() == ",":
            window.advance(1)
            window.next()
    window.advance(1)
    if window.next():
        raise window.error("Extra data", window.position)


_SPACE = re.compile(r"[ \t\r\n]*")


class _Window:
    """A part of a JSON text, which moves over it value by value. Lines and columns count from 1."""

    def __init__(self, chunks: Iterator[str], name: str) -> None:
        self._chunks, self._name = chunks, name
        self._decoder = json.JSONDecoder()
        self._text = ""
        self.position = 0  # in that part
        self._line = self._column = 1

    def next(self) -> str:
        """The next sign that is no white space, which becomes the position; none at the end."""
        while True:
            space = _SPACE.match(self._text, self.position)
            self.advance(len(space[0]) if space else 0)
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._more():
                return ""

    def value(self) -> Item:
        """The value at the position, and the line where it begins. Raises `ValueError` if there is none."""
        where = f"{self._name}:{self._line}"
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self.position)
            except json.JSONDecodeError as error:
                # A value that goes on after this part looks broken close to the part's end, or from a quote on.
                goes_on = error.pos > len(self._text) - 16 or error.msg.startswith("Unterminated string")
                problem = self.error(_reason(error), error.pos)
                if not (goes_on and self._more()):
                    raise problem from None
                continue
            except (RecursionError, ValueError) as error:
                raise ValueError(f"{where}: {_unmeant(error)}") from None
            size = end - self.position
            if end < len(self._text) or not self._more():  # a number may go on
                self.advance(size)
                return Item(where, value)

    def advance(self, count: int) -> None:
        end = self.position + count
        self._line, self._column = self._place(end)
        self.position = end

    def error(self, reason: str, position: int) -> ValueError:
        line, column = self._place(position)
        return ValueError(f"{self._name}:{line}: not JSON, {reason} at column {column}")

    def _place(self, position: int) -> tuple[int, int]:
        """Line and column of a position at or after this one."""
        passed = self._text.count("\n", self.position, position)
        if not passed:
            return self._line, self._column + position - self.position
        return self._line + passed, position - self._text.rindex("\n", self.position, position)

    def _more(self) -> bool:
        """Forgets what lies before the position; doubles what lies after it, so that long values cost no more."""
        kept = self._text[self.position :]
        if len(kept) > LONGEST:
            raise ValueError(f"{self._name}:{self._line}: a value longer than {LONGEST} characters")
        wanted, parts = len(kept), [kept]
        for chunk in self._chunks:
            parts.append(chunk)
            wanted -= len(chunk)
            if chunk and wanted <= 0:
                break
        self._text, self.position = "".join(parts), 0
        return len(self._text) > len(kept)


# -- tables


def _parquet(file: DataFile) -> Iterator[Item]:
    """The rows; `where` counts them from 1."""
    parquet, library = _library("pyarrow.parquet", file.name), _library("pyarrow.lib", file.name)
    row = 0
    with file.path.open("rb") as raw:
        try:
            table = parquet.ParquetFile(raw)
            names = table.schema_arrow.names
            if format_of(dict.fromkeys(names, "")):  # else all, which the reason then names
                names = [name for name in names if name in KEYS]
            for batch in table.iter_batches(batch_size=BATCH, columns=names):
                for value in _rows(batch):
                    row += 1
                    yield Item(f"{file.name}:{row}", value)
        except (library.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise UnreadableError(
                f"{file.name}: the file ends in the middle or is damaged (parquet), {reason}"
            ) from None


def _rows(batch: Any) -> Iterator[object]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # raised before the first row; which one it is takes longer to find out
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield ValueError("not UTF-8")


def _hub(file: DataFile) -> Iterator[Item]:
    """The records of a data set by name, as they are downloaded; `where` counts them from 1."""
    datasets = _library("datasets", file.name)
    name, split, config = parse_hub(file.name)
    try:
        for row, value in enumerate(datasets.load_dataset(name, config, split=split, streaming=True), 1):
            yield Item(f"{HUB}{name}:{row}", value)
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).partition("\n")[0]
        raise UnreadableError(f"{file.name}: cannot be loaded, {type(error).__name__}: {reason}") from None


# -- records

CONVERSATIONS = ("messages", "conversations", "conversation")
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {  # the keys that each needs, in the order of precedence
    **{key: ((key,),) for key in CONVERSATIONS},
    "alpaca": (("instruction", "output"),),
    "prompt": (("prompt", "completion"), ("prompt", "response")),
    "text": (("text",),),
}
KEYS = {key for ways in FORMATS.values() for way in ways for key in way} | {"input", "system"}
ROLES: dict[str, Role] = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "ai", "model"), "assistant"),
}
_JSON_NAMES = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number",
    str: "a string", list: "an array", dict: "an object",
}  # fmt: skip


def _normalised(items: Iterable[Item], problems: Problems) -> Iterator[Record]:
    """The good ones of a file's records, which have one format."""
    fixed = None
    for where, value in items:
        try:
            known = format_of(value) if isinstance(value, dict) else None
            if fixed and known and known != fixed:
                raise ValueError(f'is a record of format "{known}", but this file began with "{fixed}"')
            record = normalise(_object(value), where)
        except ValueError as error:
            problems.record(f"{where}: {error}")
            if problems.enough:
                return
        else:
            fixed = known
            yield record


def _object(value: object) -> dict[str, Any]:
    if isinstance(value, ValueError):
        raise value
    if not isinstance(value, dict):
        raise ValueError(f'must be an object such as {{"text": "…"}}, is {_kind(value)}')
    return value


def format_of(record: dict[str, Any]) -> str | None:
    """The name in `FORMATS` of the format that `record` has; keys that are null count if nothing else does."""
    given = [name for name, ways in FORMATS.items() if any(all(key in record for key in way) for way in ways)]
    filled = [n for n in given if any(all(record.get(key) is not None for key in way) for way in FORMATS[n])]
    return next(iter(filled + given), None)


def normalise(record: dict[str, Any], where: str) -> Record:
    """The record that this object means. Raises `ValueError` saying what is wrong with it.

    Known are `messages` of OpenAI, `conversations` of ShareGPT and `conversation`, which may spell the keys of a turn
    either way, role and content or from and value; `instruction`, `input` and `output` of Alpaca with or without
    `system`; `prompt` with `completion` or `response`; `text`.
    """
    known = format_of(record)
    if known is None:
        others = '"messages", "conversations", "conversation", "instruction" and "output", "prompt" and "completion"'
        raise ValueError(f'must have the key "text" or {others}; its keys: {_keys(record)}')
    if known == "text":
        return Record(where, text=_string(record, "text"))
    if known in CONVERSATIONS:
        return Record(where, messages=_messages(record[known], known))
    if known == "alpaca":
        question, answer = "instruction", "output"
        asked = [_string(record, question), _optional(record, "input")]
    else:
        question, answer = "prompt", _present(record, "completion", "response")
        asked = [_string(record, question)]
    system = _optional(record, "system") if known == "alpaca" else ""
    answered = _string(record, answer)
    if not answered.strip():
        raise ValueError(f'"{answer}" is empty, there is nothing to learn')
    user = Message("user", "\n\n".join(filter(None, asked)))
    begin = (Message("system", system),) if system else ()
    return Record(where, messages=(*begin, user, Message("assistant", answered)))


def _messages(turns: object, key: str) -> tuple[Message, ...]:
    if not isinstance(turns, list):
        raise ValueError(f'"{key}" must be an array of turns, is {_kind(turns)}')
    if not turns:
        raise ValueError(f'"{key}" is empty')
    messages = tuple(_turn(turn, f"{key}[{i}]") for i, turn in enumerate(turns))
    for i, (role, content) in enumerate(messages):
        if role == "system" and i > 0:
            raise ValueError(f"{key}[{i}]: a system turn that is not the first one")
        if role == "assistant" and not content.strip():
            raise ValueError(f"{key}[{i}]: the assistant's turn is empty")
    if all(role != "assistant" for role, _ in messages):
        raise ValueError(f'"{key}" has no assistant turn, there is nothing to learn')
    return messages


def _turn(turn: object, place: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{place} must be an object with role and content, is {_kind(turn)}")
    said = _string(turn, _present(turn, "role", "from", place=place), place)
    if said not in ROLES:
        known = ", ".join(dict.fromkeys(ROLES.values()))
        raise ValueError(f"{place}: unknown role {said[:40]!r}; known are {known}")
    key = _present(turn, "content", "value", place=place)
    content = turn[key]
    if not isinstance(content, list):
        return Message(ROLES[said], _string(turn, key, place))
    return Message(ROLES[said], "".join(_part(part, f"{place}.{key}[{i}]") for i, part in enumerate(content)))


def _part(part: object, place: str) -> str:
    """The text of a part of a turn, as OpenAI has them."""
    if not isinstance(part, dict):
        raise ValueError(f"{place} must be an object with type and text, is {_kind(part)}")
    if part.get("type") != "text":
        raise ValueError(f"{place}: a part of type {str(part.get('type'))[:40]!r}; only text can be learned")
    return _string(part, _present(part, "text", place=place), place)


def _present(record: dict[str, Any], *spellings: str, place: str = "") -> str:
    """The spelling of a key that `record` has, if possible one whose value is not null."""
    given = [key for key in spellings if key in record]
    if not given:
        raise ValueError(f'{place} has no "{spellings[0]}"; its keys: {_keys(record)}')
    return next((key for key in given if record[key] is not None), given[0])


def _optional(record: dict[str, Any], key: str) -> str:
    return "" if record.get(key) is None else _string(record, key)


def _string(record: dict[str, Any], key: str, place: str = "") -> str:
    text = record[key]
    name = f'{place}: "{key}"' if place else f'"{key}"'
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, is {_kind(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"{name} has half a surrogate pair, \\u{code:04x}, no character") from None
    return text


def _kind(value: object) -> str:
    return _JSON_NAMES.get(type(value), type(value).__name__)


def _keys(record: dict[str, Any]) -> str:
    """The first keys, each shortened and without signs that could steer a terminal."""
    names = [str(key)[:40] for key in list(record)[:SHOWN_KEYS]]
    shown = [name if name.isprintable() else ascii(name)[1:-1] for name in names]
    more = len(record) - SHOWN_KEYS
    return ", ".join([*shown, f"and {more} more"] if more > 0 else shown) or "none"
