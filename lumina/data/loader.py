"""Shards to batches. Batch i is f(seed, data, overlays, i): no state, no history, no workers, O(1) for any i.

    phase of step i -> past quarantined blocks -> its draw (`mixture`) -> windows (`windows`) -> one batch

Legend: B sequences of a batch, S tokens of a sequence.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lumina.config.overlay import Block
from lumina.config.schema.data import DataConfig
from lumina.config.units import span
from lumina.data.corpus import Corpus, Shard
from lumina.data.mixture import Blend, Draw, Paced, Pool
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
        self.steps, self.curriculum = steps, data.curriculum
        self.data, self.phases, self.seed = data, phases, seed
        self.draws = self._draws()
        self.orders = {0: self.draws}
        self.newest: tuple[tuple[int, tuple[Block, ...], int], NDArray[np.int64]] = (-1, (), 0), np.empty(0, np.int64)

    def ids(self, i: int, skipped: Sequence[Block] = (), order: int = 0) -> NDArray[np.int64]:
        """Global sample ids (B,) of batch `i`, the same for any number of processes.

        Batches read on behind those `skipped`, within their phase. Each `order` is another shuffle of the same data.
        """
        asked = i, tuple(skipped), order
        if self.newest[0] != asked:  # a step is asked for twice: once to read it, once to check what was read
            if order not in self.orders:
                self.orders[order] = self._draws(order)
            phase, n = self._phase(i), self.planned(i, skipped)
            n_B = (n - self.begins[phase]) * self.sequences + np.arange(self.sequences)
            shards, windows = self.orders[order][phase](n_B)
            self.newest = asked, self.offsets[shards] + windows
        return self.newest[1].copy()

    def planned(self, i: int, skipped: Sequence[Block] = ()) -> int:
        """Which batch, as its phase numbers them without a quarantine, batch `i` is.

        A number behind the end of the phase is what the phase would read if it were longer: the next one is not moved.
        """
        phase = self._phase(i)
        mine = sorted((block.start, block.start + block.length) for block in skipped if self._phase(block.at) == phase)
        n, passed = i, 0
        for start, end in mine:
            if start > n:
                break
            n += max(0, end - max(start, passed))  # blocks may overlap
            passed = max(passed, end)
        return n

    def blocks(self, first: int, last: int, skipped: Sequence[Block] = ()) -> list[Block]:
        """What to quarantine so that batches `first` to `last`, as read past `skipped`, are left out: one a phase."""
        borders = sorted({first, last + 1, *(begin for begin in self.begins if first < begin <= last)})
        spans = [(self.planned(a, skipped), self.planned(b - 1, skipped), a) for a, b in pairwise(borders)]
        return [Block(start, end - start + 1, at) for start, end, at in spans]

    def fetch(self, ids: NDArray[np.int64]) -> Batch:
        """The batch of these samples."""
        return _fetch(self.windows, self.offsets, ids)

    def batch(self, i: int, skipped: Sequence[Block] = (), order: int = 0) -> Batch:
        return self.fetch(self.ids(i, skipped, order))

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
        streams = [shard.stream for shard in self.shards if shard.kind == "chat"]
        if streams:
            tokens = max(1, sum(stream.tokens for stream in streams))
            facts["answers"] = round(sum(stream.counted for stream in streams) / tokens, 4)
        return facts | cuts_of(self.windows)

    @property
    def epochs(self) -> dict[str, float]:
        """How often a run reads the windows of each source; the sources of a kind that have no weights are one."""
        read = dict[str, float]()
        for phase, end in zip(self.phases, [*self.begins[1:], self.steps], strict=True):
            windows = (end - phase.begin) * self.sequences
            for kind, share in self._shares(phase).items():
                groups = self._groups(kind)
                for group, part in zip(groups, self._parts(groups), strict=True):
                    name = self.shards[group[0]].name if len(groups) > 1 else kind
                    size = sum(len(self.windows[i]) for i in group)
                    read[name] = read.get(name, 0.0) + windows * share * part / size
        return read

    def phase_end(self, i: int) -> int:
        """The first batch behind the phase of batch `i`."""
        return [*self.begins[1:], self.steps][self._phase(i)]

    def _phase(self, i: int) -> int:
        return bisect_right(self.begins, i) - 1

    def _draws(self, order: int = 0) -> list[Draw]:
        """One draw a phase."""
        draws = []
        for number, phase in enumerate(self.phases):
            usual = (self.seed, number) if number else (self.seed,)
            draws.append(self._draw(self.data, phase, (self.seed, number, 5, order) if order else usual))
        return draws

    def _draw(self, data: DataConfig, phase: DataPhase, key: tuple[int, ...]) -> Draw:
        """How a phase that wants text, chat or both goes through the shards."""
        shares = self._shares(phase)
        have = {kind: self._groups(kind) for kind in shares}
        if missing := [kind for kind, groups in have.items() if not groups]:
            what = f"the training side has no window of {' and '.join(missing)}"
            raise UserError(what, fix="give more, or set model.seq_len higher")
        draws = [self._draw_kind(have[kind], key, phase.begin, share) for kind, share in shares.items()]
        return Blend(draws, list(shares.values()), (*key, 2)) if len(draws) > 1 else draws[0]

    def _shares(self, phase: DataPhase) -> dict[str, float]:
        """The share of the sequences that each kind has."""
        ratio = self.data.base_ratio
        return {"text": ratio, "chat": 1 - ratio} if phase.data == "both" else {phase.data: 1.0}

    def _parts(self, groups: Sequence[Sequence[int]]) -> list[float]:
        """Of each group of a kind its share, as they are weighted."""
        weights = [self.shards[group[0]].weight or 0.0 for group in groups] if len(groups) > 1 else [1.0]
        return [weight / sum(weights) for weight in weights]

    def _groups(self, kind: str) -> list[list[int]]:
        """The shards of a kind that have windows: together, or those of each source that has a weight."""
        mine = [i for i, shard in enumerate(self.shards) if shard.kind == kind and len(self.windows[i])]
        if not mine or self.shards[mine[0]].weight is None:
            return [mine] if mine else []
        names = dict.fromkeys(self.shards[i].name for i in mine)
        return [[i for i in mine if self.shards[i].name == name] for name in names]

    def _draw_kind(self, groups: list[list[int]], key: tuple[int, ...], begin: int, share: float) -> Draw:
        """`share` of the sequences, from step `begin` on, of the groups as they are weighted."""
        if len(groups) == 1:
            return self._pool(groups[0], key, begin, share)
        weights = [self.shards[group[0]].weight or 0.0 for group in groups]
        pools = [
            self._pool(group, (*key, 3, group[0]), begin, share * part)
            for group, part in zip(groups, self._parts(groups), strict=True)
        ]
        return Blend(pools, weights, (*key, 4))

    def _pool(self, shards: list[int], key: tuple[int, ...], begin: int, share: float) -> Draw:
        """One order of all windows; with a curriculum the easy ones first, as far as the run has come."""
        pool = Pool(shards, [len(self.windows[i]) for i in shards], key)
        until, passed = (
            round(steps * self.sequences * share) for steps in (span(self.curriculum.until, self.steps), begin)
        )
        if until <= passed:
            return pool
        difficulty = np.concatenate([_difficulty(self.shards[i], self.windows[i]) for i in shards])
        return Paced(pool, difficulty, until, self.curriculum.start, passed)


def _difficulty(shard: Shard, windows: TextWindows | ChatWindows) -> NDArray[np.floating]:
    if shard.difficulty is None:
        raise UserError(
            f"data.curriculum: {shard.name} has no difficulty",
            fix="prepare it and write one: lumina data prepare … --out DIR, lumina data difficulty DIR, data.train=DIR",
        )
    return np.asarray(shard.difficulty)[windows.places()]


def cuts_of(windows: Sequence[TextWindows | ChatWindows]) -> dict[str, int]:
    """What became of conversations that are longer than a window; nothing where there are none."""
    cuts = [chats.cuts for chats in windows if isinstance(chats, ChatWindows)]
    return {name: sum(getattr(cut, name) for cut in cuts) for name in ("overlong", "pieces", "lost_tokens") if cuts}


class Heldout:
    """Batches in which every counted target of the held-out shards of one kind comes exactly once, in order.

    The last batch may be smaller. `text_bytes` are the bytes of what is counted.
    """

    def __init__(
        self, shards: Sequence[Shard], seq_len: int, sequences: int, end_id: int, train_on: str = "assistant"
    ) -> None:
        self.windows = [windows_of(shard, seq_len, end_id, train_on) for shard in shards]
        self.offsets = np.cumsum([0, *map(len, self.windows)])
        self.ids: NDArray[np.int64] = np.arange(self.offsets[-1])
        self.sequences = sequences
        pairs = zip(shards, self.windows, strict=True)
        self.text_bytes = round(sum(_counted_bytes(shard, windows, train_on) for shard, windows in pairs))

    def in_batches(self, sequences: int) -> Heldout:
        """The same in batches of so many sequences."""
        other = copy(self)
        other.sequences = sequences
        return other

    def thinned(self, sequences: int) -> Heldout:
        """At most so many of its sequences, evenly spread; at least one."""
        other, there = copy(self), len(self.ids)
        other.ids = self.ids[:: max(1, -(-there // max(1, sequences)))]
        other.text_bytes = round(self.text_bytes * len(other.ids) / max(1, there))
        return other

    def __len__(self) -> int:
        return -(-len(self.ids) // self.sequences)

    def __getitem__(self, i: int) -> Batch:
        first = range(0, len(self.ids), self.sequences)[i]
        return _fetch(self.windows, self.offsets, self.ids[first : first + self.sequences])


def _counted_bytes(shard: Shard, windows: TextWindows | ChatWindows, train_on: str) -> float:
    """The bytes of what is counted; of what is cut off, as large a share as of the targets."""
    if isinstance(windows, TextWindows):
        return shard.stream.text_bytes
    answers, all_targets = train_on == "assistant", shard.stream.tokens - shard.stream.documents
    whole = shard.stream.answer_bytes if answers else shard.stream.text_bytes
    return whole * (1 - windows.cuts.lost_counted / max(1, shard.stream.counted if answers else all_targets))


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
