"""Shards to batches. Batch i is f(seed, data, i): no state, no history, no workers, O(1) for any i.

    phase of step i -> its draw (`mixture`) -> windows (`windows`) -> one batch

Legend: B sequences of a batch, S tokens of a sequence.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lumina.config.schema.data import CurriculumConfig, DataConfig
from lumina.config.units import span
from lumina.data.mixture import Blend, Draw, Paced, Pool
from lumina.data.shards import Corpus, Shard
from lumina.data.windows import NOT_COUNTED, ChatWindows, TextWindows, windows_of
from lumina.errors import UserError

THROUGHPUT_BATCHES = 20


@dataclass(frozen=True)
class Batch:
    """Inputs and targets (int64; -1 is not counted), each input's document in its window (int32), and sample
    ids.

    Attention must stay inside a segment. An end token is an input of the document it opens.
    """

    ids_BS: Tensor
    targets_BS: Tensor
    segments_BS: Tensor
    sample_ids_B: Tensor

    @property
    def targets(self) -> int:
        """Counted targets. Read it before the batch moves to a device: later it waits for that device."""
        return int((self.targets_BS != NOT_COUNTED).sum())

    def split(self, n_micro: int) -> list[Batch]:
        """`n_micro` equal parts, in order. Raises `ValueError` if the sequences do not divide."""
        rows = len(self.ids_BS)
        if rows % n_micro:
            raise ValueError(f"{rows} sequences do not divide into {n_micro} micro-batches")
        size = rows // n_micro
        columns = (getattr(self, field.name).split(size) for field in fields(self))
        return [Batch(*part) for part in zip(*columns, strict=True)]

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


@dataclass(frozen=True)
class DataPhase:
    """From step `begin` on (counted from 0) batches hold `data`: text, chat or both."""

    begin: int
    data: str


class Loader:
    """Batches of `sequences` windows of the training side, as `data.mode`, the weights and the phases say."""

    def __init__(
        self, corpus: Corpus, data: DataConfig, phases: Sequence[DataPhase], seq_len: int, sequences: int, seed: int,
        steps: int,
    ) -> None:  # fmt: skip
        """Raises `UserError` if a phase has no data, or a curriculum no difficulty."""
        end_id = corpus.tokenizer.end_id
        self.shards = corpus.train
        self.windows = [windows_of(shard, seq_len, end_id, data.train_on) for shard in self.shards]
        self.sequences, self.seq_len = sequences, seq_len
        self.offsets = np.cumsum([0, *map(len, self.windows)])
        self.begins = [phase.begin for phase in phases]
        self.draws = [
            self._draw(data, phase.data, (seed, number) if number else (seed,), steps)
            for number, phase in enumerate(phases)
        ]

    def ids(self, i: int) -> NDArray[np.int64]:
        """Global sample ids (B,) of batch `i`, the same for any number of processes."""
        phase = bisect_right(self.begins, i) - 1
        n = (i - self.begins[phase]) * self.sequences + np.arange(self.sequences)
        shards, windows = self.draws[phase](n)
        return self.offsets[shards] + windows

    def fetch(self, ids: NDArray[np.int64]) -> Batch:
        """The batch of these samples."""
        return _fetch(self.windows, self.offsets, ids)

    def batch(self, i: int) -> Batch:
        return self.fetch(self.ids(i))

    def throughput(self) -> float:
        """Tokens a second, measured over a few batches."""
        self.batch(0)
        start = time.perf_counter()
        for i in range(THROUGHPUT_BATCHES):
            self.batch(i)
        return THROUGHPUT_BATCHES * self.sequences * self.seq_len / (time.perf_counter() - start)

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader should know of how the data fills windows."""
        sizes = [len(windows) for windows in self.windows]
        padded = sum(size * windows.padding for size, windows in zip(sizes, self.windows, strict=True))
        facts: dict[str, Any] = {"windows": sum(sizes), "padding": round(padded / max(1, sum(sizes)), 4)}
        chats = [windows for windows in self.windows if isinstance(windows, ChatWindows)]
        if chats:
            streams = [shard.stream for shard in self.shards if shard.kind == "chat"]
            tokens = max(1, sum(stream.tokens for stream in streams))
            facts["answers"] = round(sum(stream.counted for stream in streams) / tokens, 4)
            for name in ("overlong", "pieces", "lost_tokens"):
                facts[name] = sum(getattr(windows.cuts, name) for windows in chats)
        return facts

    def _draw(self, data: DataConfig, wanted: str, key: tuple[int, ...], steps: int) -> Draw:
        """How a phase that wants text, chat or both goes through the shards."""
        kinds = ("text", "chat") if wanted == "both" else (wanted,)
        draws = {kind: self._draw_kind(kind, data.curriculum, key, steps) for kind in kinds}
        have = {kind: draw for kind, draw in draws.items() if draw is not None}
        if missing := [kind for kind in kinds if kind not in have]:
            what = f"the training side has no window of {' and '.join(missing)}"
            raise UserError(what, fix="give more, or set model.seq_len higher")
        if len(have) == 2:
            return Blend([have["text"], have["chat"]], [data.base_ratio, 1 - data.base_ratio], (*key, 2))
        (only,) = have.values()
        return only

    def _draw_kind(self, kind: str, curriculum: CurriculumConfig, key: tuple[int, ...], steps: int) -> Draw | None:
        mine = [i for i, shard in enumerate(self.shards) if shard.kind == kind and len(self.windows[i])]
        if not mine:
            return None
        until = self.sequences * span(curriculum.until, steps)
        if self.shards[mine[0]].weight is None:
            return self._pool(mine, key, curriculum, until)
        weights = [self.shards[i].weight or 0.0 for i in mine]
        if len(mine) == 1:
            return self._pool(mine, key, curriculum, until)
        shares = [weight / sum(weights) for weight in weights]
        pools = [self._pool([i], (*key, 3, i), curriculum, round(until * s)) for i, s in zip(mine, shares, strict=True)]
        return Blend(pools, weights, (*key, 4))

    def _pool(self, shards: list[int], key: tuple[int, ...], curriculum: CurriculumConfig, until: int) -> Draw:
        pool = Pool(shards, [len(self.windows[i]) for i in shards], key)
        if not until:
            return pool
        difficulty = np.concatenate([_difficulty(self.shards[i], self.windows[i]) for i in shards])
        return Paced(pool, difficulty, until, curriculum.start)


