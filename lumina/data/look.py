"""A look at data before anything is made of it: what is there, how long it is, what counts, what is wrong.

    specs -> `find_sources` -> `documents` with their tokens -> `show` (figures and examples) or `check` (findings)

Everything is read once, figures are kept, documents are not; `show` reads a second time for its examples.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.config.weights import split_weight
from lumina.data.files import find_files
from lumina.data.meta import is_prepared
from lumina.data.records import Message, Problems, Record
from lumina.data.repeats import Repeats, hash_of
from lumina.data.scan import Check, Source, documents
from lumina.data.shards import BPE, template_check
from lumina.data.template import COUNTED
from lumina.data.tokenizer import FILE_NAME, Tokenizer, train_bpe
from lumina.errors import UserError
from lumina.progress import Tell, silent, whole

BATCH = 1 << 22  # bytes of text that are encoded at once
BPE_VOCAB = 4096  # of a tokenizer for a look
BPE_BYTES = 1 << 22  # that it is trained on, of all sources together
HEAD, TAIL = 160, 80  # tokens of an example that are shown

FindingKind = Literal["bad record", "bad file", "duplicate", "empty", "longer"]


class Finding(NamedTuple):
    """Something to know of the data, as one line that begins with where it is."""

    kind: FindingKind
    line: str


class Listing(Problems):
    """Problems told as they are found, none hidden and none held; reading never stops for them."""

    def __init__(self, tell: Callable[[Finding], None]) -> None:
        super().__init__(most=sys.maxsize)
        self.tell, self.records, self.files = tell, 0, 0

    def record(self, problem: str) -> None:
        self.records += 1
        self.tell(Finding("bad record", problem))

    def file(self, problem: str) -> None:
        self.files += 1
        self.tell(Finding("bad file", problem))


def find_sources(specs: Sequence[str], problems: Problems) -> list[Source]:
    """The files of each spec, `path` or `path:weight`; what names nothing is a problem."""
    seen: dict[str, str] = {}
    sources = []
    for spec in specs:
        name, weight = split_weight(spec)
        if is_prepared(Path(os.path.expanduser(name))):
            problems.file(f"{name}: prepared shards; give the files that they were made of")
            continue
        files = tuple(file for file in find_files([name], problems, seen) if file.container != "ignored")
        sources.append(Source(name, "train", files, weight))
    return sources


def tokenizer_for(name: str, sources: Sequence[Source]) -> tuple[Tokenizer, str]:
    """The tokenizer called `name`, and what to say of it: a file's, a run's, or "bpe", trained on a beginning here."""
    if name != BPE:
        path = Path(os.path.expanduser(name))
        path = path / "tokenizer" if (path / "tokenizer" / FILE_NAME).is_file() else path
        tokenizer = Tokenizer.load(path)
        return tokenizer, f"{path}, {tokenizer.vocab_size:,} ids"
    tokenizer = train_bpe(_beginnings(sources), BPE_VOCAB)
    what = f"BPE of {tokenizer.vocab_size:,} ids, trained on the first {BPE_BYTES >> 20} MiB of this for this look"
    return tokenizer, what


def _beginnings(sources: Sequence[Source]) -> Iterator[str]:
    """The first text of each source, as much of each."""
    for source in sources:
        room = BPE_BYTES // len(sources)
        for _, record in documents([source], Listing(_nobody), silent, ""):
            yield record.content
            room -= record.size
            if room <= 0:
                break


def _nobody(finding: Finding) -> None:
    """What the first reading says is not said again."""


# -- documents with their tokens ----------------------------------------------------------------------------


@dataclass
class Document:
    """A document that was read to its end: its bytes, its tokens, and which of these are learnt.

    A text's tokens are those that its stream gains, so its end is one of them. Of `ids` and `trained` the beginning and
    the end are there, if they were asked for. `size` 0 is an empty one.
    """

    source: int
    where: str
    format: str
    messages: tuple[Message, ...] = ()
    size: int = 0
    tokens: int = 0
    trained: int = 0
    digest: bytes = b""
    ids: list[int] = field(default_factory=list)
    flags: list[bool] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """How many inputs of a sequence it takes: a text comes behind the end of another one."""
        return self.tokens - 1 if self.messages else self.tokens


class _Encoded(NamedTuple):
    ids: NDArray[Any]
    trained: NDArray[np.bool_]


@dataclass
class _Reader:
    """Reads documents. Without a tokenizer they have no tokens."""

    sources: Sequence[Source]
    problems: Problems
    tokenizer: Tokenizer | None = None
    train_on: str = "assistant"
    keep: bool = False  # the ids of both ends

    def read(self, progress: Tell, what: str, wanted: Sequence[int] | None = None) -> Iterator[Document]:
        """All documents, or those whose number among the ones that are not empty is `wanted` (sorted)."""
        current: Document | None = None
        for batch in self._batches(progress, what, wanted):
            encoded = self._encode([record for _, record in batch])
            for (number, record), tokens in zip(batch, encoded, strict=True):
                if current is None:
                    current = Document(number, record.where, record.format, record.messages)
                    content = hash_of(record.kind)
                current.size += record.size
                content.update(record.identity.encode())
                if tokens is not None:
                    self._count(current, tokens)
                if record.last:
                    current.digest = content.digest()
                    yield current
                    current = None

    def _batches(self, progress: Tell, what: str, wanted: Sequence[int] | None) -> Iterator[list[tuple[int, Record]]]:
        batch: list[tuple[int, Record]] = []
        size = at = 0
        check: Check | None = template_check(self.tokenizer)
        inside = False
        for number, record in documents(self.sources, self.problems, progress, what, check):
            inside = inside or bool(record.size)
            if wanted is not None and at > wanted[-1]:
                break
            if wanted is None or (inside and at in wanted):
                batch.append((number, record))
                size += record.size
            if record.last:
                at, inside = at + inside, False
            if size >= BATCH or len(batch) >= BATCH >> 8:
                yield batch
                batch, size = [], 0
        yield batch

    def _encode(self, records: Sequence[Record]) -> Iterator[_Encoded | None]:
        if self.tokenizer is None:
            yield from (None for _ in records)
            return
        texts = [record.text for record in records if not record.messages]
        chats = [record.messages for record in records if record.messages]
        of_texts = iter(self.tokenizer.encode_arrays(texts, "uint32") if texts else ())
        of_chats = iter(self.tokenizer.chat.encode(chats) if chats else ())
        for record in records:
            if record.messages:
                yield _chat(*next(of_chats), self.train_on)
            else:
                ids = np.append(next(of_texts), self.tokenizer.end_id) if record.last else next(of_texts)
                yield _Encoded(ids, np.ones(len(ids), bool))

    def _count(self, document: Document, tokens: _Encoded) -> None:
        document.tokens += len(tokens.ids)
        document.trained += int(tokens.trained.sum())
        if not self.keep:
            return
        room = max(0, HEAD - len(document.ids))
        both = [(a, b) for a, b in zip(tokens.ids[:room].tolist(), tokens.trained[:room].tolist(), strict=True)]
        rest = slice(max(room, len(tokens.ids) - TAIL), None)
        both += zip(tokens.ids[rest].tolist(), tokens.trained[rest].tolist(), strict=True)
        document.ids += [a for a, _ in both]
        document.flags += [b for _, b in both]
        if len(document.ids) > HEAD + TAIL:
            document.ids[HEAD:-TAIL], document.flags[HEAD:-TAIL] = [], []


def _chat(ids: Sequence[int], marks: bytes, train_on: str) -> _Encoded:
    """Of a conversation the first token is no target."""
    trained = np.frombuffer(marks, np.uint8) & COUNTED > 0 if train_on == "assistant" else np.ones(len(ids), bool)
    trained = trained.copy()
    trained[:1] = False
    return _Encoded(np.array(ids, np.uint32), trained)


# -- show ---------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What a source holds. `lengths` counts documents by ⌊log2⌋ of their tokens; `longer` take more than a sequence."""

    name: str
    formats: Counter[str] = field(default_factory=Counter)
    documents: int = 0
    conversations: int = 0
    turns: int = 0
    system: int = 0
    bytes: int = 0
    tokens: int = 0
    trained: int = 0
    longer: int = 0
    empty: int = 0
    duplicates: int = 0
    lengths: Counter[int] = field(default_factory=Counter)

    def add(self, document: Document, seq_len: int) -> None:
        self.documents += 1
        self.formats[document.format] += 1
        self.bytes += document.size
        self.tokens += document.tokens
        self.trained += document.trained
        self.longer += document.inputs > seq_len
        self.lengths[document.tokens.bit_length() - 1] += 1
        if document.messages:
            self.conversations += 1
            begins = document.messages[0].role == "system"
            self.system += begins
            self.turns += len(document.messages) - begins


