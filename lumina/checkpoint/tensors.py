"""Safetensors files: written straight from memory and hashed on the way; headers believed only when they add up.

A file holds some rows of each tensor, and where they begin: `DCP_SHARDING_INFO`, as torch's distributed checkpoint
writes it, whose reader puts the rows together again for any number of processes. Every other reader of safetensors
reads the files too. Nothing here executes what it reads.

    length of the header (8 bytes) | header (JSON, padded to 8) | the bytes of each tensor, one after the other
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from xxhash import xxh3_128

SUFFIX = ".safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK = 1 << 24  # bytes between two looks at whether to go on
LARGEST_HEADER = 100_000_000  # bytes; as in the safetensors library
META, SHARDING, OFFSETS = "__metadata__", "DCP_SHARDING_INFO", "saved_offsets"


class Abandoned(Exception):  # noqa: N818 - not an error: nobody wants the result any more
    """Raised inside a write when it is told to stop."""


class Entry(NamedTuple):
    """What COMPLETE says of a file."""

    size: int
    xxh3_128: str  # tells other bytes from those that were written, as fast as memory is read; it keeps no secret


@dataclass(frozen=True)
class Shard:
    """Rows of a tensor in this process's memory, contiguous on the CPU, and where they begin in the whole."""

    rows: Tensor
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Saved:
    """What a header says of a tensor, or of some of its rows."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: tuple[int, ...]


def file_name(rank: int) -> str:
    """What torch's distributed checkpoint calls the file of a process."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001{SUFFIX}"


# -- writing ------------------------------------------------------------------------------------------------


def write(path: Path, shards: Mapping[str, Shard], stopped: Callable[[], bool] = lambda: False) -> Entry:
    """Writes a new file from the memory of the tensors, and hashes that memory on the way.

    Nothing may change the tensors meanwhile. Raises `OSError`, and `Abandoned` soon after `stopped` is true.
    """
    ordered = dict(sorted(shards.items(), key=lambda item: (-item[1].rows.element_size(), item[0])))  # all aligned
    parts = [memoryview(_header(ordered)), *(_bytes(shard.rows) for shard in ordered.values())]
    digest = xxh3_128()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for chunk in _chunks(parts, stopped):
            digest.update(chunk)
            while chunk:
                chunk = chunk[os.write(descriptor, chunk) :]
    finally:
        os.close(descriptor)
    return Entry(sum(map(len, parts)), digest.hexdigest())


def _header(shards: Mapping[str, Shard]) -> bytes:
    offsets = {name: {OFFSETS: list(shard.offset)} for name, shard in shards.items()}
    head: dict[str, Any] = {META: {"format": "pt", "DCP_VERSION": "1.0", SHARDING: json.dumps(offsets)}}
    begin = 0
    for name, shard in shards.items():
        end = begin + shard.rows.nbytes
        head[name] = {"dtype": CODES[shard.rows.dtype], "shape": list(shard.rows.shape), "data_offsets": [begin, end]}
        begin = end
    content = json.dumps(head, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return struct.pack("<Q", len(content)) + content


def _bytes(rows: Tensor) -> memoryview:
    return rows.detach().flatten().view(torch.uint8).numpy().data


def _chunks(parts: Iterable[memoryview], stopped: Callable[[], bool]) -> Iterator[memoryview]:
    for part in parts:
        for begin in range(0, len(part), CHUNK):
            if stopped():
                raise Abandoned
            yield part[begin : begin + CHUNK]


# -- reading ------------------------------------------------------------------------------------------------


def saved_in(folder: Path) -> dict[str, Saved]:
    """The whole tensors whose rows the files of a folder hold; none if there is no folder.

    Raises `ValueError` with a sentence if a header lies or the rows do not make up whole tensors; `OSError`.
    """
    found: dict[str, list[Saved]] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            for name, saved in read_header(path).items():
                found.setdefault(name, []).append(saved)
        except ValueError as error:
            raise ValueError(f"{folder.name}/{path.name}: {error}") from None
    return {name: _join(f"{folder.name} tensor {name}", pieces) for name, pieces in found.items()}


def read_header(path: Path) -> dict[str, Saved]:
    """The tensors of one file, by its header alone. Raises `ValueError` unless all of it adds up; `OSError`."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(LARGEST_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        content = file.read(length)
    try:
        entries = json.loads(content, object_pairs_hook=_once)
        offsets = _offsets(entries.pop(META, {}))
        pieces = {name: _entry(name, entry) for name, entry in entries.items()}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is not that of a safetensors file: {error!r:.200}") from None
    end = 0
    for name, (begin, stop, _) in sorted(pieces.items(), key=lambda item: item[1][:2]):
        if begin != end:
            raise ValueError(f"tensor {name} begins at byte {begin}, where {end} is expected")
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"its tensors take {end} bytes, {size - 8 - length} are there")
    if offsets is not None and offsets.keys() != pieces.keys():
        raise ValueError(f"{SHARDING} speaks of other tensors than the header")
    return {name: _placed(name, saved, offsets) for name, (_, _, saved) in pieces.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("its header gives a name twice")
    return found


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"its header has {value!r:.50} where a size belongs")
    return value


def _entry(name: str, entry: dict[str, Any]) -> tuple[int, int, Saved]:
    """First byte, the one after the last, and what is there."""
    begin, end = map(_count, entry["data_offsets"])
    shape = tuple(map(_count, entry["shape"]))
    if (dtype := DTYPES.get(entry["dtype"])) is None:
        raise ValueError(f"tensor {name} has the unknown dtype {entry['dtype']!r:.50}")
    if not shape:
        raise ValueError(f"tensor {name} has no dimension")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"tensor {name} of shape {list(shape)} and dtype {dtype} has {end - begin} bytes")
    return begin, end, Saved(dtype, shape, (0,) * len(shape))


def _offsets(meta: dict[str, str]) -> dict[str, tuple[int, ...]] | None:
    """Where the rows of each tensor begin; None if the file does not say, and so holds whole tensors."""
    if SHARDING not in meta:
        return None
    told = json.loads(meta[SHARDING], object_pairs_hook=_once)
    return {name: tuple(map(_count, entry[OFFSETS])) for name, entry in told.items()}


def _placed(name: str, saved: Saved, offsets: dict[str, tuple[int, ...]] | None) -> Saved:
    offset = saved.offset if offsets is None else offsets[name]
    if len(offset) != len(saved.shape) or any(offset[1:]):
        raise ValueError(f"tensor {name} of shape {list(saved.shape)} cannot begin at {list(offset)}")
    return Saved(saved.dtype, saved.shape, offset)


def _join(name: str, pieces: list[Saved]) -> Saved:
    """The tensor of these rows, which have to follow each other without gaps or overlaps."""
    first, rows = pieces[0], 0
    for piece in sorted(pieces, key=lambda piece: (piece.offset[0], piece.shape[0])):
        if (piece.dtype, piece.shape[1:]) != (first.dtype, first.shape[1:]):
            raise ValueError(f"{name} has rows of different shapes or dtypes")
        if piece.offset[0] != rows:
            raise ValueError(f"{name} has rows from {piece.offset[0]} on, where row {rows} is expected")
        rows += piece.shape[0]
    return Saved(first.dtype, (rows, *first.shape[1:]), (0,) * len(first.shape))