def _difficulty(shard: Shard, windows: TextWindows | ChatWindows) -> NDArray[np.floating]:
    if shard.difficulty is None:
        raise UserError(
            f"data.curriculum: {shard.name} has no difficulty",
            fix="prepare it and write one: lumina data prepare … --out DIR, lumina data difficulty DIR, data.train=DIR",
        )
    return np.asarray(shard.difficulty)[windows.places()]


class Heldout:
    """Batches in which every counted target of the held-out shards of one kind comes exactly once, in order.

    The last batch may be smaller. `text_bytes` are the bytes of what is counted.
    """

    def __init__(
        self, shards: Sequence[Shard], seq_len: int, sequences: int, end_id: int, train_on: str = "assistant"
    ) -> None:
        self.windows = [windows_of(shard, seq_len, end_id, train_on) for shard in shards]
        self.offsets = np.cumsum([0, *map(len, self.windows)])
        self.sequences = sequences
        answers = train_on == "assistant"
        self.text_bytes = sum(
            s.stream.answer_bytes if answers and s.kind == "chat" else s.stream.text_bytes for s in shards
        )

    def __len__(self) -> int:
        return -(-int(self.offsets[-1]) // self.sequences)

    def __getitem__(self, i: int) -> Batch:
        first = range(0, int(self.offsets[-1]), self.sequences)[i]
        ids = np.arange(first, min(first + self.sequences, int(self.offsets[-1])))
        return _fetch(self.windows, self.offsets, ids)


def _fetch(windows: Sequence[TextWindows | ChatWindows], offsets: NDArray[np.int64], ids: NDArray[np.int64]) -> Batch:
    """The batch of these windows, which are numbered through over all shards."""
    shape = (len(ids), windows[0].seq_len)
    columns: list[NDArray[Any]] = [np.empty(shape, dtype) for dtype in (np.int64, np.int64, np.int32)]
    shards = np.searchsorted(offsets, ids, side="right") - 1
    for shard in np.unique(shards).tolist():
        mine = np.flatnonzero(shards == shard)
        for column, rows in zip(columns, windows[shard].fetch(ids[mine] - offsets[shard]), strict=True):
            column[mine] = rows
    return Batch(*(torch.from_numpy(column) for column in (*columns, ids)))