class Run(NamedTuple):
    """Tokens side by side that are alike: learnt or not, text or one special token. `cut`: others were left out."""

    text: str
    trained: bool
    special: bool = False
    cut: bool = False


class Example(NamedTuple):
    where: str
    tokens: int
    trained: int
    runs: list[Run]


@dataclass
class Shown:
    """What `show` found; problems are told while it reads."""

    tokenizer: str
    sources: list[Figures]
    examples: list[Example]


def show(
    specs: Sequence[str],
    tell: Callable[[Finding], None],
    *,
    tokenizer: str = BPE,
    seq_len: int = 2048,
    train_on: str = "assistant",
    examples: int = 3,
    seed: int = 0,
    progress: Tell = silent,
) -> Shown:
    """Figures of each spec and some examples, spread over all documents. Raises `UserError` about the tokenizer."""
    problems = Listing(tell)
    sources = find_sources(specs, problems)
    with whole("a tokenizer for this look", progress):
        own, said = tokenizer_for(tokenizer, sources)
    figures = [Figures(source.name) for source in sources]
    with Repeats() as repeats:
        for document in _Reader(sources, problems, own, train_on).read(progress, "counting tokens"):
            if document.size:
                figures[document.source].add(document, seq_len)
                repeats.add(document.digest, "")
            else:
                figures[document.source].empty += 1
        borders = np.cumsum([mine.documents for mine in figures])
        for copy, _ in repeats.pairs():
            figures[int(np.searchsorted(borders, copy, "right"))].duplicates += 1
    chosen = _chosen(sum(mine.documents for mine in figures), examples, seed)
    return Shown(said, figures, list(_examples(sources, own, train_on, chosen, progress)))


