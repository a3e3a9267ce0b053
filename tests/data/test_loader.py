"""Batch i is a function of seed, data and i; every kind of text in its share."""

from __future__ import annotations

from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import data_config

from lumina.config.overlay import Block
from lumina.data.corpus import Corpus, Shard
from lumina.data.loader import Batch, DataPhase, Heldout, Loader
from lumina.data.streams import Stream
from lumina.data.template import COUNTED, TURN
from lumina.data.tokenizer import train_bpe
from lumina.data.windows import NOT_COUNTED
from lumina.errors import UserError

END = 0
TOKENIZER = train_bpe(["a"], 260)
MODES = {"base": "text", "finetune": "chat", "hybrid_interleaved": "both", "hybrid_sequential": "both"}


NUMBERS = count(1)


def shard(
    kind: str, tokens: list[int], starts: list[int], marks: list[int] | None = None,
    weight: float | None = None, difficulty: list[float] | None = None, name: str = "",
) -> Shard:  # fmt: skip
    """One whose arrays are in memory."""
    assert kind in ("text", "chat")
    stream = Stream(0, kind, "train", len(starts), 2 * len(tokens), 50, len(tokens))
    stream.counted = sum(mark & COUNTED for mark in marks or [])
    made = Shard(Path("nowhere"), name or f"source {next(NUMBERS)}", stream, "uint16", {}, weight)
    made.__dict__.update(
        tokens=np.array(tokens, np.uint16),
        starts=np.array(starts, np.uint64),
        marks=np.array(marks or [], np.uint8),
        difficulty=None if difficulty is None else np.array(difficulty, np.float32),
    )
    return made


def text(length: int, ends: tuple[int, ...] = (0,), **keys: Any) -> Shard:
    """Token i of the stream is i + 1, or END at `ends`."""
    tokens = [END if i in ends else i + 1 for i in range(length)]
    return shard("text", tokens, list(ends), **keys)


def chat(count: int, length: int = 9, **keys: Any) -> Shard:
    """`count` conversations of `length` tokens, of which four are an answer."""
    tokens = [10_000 + i for i in range(count * length)]
    marks = [0] * (length - 4) + [COUNTED] * 4
    return shard("chat", tokens, list(range(0, count * length, length)), marks * count, **keys)


def loader(
    *shards: Shard, mode: str = "base", sequences: int = 4, seq_len: int = 8, seed: int = 0, steps: int = 100,
    phases: tuple[DataPhase, ...] = (), **keys: Any,
) -> Loader:  # fmt: skip
    corpus = Corpus(shards, (), TOKENIZER, "", {})
    phases = phases or (DataPhase(0, MODES[mode]),)
    return Loader(corpus, data_config("unused", mode=mode, **keys), phases, seq_len, sequences, seed, steps)


def kinds(made: Loader, ids: np.ndarray) -> list[str]:
    return [made.shards[np.searchsorted(made.offsets, i, side="right") - 1].kind for i in ids.tolist()]


