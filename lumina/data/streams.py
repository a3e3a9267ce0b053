"""Documents to streams of token ids on disk, in batches that a killed process does not have to repeat.

A stream of texts is `<end> tokens <end> tokens <end> …`: an end token is the target that closes a document and the
input that opens the next one. A stream of conversations holds one after the other, each with a byte of marks a token.
Where each document begins is kept beside both.

Encoding takes almost all of the time and runs in all of the tokenizer's threads; two batches are under way, so that
reading one and storing another fill the gaps.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.data.records import KINDS, Kind, Problems, Record
from lumina.data.scan import Check, Scan, Source, documents
from lumina.data.template import COUNTED
from lumina.data.tokenizer import Tokenizer
from lumina.errors import UserError
from lumina.progress import Tell, silent

JOURNAL = "journal.json"
UNDER_WAY = 2  # batches being encoded while the next one is read
SUFFIXES = ("tokens", "marks", "starts")
SYNC_BYTES = 1 << 28  # of text between two waits for the disk: a power cut costs so much at most


@dataclass
class Stream:
    """One side of one source, and what it holds; `answer_bytes` and `counted` tokens are the assistant's."""

    source: int
    kind: Kind
    side: str
    documents: int = 0
    text_bytes: int = 0
    answer_bytes: int = 0
    tokens: int = 0
    counted: int = 0

    @property
    def name(self) -> str:
        return f"{self.source}.{self.kind}.{self.side}"


class DamagedError(Exception):
    """What a killed process left cannot be gone on with."""


class _Piece(NamedTuple):
    """A record, or what of it goes to one stream."""

    stream: str
    record: Record


class _Encoded(NamedTuple):
    """Tokens and marks of a piece, whether it ends its document, and what of it counts."""

    piece: _Piece
    ids: NDArray[Any]
    marks: bytes
    answer_bytes: int


