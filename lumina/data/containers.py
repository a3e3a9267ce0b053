"""Bytes of files to values: decompressed, JSON parsed piece by piece, rows of tables; none is held whole.

A value is where a record should be. What ends too early raises; it is never silently shorter.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from lumina.data.files import HUB, DataFile, parse_hub
from lumina.data.shapes import KEYS, Item, format_of
from lumina.errors import UserError

CHUNK = 1 << 20  # bytes read at once
ZSTD_CHUNK = 1 << 12  # a thousand blocks at most, of at most 128 KiB each
LONGEST = 1 << 26  # bytes of one record; a longer one is no record but a file without line ends
BATCH = 1024  # rows of parquet


class UnreadableError(Exception):
    """A file that cannot be read, or not any further; the message names it."""


# -- compression


def open_file(file: DataFile) -> io.BufferedIOBase:
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


def json_lines(file: DataFile) -> Iterator[Item]:
    """One value a line; blank lines hold none."""
    number = offset = 0
    with open_file(file) as stream:
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


def is_json_lines(file: DataFile) -> bool:
    """Whether the first line that is not blank is an object by itself."""
    with open_file(file) as stream:
        first = b"\n"
        while first and first in b"\xef\xbb\xbf \t\r\n":
            first = stream.read(1)
        return first == b"{" and isinstance(_parse(first + stream.readline(LONGEST), 0), dict)


def json_values(file: DataFile) -> Iterator[Item]:
    """The values of an array, or one object, or several; after a mistake nobody knows where the next one begins."""
    with open_file(file) as stream:
        try:
            yield from _values(_Window(decoded(stream, file.name), file.name))
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


def parquet_rows(file: DataFile) -> Iterator[Item]:
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


@lru_cache(maxsize=64)
def hub_revision(file: DataFile) -> str:
    """The commit that a data set of the hub is at, asked once: all readings see the same.

    Raises `UserError` if the hub does not answer.
    """
    from huggingface_hub import HfApi

    name, _, _ = parse_hub(file.name)
    try:
        return str(HfApi().dataset_info(name).sha)
    except Exception as error:  # the library raises nothing narrower
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{file.name}: not found on the hub, {reason}", "check its name, and the network") from None


def hub_rows(file: DataFile) -> Iterator[Item]:
    """The records of a data set by name, as they are downloaded; `where` counts them from 1."""
    datasets = _library("datasets", file.name)
    name, split, config = parse_hub(file.name)
    revision = hub_revision(file)
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True, revision=revision)
        for row, value in enumerate(rows, 1):
            yield Item(f"{HUB}{name}:{row}", value)
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).partition("\n")[0]
        raise UnreadableError(f"{file.name}: cannot be loaded, {type(error).__name__}: {reason}") from None


# -- text


def decoded(stream: io.BufferedIOBase, name: str) -> Iterator[str]:
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
            raise ValueError(f"{name}:{line}: {bad}; {utf8_hint(head, nul)}") from None
        line += text.count("\n")
        fed += len(raw)
        yield text if offset else text.removeprefix("\ufeff")


def utf8_hint(head: bytes, nul: bool) -> str:
    if head in (b"\xff\xfe", b"\xfe\xff"):
        return "it looks like UTF-16: convert it with iconv -f utf-16 -t utf-8"
    if nul:
        return "it looks like a binary file: give text or .jsonl"
    return "convert it, for example with iconv -f latin1 -t utf-8"