@given(st.integers(10, 200), st.integers(1, 8), st.integers(1, 40), st.integers(0, 5))
def test_each_epoch_takes_every_sample_once(length: int, seq_len: int, sequences: int, seed: int) -> None:
    made = loader(text(length), sequences=sequences, seq_len=seq_len, seed=seed)
    samples = -(-(length - 1) // seq_len)
    assert made.offsets[-1] == samples
    batches = 3 * samples // sequences + 1
    ids = np.concatenate([made.ids(i) for i in range(batches)])
    for epoch in range(3):
        assert sorted(ids[epoch * samples : (epoch + 1) * samples].tolist()) == list(range(samples))


def test_batches_are_a_function_of_seed_and_number() -> None:
    made = loader(text(1000))
    alone = made.batch(77)
    for i in (3, 200, 0):
        made.batch(i)
    for other in (made.batch(77), loader(text(1000)).batch(77)):
        for name in ("ids_BS", "targets_BS", "segments_BS", "sample_ids_B"):
            assert torch.equal(getattr(alone, name), getattr(other, name))
    assert not np.array_equal(made.ids(77), loader(text(1000), seed=4).ids(77))
    assert len({tuple(made.ids(i)) for i in range(200)}) == 200


def many() -> tuple[Shard, ...]:
    return text(3000, weight=1), text(2000, weight=3), chat(500, weight=2), chat(300, weight=1)


PHASES = (DataPhase(0, "text"), DataPhase(30, "both"), DataPhase(200, "chat"))


@given(st.integers(0, 300), st.sampled_from([1, 2, 3, 4, 6, 12]))
@settings(deadline=None)
def test_ids_do_not_depend_on_the_sequences_of_a_batch(batch: int, sequences: int) -> None:
    """12 sequences a step are the same ones in smaller steps of a phase, in order."""
    whole = loader(*many(), mode="hybrid_interleaved", sequences=12, phases=(DataPhase(0, "both"),))
    parts = loader(*many(), mode="hybrid_interleaved", sequences=sequences, phases=(DataPhase(0, "both"),))
    each = 12 // sequences
    pieces = [parts.ids(batch * each + k) for k in range(each)]
    assert np.concatenate(pieces).tolist() == whole.ids(batch).tolist()


def test_samples_hold_inputs_and_the_tokens_after_them() -> None:
    batch = loader(text(1000, ())).fetch(np.array([3, 0]))
    assert batch.ids_BS.tolist() == [list(range(25, 33)), list(range(1, 9))]
    assert torch.equal(batch.targets_BS, batch.ids_BS + 1)
    assert batch.sample_ids_B.tolist() == [3, 0]
    assert {t.dtype for t in (batch.ids_BS, batch.targets_BS, batch.sample_ids_B)} == {torch.int64}
    assert batch.segments_BS.dtype == torch.int32


def test_samples_of_several_shards_keep_their_order() -> None:
    made = loader(text(80, ()), text(800, ()), chat(30), mode="hybrid_interleaved")
    ids = np.array([119, 0, 50, 9, 10, 110])
    batch = made.fetch(ids)
    for row, i in enumerate(ids.tolist()):
        alone = made.fetch(np.array([i]))
        assert torch.equal(batch.ids_BS[row], alone.ids_BS[0])
        assert torch.equal(batch.targets_BS[row], alone.targets_BS[0])
        assert torch.equal(batch.segments_BS[row], alone.segments_BS[0])
    assert batch.ids_BS[:, 0].tolist() == [10_000 + 9 * 9, 1, 40 * 8 + 1, 73, 1, 10_000]


# -- mixtures


def test_texts_and_conversations_in_their_ratio() -> None:
    made = loader(text(3000), chat(500), mode="hybrid_interleaved", sequences=50, base_ratio=0.7)
    for block in range(3):
        drawn = [kind for i in range(20) for kind in kinds(made, made.ids(20 * block + i))]
        assert Counter(drawn) == {"text": 700, "chat": 300}
    assert 0 < Counter(kinds(made, made.ids(0)))["chat"] < 50


def test_weights_hold_inside_each_kind() -> None:
    made = loader(*many(), mode="hybrid_interleaved", sequences=100, base_ratio=0.6)
    ids = np.concatenate([made.ids(i) for i in range(50)])  # 3000 texts and 2000 conversations: whole blocks
    taken = Counter((np.searchsorted(made.offsets, ids, side="right") - 1).tolist())
    assert taken[0] == 750
    assert taken[1] == 2250
    assert taken[2] in (1333, 1334)
    assert taken[3] in (666, 667)


def test_each_source_has_an_order_of_its_own() -> None:
    made = loader(text(801, weight=1), text(801, weight=1), sequences=100)
    ids = np.concatenate([made.ids(i) for i in range(10)])
    assert ids[ids < 100].tolist() != (ids[ids >= 100] - 100).tolist()
    pools = made.draws[0].parts  # type: ignore[attr-defined]
    first, second = (pool(np.arange(100))[1].tolist() for pool in pools)
    assert first != second
    assert sorted(first) == sorted(second)


def test_without_weights_sources_are_one_pool() -> None:
    made = loader(text(801), text(201), sequences=25)
    ids = np.concatenate([made.ids(i) for i in range(5)])
    assert sorted(ids.tolist()) == list(range(125))


def test_a_source_of_one_kind_alone_with_a_weight_is_that_pool() -> None:
    plain, weighted = loader(text(801)), loader(text(801, weight=3.0))
    assert np.array_equal(plain.ids(7), weighted.ids(7))


# -- phases


def test_phases_change_what_is_read_at_their_steps() -> None:
    made = loader(text(3000), chat(500), mode="hybrid_sequential", phases=PHASES, base_ratio=0.5)
    assert {kind for i in range(30) for kind in kinds(made, made.ids(i))} == {"text"}
    assert Counter(kind for i in range(30, 200) for kind in kinds(made, made.ids(i))).keys() == {"text", "chat"}
    assert {kind for i in range(200, 260) for kind in kinds(made, made.ids(i))} == {"chat"}


def test_a_phase_of_both_keeps_the_ratio_in_each_mode() -> None:
    """A run of two parts may have phases of its own that read both."""
    made = loader(text(3000), chat(500), mode="hybrid_sequential", sequences=50, base_ratio=0.3)
    assert Counter(kind for i in range(20) for kind in kinds(made, made.ids(i))) == {"text": 300, "chat": 700}


def test_each_phase_begins_a_pool_anew() -> None:
    phases = (DataPhase(0, "text"), DataPhase(13, "text"))
    made = loader(text(801), sequences=10, phases=phases)
    first, second = ([made.ids(start + i).tolist() for i in range(10)] for start in (0, 13))
    assert sorted(np.ravel(first)) == sorted(np.ravel(second)) == list(range(100))
    assert first != second


def test_the_first_phase_has_the_order_of_a_run_without_phases() -> None:
    made = loader(text(801), phases=(DataPhase(0, "text"), DataPhase(10, "text")))
    assert np.array_equal(made.ids(9), loader(text(801)).ids(9))


@pytest.mark.parametrize(("mode", "given", "missing"), [
    ("finetune", chat(5, length=30), "chat"),
    ("hybrid_interleaved", text(100), "chat"),
    ("hybrid_sequential", chat(20), "text"),
])  # fmt: skip
def test_a_phase_without_a_window_is_refused(mode: str, given: Shard, missing: str) -> None:
    with pytest.raises(UserError, match=f"no window of {missing}") as caught:
        loader(given, mode=mode, train_on="assistant", seq_len=8)
    assert "model.seq_len" in caught.value.fix


# -- easy first


def test_easy_windows_come_first() -> None:
    difficulty = [float(i * 37 % 100) for i in range(100)]
    ends = tuple(range(0, 801, 8))
    given = text(801, ends, difficulty=[*difficulty, 0.0])
    made = loader(given, sequences=10, steps=50, curriculum={"until": 20, "start": 0.1})
    hard = [np.array(difficulty)[made.ids(i)] for i in range(50)]
    assert hard[0].max() < 20
    assert max(h.max() for h in hard[:5]) < 60
    plain = loader(given, sequences=10)
    assert [made.ids(20 + i).tolist() for i in range(10)] == [plain.ids(i).tolist() for i in range(10)]


def test_a_curriculum_needs_difficulty() -> None:
    with pytest.raises(UserError, match=r"data\.curriculum: mine has no difficulty") as caught:
        loader(text(801, name="mine"), curriculum={"until": 0.5})
    assert "lumina data difficulty" in caught.value.fix


# -- facts


def test_facts() -> None:
    assert loader(text(801)).facts == {"windows": 100, "padding": 0.0}
    long = [0] * 5 + [COUNTED] * 4 + [TURN, 0, 0, 0] + [COUNTED] * 20
    overlong = shard("chat", list(range(1, 34)), [0], long)
    made = loader(text(17), chat(10), overlong, mode="hybrid_interleaved")
    assert made.facts == {
        "windows": 14,
        "padding": 0.0,
        "answers": round(64 / 123, 4),
        "overlong": 1,
        "pieces": 2,
        "lost_tokens": 15,
    }


def test_epochs_are_how_often_windows_are_read() -> None:
    """Counted against the batches themselves: of each source with a weight, of a kind without, over all phases."""
    phases = (DataPhase(0, "text"), DataPhase(30, "both"))
    for shards in (many(), (text(2401), chat(100))):
        made = loader(*shards, mode="hybrid_interleaved", phases=phases, sequences=100, steps=250)
        ids = np.concatenate([made.ids(i) for i in range(250)])
        seen = Counter((np.searchsorted(made.offsets, ids, side="right") - 1).tolist())
        assert len(made.epochs) == len(shards)
        for name, epochs in made.epochs.items():
            mine = [i for i, one in enumerate(shards) if name in (one.name, one.kind)]
            read = sum(seen[i] for i in mine) / sum(len(made.windows[i]) for i in mine)
            assert epochs == pytest.approx(read, rel=0.01), name


def test_throughput_is_measured() -> None:
    assert loader(text(1000)).throughput() > 0


# -- batches


def test_micro_batches_join_to_the_batch() -> None:
    batch = loader(text(1001, (50, 60)), sequences=6).batch(0)
    parts = batch.split(3)
    for name in ("ids_BS", "targets_BS", "segments_BS", "sample_ids_B"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert sum(part.targets for part in parts) == batch.targets == 48
    with pytest.raises(ValueError, match="6 sequences do not divide into 4"):
        batch.split(4)


def test_moving_keeps_everything() -> None:
    batch = loader(text(100), sequences=2).batch(0).to("meta")
    assert isinstance(batch, Batch)
    assert {t.device.type for t in (batch.ids_BS, batch.targets_BS, batch.segments_BS, batch.sample_ids_B)} == {"meta"}


# -- held out


@given(st.lists(st.integers(2, 120), min_size=1, max_size=3), st.integers(1, 16), st.integers(1, 5))
def test_every_held_out_token_is_predicted_once_in_order(lengths: list[int], seq_len: int, sequences: int) -> None:
    sides = [text(length, (0, length // 2, length - 1)) for length in lengths]
    heldout = Heldout(sides, seq_len, sequences, END)
    batches = [heldout[i] for i in range(len(heldout))]
    targets = torch.cat([batch.targets_BS.flatten() for batch in batches])
    counted = targets != NOT_COUNTED
    assert targets[counted].tolist() == [token for side in sides for token in side.tokens[1:].tolist()]
    inputs = torch.cat([batch.ids_BS.flatten() for batch in batches])
    assert inputs[counted].tolist() == [token for side in sides for token in side.tokens[:-1].tolist()]
    assert set(inputs[~counted].tolist()) <= {END}
    assert all(batch.ids_BS.shape == batch.segments_BS.shape == (len(batch.sample_ids_B), seq_len) for batch in batches)
    assert [i for batch in batches for i in batch.sample_ids_B.tolist()] == list(
        range(sum(-(-(length - 1) // seq_len) for length in lengths))
    )
    assert all(len(batch.ids_BS) == sequences for batch in batches[:-1])
    assert heldout.text_bytes == 2 * sum(lengths)
    with pytest.raises(IndexError):
        heldout[len(heldout)]


def test_held_out_conversations_count_their_answers() -> None:
    answers, everything = (Heldout([chat(25)], 16, 4, END, train_on) for train_on in ("assistant", "all"))
    assert sum(answers[i].targets for i in range(len(answers))) == 25 * 4
    assert sum(everything[i].targets for i in range(len(everything))) == 25 * 8
    assert (answers.text_bytes, everything.text_bytes) == (50, 2 * 25 * 9)


@st.composite
def quarantines(draw: st.DrawFn) -> list[Block]:
    """Blocks as they come about: each quarantined where a run stands that reads past those before it."""
    made, blocks = two_phases(), []
    for _ in range(draw(st.integers(0, 4))):
        first = draw(st.integers(0, 19))
        blocks += made.blocks(first, draw(st.integers(first, 19)), blocks)
    return blocks


def two_phases() -> Loader:
    """Of ten batches of texts and ten of conversations."""
    phases = DataPhase(0, "text"), DataPhase(10, "chat")
    return loader(text(400), chat(300), mode="hybrid_sequential", phases=phases, base_ratio=0.5)


@given(quarantines())
def test_with_a_quarantine_the_batches_are_the_old_ones_without_it(blocks: list[Block]) -> None:
    made = two_phases()
    for begin, end in ((0, 10), (10, 20)):
        mine = [block for block in blocks if begin <= block.at < end]
        out = {n for block in mine for n in range(block.start, block.start + block.length)}
        left = (n for n in count(begin) if n not in out)
        assert [made.planned(i, blocks) for i in range(begin, end)] == [
            n for n, _ in zip(left, range(10), strict=False)
        ]


def test_what_is_read_past_a_quarantine_is_what_the_phase_would_have_read_later() -> None:
    made, block = two_phases(), [Block(3, 2, 3)]
    assert made.ids(2, block).tolist() == made.ids(2).tolist()
    assert [made.ids(i, block).tolist() for i in range(3, 8)] == [made.ids(i).tolist() for i in range(5, 10)]
    assert made.planned(9, block) == 11  # not the first of the other phase
    assert kinds(made, made.ids(9, block)) == ["text"] * 4
    assert made.ids(10, block).tolist() == made.ids(10).tolist()  # which is not moved


def test_what_was_read_twice_over_can_be_quarantined_again() -> None:
    made = two_phases()
    first = made.blocks(2, 4)
    again = made.blocks(2, 12, first)  # up to the second phase, which is not moved by the first block
    assert again == [Block(5, 8, 2), Block(10, 3, 10)]
    assert made.planned(2, first + again) == 13
    assert made.planned(10, first + again) == 13


def test_another_order_shuffles_the_same_windows() -> None:
    made = loader(text(320), sequences=4, seq_len=8)
    batches = range(10)
    usual, other = ([made.ids(i, (), order).tolist() for i in batches] for order in (0, 1))
    assert usual != other
    assert np.array_equal(np.sort(usual, axis=None), np.sort(other, axis=None))
    assert made.ids(3, (), 2).tolist() != other[3]
    assert made.batch(3, (), 1).sample_ids_B.tolist() == other[3]