@dataclass
class _Writer:
    """All streams, written side by side; `journal` says how far they are sound."""

    folder: Path
    dtype: str
    end_id: int
    streams: dict[str, Stream] = field(default_factory=dict)
    opening: dict[str, bool] = field(default_factory=dict)
    pieces: int = 0  # that are written
    unsynced: int = 0

    def resume(self) -> None:
        """Goes back to what the journal vouches for; without one, to nothing.

        Raises `DamagedError` if the journal or a stream is damaged.
        """
        path = self.folder / JOURNAL
        kept: dict[str, Any] = {"pieces": 0, "streams": {}, "opening": {}, "sizes": {}}
        try:
            if path.exists():
                kept = json.loads(path.read_text(encoding="utf-8"))
            self.pieces = kept["pieces"]
            self.streams = {name: Stream(**values) for name, values in kept["streams"].items()}
            self.opening, sizes = kept["opening"], dict(kept["sizes"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{JOURNAL}: {error}") from None
        there = {file.name: file for file in self.folder.iterdir() if file.suffix.lstrip(".") in SUFFIXES}
        for name in there.keys() | sizes.keys():
            size = sizes.get(name, 0)
            if name not in there or there[name].stat().st_size < size:
                raise DamagedError(f"{name} is shorter than its journal says")
            os.truncate(there[name], size)

    def write(self, batch: Sequence[_Encoded]) -> None:
        """Appends a batch to its streams, then says so in the journal."""
        content: dict[str, list[bytes]] = {}

        def put(name: str, data: bytes) -> None:
            content.setdefault(name, []).append(data)

        end = np.array([self.end_id], self.dtype).tobytes()
        for piece, ids, marks, answer_bytes in batch:
            stream = self.streams.setdefault(piece.stream, _named(piece.stream))
            chat = stream.kind == "chat"
            if not stream.tokens and not chat:
                put(f"{stream.name}.tokens", end)
                stream.tokens = 1
            if self.opening.get(stream.name, True):
                first = stream.tokens if chat else stream.tokens - 1
                put(f"{stream.name}.starts", np.array([first], "<u8").tobytes())
                stream.documents += 1
            put(f"{stream.name}.tokens", ids.tobytes())
            stream.tokens += len(ids)
            closes = piece.record.last
            if chat:
                put(f"{stream.name}.marks", marks)
                stream.counted += int((np.frombuffer(marks, np.uint8) & COUNTED).sum())
            elif closes:
                put(f"{stream.name}.tokens", end)
                stream.tokens += 1
            self.opening[stream.name] = closes
            stream.text_bytes += piece.record.size
            stream.answer_bytes += answer_bytes
        for name, parts in content.items():
            with (self.folder / name).open("ab") as file:
                file.write(b"".join(parts))
        self.pieces += len(batch)
        self.unsynced += sum(piece.record.size for piece, *_ in batch)
        self._keep_journal()

    def _keep_journal(self) -> None:
        files = [file for file in self.folder.iterdir() if file.suffix.lstrip(".") in SUFFIXES]
        state = {
            "pieces": self.pieces,
            "streams": {name: asdict(stream) for name, stream in self.streams.items()},
            "opening": self.opening,
            "sizes": {file.name: file.stat().st_size for file in files},
        }
        aside = self.folder / f"{JOURNAL}.tmp"
        aside.write_text(json.dumps(state), encoding="utf-8")
        if self.unsynced >= SYNC_BYTES:
            self.unsynced = 0
            for file in (*files, aside):
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        aside.replace(self.folder / JOURNAL)


def _named(name: str) -> Stream:
    source, kind, side = name.split(".")
    assert kind in KINDS
    return Stream(int(source), kind, side)


def write_streams(
    sources: Sequence[Source],
    scan: Scan,
    tokenizer: Tokenizer,
    dtype: str,
    folder: Path,
    buffer: int,
    progress: Tell,
    check: Check | None = None,
) -> list[Stream]:
    """Encodes every document that is kept into the streams of `folder`, going on where an earlier process was killed.

    About `buffer` bytes of text are encoded at once. Raises `UserError` if a source changes meanwhile.
    """
    writer = _Writer(folder, dtype, tokenizer.end_id)
    writer.resume()
    pieces = islice(_pieces(sources, scan, progress, check), writer.pieces, None)
    with ThreadPoolExecutor(UNDER_WAY) as pool:
        under_way: deque[Future[list[_Encoded]]] = deque()
        try:
            for job in _batches(pieces, buffer):
                under_way.append(pool.submit(_encode, job, tokenizer, dtype))
                if len(under_way) > UNDER_WAY:
                    writer.write(under_way.popleft().result())
            while under_way:
                writer.write(under_way.popleft().result())
        finally:
            for future in under_way:
                future.cancel()
    return sorted(writer.streams.values(), key=lambda stream: (stream.source, stream.name))


def training_pieces(sources: Sequence[Source], scan: Scan, check: Check | None) -> Iterator[tuple[int, Record]]:
    """What the training side will hold, each with its source's number."""
    for piece in _pieces(sources, scan, silent, check):
        if piece.stream.endswith(".train"):
            yield int(piece.stream.partition(".")[0]), piece.record


def _batches(pieces: Iterable[_Piece], buffer: int) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.record.size
        if size >= buffer:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(sources: Sequence[Source], scan: Scan, progress: Tell, check: Check | None) -> Iterator[_Piece]:
    """What goes to which stream: every kept document, divided as the split says."""
    split = scan.split if scan.facts["train_documents"] == len(scan.rows) else None
    problems = Problems(tolerated=len(scan.facts["skipped"]))
    kept, removed = (scan.rows[name] for name in ("key", "removed"))
    row = before = 0
    conversations: Counter[int] = Counter()
    for number, record in documents(sources, problems, progress, "encoding", check):
        if not before and not record.content and record.last:
            continue
        if row >= len(scan.rows) or (not before and int(kept[row]) != record.key):
            raise _changed(record.where)
        if not removed[row]:
            stream, side = f"{number}.{record.kind}", sources[number].side
            parts: tuple[Record | None, Record | None]
            if split is None or side == "heldout":
                parts = (record, None) if side == "train" else (None, record)
            else:
                chars = int(scan.rows["chars"][row])
                parts = split.parts(record, number, int(kept[row]), before, chars, conversations[number])
            for name, part in zip(("train", "heldout"), parts, strict=True):
                if part is not None:
                    yield _Piece(f"{stream}.{name}", part)
        before += len(record.text)
        if record.last:
            conversations[number] += record.kind == "chat" and not removed[row]
            row, before = row + 1, 0
    problems.raise_any()
    if row != len(scan.rows):
        raise _changed(sources[-1].name)


def _changed(where: str) -> UserError:
    return UserError(f"{where}: changed while it was being read", fix="start again when nothing writes to it")


def _encode(batch: Sequence[_Piece], tokenizer: Tokenizer, dtype: str) -> list[_Encoded]:
    texts = [piece.record.text for piece in batch if piece.record.kind == "text"]
    chats = [piece.record.messages for piece in batch if piece.record.kind == "chat"]
    of_texts = iter(tokenizer.encode_arrays(texts, dtype) if texts else ())
    of_chats = iter(tokenizer.chat.encode(chats) if chats else ())
    encoded = []
    for piece in batch:
        if piece.record.kind == "text":
            encoded.append(_Encoded(piece, next(of_texts), b"", 0))
        else:
            ids, marks = next(of_chats)
            answers = (m.content for m in piece.record.messages if m.role == "assistant")
            encoded.append(_Encoded(piece, np.array(ids, dtype), marks, sum(len(text.encode()) for text in answers)))
    return encoded