def _chosen(documents: int, examples: int, seed: int) -> list[int]:
    """One number in each of as many equal parts."""
    draw, count = random.Random(seed), min(examples, documents)
    return [draw.randrange(k * documents // count, (k + 1) * documents // count) for k in range(count)]


def _examples(
    sources: Sequence[Source], tokenizer: Tokenizer, train_on: str, chosen: Sequence[int], progress: Tell
) -> Iterator[Example]:
    if not chosen:
        return
    reader = _Reader(sources, Listing(_nobody), tokenizer, train_on, keep=True)
    for document in reader.read(progress, "fetching examples", chosen):
        left_out = document.tokens - len(document.ids)
        head = HEAD if left_out else None
        runs = runs_of(document.ids[:head], document.flags[:head], tokenizer)
        if left_out:
            runs.append(Run(f"… {left_out:,} tokens …", False, cut=True))
            runs += runs_of(document.ids[HEAD:], document.flags[HEAD:], tokenizer)
        yield Example(document.where, document.tokens, document.trained, runs)


def runs_of(ids: Sequence[int], trained: Sequence[bool], tokenizer: Tokenizer) -> list[Run]:
    """Tokens as text; special ones by name, each for itself."""
    names = {i: name for name, i in tokenizer.specials.items()}
    runs: list[Run] = []
    start = 0
    for at in range(1, len(ids) + 1):
        first = ids[start]
        same = at < len(ids) and ids[at] not in names and first not in names and trained[at] == trained[start]
        if same:
            continue
        before = [] if first in names else [i for i in ids[max(0, start - 8) : start] if i not in names]
        text = names.get(first) or tokenizer.decode([*before, *ids[start:at]])[len(tokenizer.decode(before)) :]
        runs.append(Run(text, bool(trained[start]), first in names))
        start = at
    return runs


# -- check --------------------------------------------------------------------------------------------------


@dataclass
class Checked:
    """How much of what was found. `longer_texts` are cut without a loss, so they are only counted."""

    documents: int = 0
    bad_records: int = 0
    bad_files: int = 0
    duplicates: int = 0
    empty: int = 0
    longer: int = 0
    longer_texts: int = 0
    usable: bool = False


def check(
    specs: Sequence[str],
    tell: Callable[[Finding], None],
    *,
    tokenizer: str = "",
    seq_len: int = 0,
    skip_bad: int = 0,
    progress: Tell = silent,
) -> Checked:
    """Tells all that is wrong with the data. It is usable as it is if no file is bad and at most `skip_bad` records.

    Conversations longer than `seq_len` are told if there is a tokenizer, and conversations that its template refuses
    are bad records. Raises `UserError` about the tokenizer, and for `seq_len` without one.
    """
    if seq_len and not tokenizer:
        raise UserError(
            "--seq-len counts tokens", fix="name a tokenizer, too: --tokenizer FILE, a run's folder, or bpe"
        )
    problems, found = Listing(tell), Checked()
    sources = find_sources(specs, problems)
    own = tokenizer_for(tokenizer, sources)[0] if tokenizer else None
    with Repeats() as repeats:
        for document in _Reader(sources, problems, own).read(progress, "reading the data"):
            if not document.size:
                found.empty += 1
                tell(Finding("empty", f"{document.where}: empty; it is passed over"))
                continue
            found.documents += 1
            repeats.add(document.digest, document.where)
            if seq_len and document.inputs > seq_len:
                _tell_longer(document, seq_len, found, tell)
        for copy, first in repeats.pairs():
            found.duplicates += 1
            line = f"{repeats.where(copy)}: an exact duplicate of {repeats.where(first)}"
            tell(Finding("duplicate", line))
    found.bad_records, found.bad_files = problems.records, problems.files
    found.usable = bool(found.documents) and not found.bad_files and found.bad_records <= skip_bad
    return found


def _tell_longer(document: Document, seq_len: int, found: Checked, tell: Callable[[Finding], None]) -> None:
    if not document.messages:
        found.longer_texts += 1
        return
    found.longer += 1
    line = f"{document.where}: {document.tokens:,} tokens, more than a sequence of {seq_len:,} holds; it will be cut"
    tell(Finding("longer", line))
