"""Windows: every token is a target once, conversations see only themselves, and what is lost is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lumina.data import windows as module
from lumina.data.corpus import Shard
from lumina.data.streams import Stream
from lumina.data.template import COUNTED, TURN
from lumina.data.windows import NOT_COUNTED, ChatWindows, Rows, TextWindows, pack, windows_of

END = 0


class Held(Shard):
    """A shard whose arrays are in memory."""

    tokens: np.ndarray  # type: ignore[assignment]
    marks: np.ndarray  # type: ignore[assignment]
    starts: np.ndarray  # type: ignore[assignment]


def held(kind: str, tokens: Sequence[int], starts: Sequence[int], marks: Sequence[int] = ()) -> Shard:
    assert kind in ("text", "chat")
    shard = Held(Path("nowhere"), kind, Stream(0, kind, "train"), "uint32", {})
    shard.__dict__["tokens"] = np.array(tokens, np.uint32)
    shard.__dict__["starts"] = np.array(starts, np.uint64)
    shard.__dict__["marks"] = np.array(marks, np.uint8)
    shard.__dict__["difficulty"] = None
    return shard


def texts(length: int, ends: tuple[int, ...] = (0,)) -> Shard:
    """Token i of the stream is i + 1, or END at `ends`."""
    tokens = np.arange(1, length + 1)
    tokens[list(ends)] = END
    return held("text", tokens.tolist(), list(ends)[:-1] or [0])


Turn = tuple[int, int]  # tokens of the question with its role, and of the answer with its stop


def chats(conversations: Sequence[Sequence[Turn]]) -> Shard:
    """Every token is another number; answers count, and each question but the first may begin a piece."""
    marks: list[int] = []
    starts: list[int] = []
    for turns in conversations:
        starts.append(len(marks))
        marks.append(0)  # what a conversation begins with
        for i, (question, answer) in enumerate(turns):
            marks += [TURN if i else 0, *[0] * (question - 1)] + [COUNTED] * answer
    return held("chat", range(1, len(marks) + 1), starts, marks)


def everything(windows: TextWindows | ChatWindows) -> Rows:
    return windows.fetch(np.arange(len(windows)))


def counted(rows: Rows) -> Counter[int]:
    return Counter(rows.targets_BS[rows.targets_BS != NOT_COUNTED].tolist())


# -- texts


@given(st.integers(2, 200), st.integers(1, 16))
def test_every_token_of_a_text_is_a_target_once(length: int, seq_len: int) -> None:
    shard = texts(length, (0, length // 2, length - 1))
    windows = TextWindows(shard, seq_len, END)
    rows = everything(windows)
    real = rows.targets_BS != NOT_COUNTED
    assert rows.targets_BS[real].tolist() == shard.tokens[1:].tolist()
    assert rows.ids_BS[real].tolist() == shard.tokens[:-1].tolist()
    assert set(rows.ids_BS[~real].tolist()) <= {END}
    assert windows.padding == pytest.approx((~real).mean())


def test_windows_of_texts_come_in_any_order() -> None:
    windows = TextWindows(texts(1000), 8, END)
    rows = windows.fetch(np.array([124, 3, 0]))
    assert rows.ids_BS[1:].tolist() == [list(range(25, 33)), [END, *range(2, 9)]]
    assert rows.targets_BS[0].tolist() == [*range(994, 1001), NOT_COUNTED]
    assert [column.dtype for column in rows] == [np.int64, np.int64, np.int32]


def test_an_end_token_is_an_input_of_the_document_it_opens() -> None:
    rows = everything(TextWindows(texts(17, (0, 3, 4, 8, 12)), 8, END))
    assert rows.ids_BS[0].tolist() == [0, 2, 3, 0, 0, 6, 7, 8]
    assert rows.segments_BS.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1]]


def test_the_place_of_a_window_of_text_is_the_document_in_its_middle() -> None:
    windows = TextWindows(texts(33, (0, 4, 5, 21, 32)), 8, END)
    assert windows.places().tolist() == [1, 2, 2, 3]  # at 4, 12, 20 and 28
    assert TextWindows(texts(33, (0, 5, 21, 32)), 8, END).places().tolist() == [0, 1, 1, 2]


# -- conversations

TURNS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5)
CHATS = st.lists(TURNS, min_size=1, max_size=20)


@given(CHATS, st.integers(1, 80), st.booleans())
def test_every_counted_token_is_a_target_once_or_lost(
    conversations: list[list[Turn]], seq_len: int, everything_counts: bool
) -> None:
    shard = chats(conversations)
    windows = ChatWindows(shard, seq_len, END, "all" if everything_counts else "assistant")
    rows = everything(windows)
    targets, cuts = counted(rows), windows.cuts
    assert all(n == 1 for n in targets.values())
    wanted = set(shard.tokens.tolist() if everything_counts else shard.tokens[(shard.marks & COUNTED) > 0].tolist())
    assert targets.keys() <= wanted
    # The first token of each piece is no target; all others are in a window, or lost.
    in_windows = int(windows.length.sum())
    assert in_windows + cuts.lost_tokens == len(shard.tokens)
    if everything_counts:
        assert len(targets) == in_windows - len(windows.length)
    lost = wanted - targets.keys() - set(shard.tokens[windows.start].tolist())
    assert len(lost) <= cuts.lost_tokens
    longest = [1 + sum(map(sum, turns)) for turns in conversations]
    assert cuts.overlong == sum(length > seq_len + 1 for length in longest)
    if not cuts.overlong:
        assert (cuts.pieces, cuts.lost_tokens, lost) == (0, 0, set())
        assert in_windows == len(shard.tokens)


@given(CHATS, st.integers(40, 130))
def test_of_turns_that_fit_nothing_is_lost(conversations: list[list[Turn]], seq_len: int) -> None:
    shard = chats(conversations)
    windows = ChatWindows(shard, seq_len, END, "assistant")
    assert windows.cuts.lost_tokens == 0
    assert counted(everything(windows)).keys() == set(shard.tokens[(shard.marks & COUNTED) > 0].tolist())
    begins = set(shard.starts.tolist()) | set(np.flatnonzero(shard.marks & TURN).tolist())
    assert set(windows.start.tolist()) <= begins
    assert windows.length.max() <= seq_len + 1


@given(CHATS, st.integers(1, 80))
def test_no_window_looks_from_one_conversation_into_another(conversations: list[list[Turn]], seq_len: int) -> None:
    """Each segment holds tokens in a row of one piece; targets follow their inputs; the rest is a segment too."""
    shard = chats(conversations)
    windows = ChatWindows(shard, seq_len, END, "all")
    rows = everything(windows)
    document = np.searchsorted(shard.starts, np.arange(len(shard.tokens)), side="right")
    filled = 0
    for ids, targets, segments in zip(*rows, strict=True):
        assert (np.diff(segments) >= 0).all()
        for segment in np.unique(segments):
            mine = ids[segments == segment]
            if mine[0] == END:
                filled += len(mine)
                assert segment == segments[-1]
                assert set(targets[segments == segment].tolist()) == {NOT_COUNTED}
                continue
            assert mine.tolist() == list(range(mine[0], mine[0] + len(mine)))
            assert len(set(document[mine - 1].tolist())) == 1
            assert targets[segments == segment].tolist() == (mine + 1).tolist()
    assert windows.padding == pytest.approx(filled / max(1, rows.ids_BS.size))


def test_an_overlong_conversation_is_cut_before_its_turns() -> None:
    shard = chats([[(2, 3), (2, 3), (2, 9), (2, 3)], [(1, 1)]])  # 1 + 5 + 5 + 11 + 5 = 27 tokens, then 3
    windows = ChatWindows(shard, 10, END, "assistant")
    pieces = sorted(zip(windows.start.tolist(), windows.length.tolist(), strict=True))
    assert pieces == [(0, 11), (11, 11), (22, 5), (27, 3)]
    assert (windows.cuts.overlong, windows.cuts.pieces, windows.cuts.lost_tokens) == (1, 3, 0)
    assert windows.places().tolist() == [0, 0, 0]


def test_of_a_turn_that_is_too_long_the_end_is_lost() -> None:
    shard = chats([[(2, 3), (4, 20), (2, 3)]])  # pieces of 6, 24 of which 11, 5
    windows = ChatWindows(shard, 10, END, "assistant")
    pieces = sorted(zip(windows.start.tolist(), windows.length.tolist(), strict=True))
    assert pieces == [(0, 6), (6, 11), (30, 5)]
    assert (windows.cuts.overlong, windows.cuts.pieces, windows.cuts.lost_tokens) == (1, 3, 13)
    assert len(counted(everything(windows))) == 3 + 7 + 3


def test_a_piece_without_an_answer_is_lost() -> None:
    shard = chats([[(20, 5), (2, 3)]])
    windows = ChatWindows(shard, 10, END, "assistant")
    assert windows.start.tolist() == [26]
    assert (windows.cuts.pieces, windows.cuts.lost_tokens) == (1, 26)
    every = ChatWindows(shard, 10, END, "all")
    assert sorted(every.start.tolist()) == [0, 26]
    assert (every.cuts.pieces, every.cuts.lost_tokens) == (2, 15)


def test_conversations_of_which_all_is_lost_have_no_window() -> None:
    windows = ChatWindows(chats([[(20, 5)]]), 10, END, "assistant")
    assert (len(windows), windows.cuts.lost_tokens) == (0, 26)


def test_which_windows_a_shard_gets() -> None:
    assert isinstance(windows_of(texts(20), 4, END, "assistant"), TextWindows)
    chat = windows_of(chats([[(1, 1)]]), 4, END, "all")
    assert isinstance(chat, ChatWindows)
    assert chat.every_token


# -- packing


def first_fit(lengths: list[int], room: int) -> int:
    """The windows that the plainest way takes."""
    free: list[int] = []
    for length in lengths:
        at = next((i for i, left in enumerate(free) if left >= length), len(free))
        free += [room] if at == len(free) else []
        free[at] -= length
    return len(free)


def packed(lengths: list[int], room: int) -> tuple[list[int], list[int]]:
    order, first = pack(np.array(lengths, np.int64), room)
    return order.tolist(), first.tolist()


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 120))
def test_packing_never_goes_over_and_keeps_every_piece(lengths: list[int], room: int) -> None:
    order, first = packed(lengths, room)
    assert sorted(order) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in order[a:b]) for a, b in pairwise(first)]
    assert all(0 < load <= room for load in loads)
    assert sum(loads) == sum(lengths)
    assert sum(sorted(loads)[:2]) > room or len(loads) < 2  # else one window would have held both
    assert len(loads) <= 11 / 9 * first_fit(sorted(lengths, reverse=True), room) + 1
    assert (order, first) == packed(lengths, room)


def test_packing_is_close_to_the_fewest_windows() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(256, rng.lognormal(4, 0.7, 10_000).astype(int) + 1).tolist()
    windows = len(packed(lengths, 256)[1]) - 1
    assert windows <= 1.01 * sum(lengths) / 256 + 3


def test_packing_takes_the_fullest_window_that_has_room() -> None:
    order, first = packed([6, 5, 4, 3, 2], 10)
    assert [order[a:b] for a, b in pairwise(first)] == [[0, 2], [1, 3, 4]]


def test_packing_looks_ahead_no_further_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOKAHEAD", 2)
    order, first = packed([6, 5, 4, 5], 10)
    assert [order[a:b] for a, b in pairwise(first)] == [[0], [1], [3, 2]]


@given(CHATS)
def test_windows_do_not_depend_on_how_they_are_fetched(conversations: list[list[Turn]]) -> None:
    windows = ChatWindows(chats(conversations), 40, END, "assistant")
    assume(len(windows) > 1)
    whole = everything(windows)
    for i in reversed(range(len(windows))):
        assert all((a[0] == b[i]).all() for a, b in zip(windows.fetch(np.array([i])), whole, strict=True))
