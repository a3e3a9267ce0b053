"""The held-out split: by content alone, duplicates together, something on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.data.records import KINDS, Message, Record
from lumina.data.scan import ROW
from lumina.data.split import MOST, SHARE, Split, decide


def text(content: str, where: str = "x.txt") -> Record:
    return Record(where, content)


def chat(answer: str) -> Record:
    return Record("x.jsonl:1", messages=(Message("user", "?"), Message("assistant", answer)), format="messages")


def decided(records: Sequence[Record]) -> Split:
    rows = [(r.key, r.size, len(r.text), 0, KINDS.index(r.kind), 0) for r in records]
    return decide(np.array(rows, ROW), [False])


def divided(records: Sequence[Record]) -> tuple[list[Record], list[Record], Split]:
    """Both sides of whole documents."""
    split = decided(records)
    train, heldout, conversations = list[Record](), list[Record](), 0
    for record in records:
        head, tail = split.parts(record, 0, record.key, 0, len(record.text), conversations)
        conversations += record.kind == "chat"
        train += [head] if head else []
        heldout += [tail] if tail else []
    return train, heldout, split


def size(records: Sequence[Record]) -> int:
    return sum(record.size for record in records)


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=150))
def test_nothing_is_lost_and_duplicates_stay_together(texts: list[str]) -> None:
    records = [text(content) for content in texts]
    train, heldout, split = divided(records)
    assert size(train) + size(heldout) == size(records)
    if split.rule == "families":
        assert not {r.text for r in train} & {r.text for r in heldout}
        assert SHARE / 2 * size(records) <= size(heldout) <= MOST * size(records)


def test_order_and_names_do_not_matter() -> None:
    records = [text(f"text {i}") for i in range(300)]
    renamed = [text(record.text, f"{i}.txt") for i, record in enumerate(reversed(records))]
    (_, first, _), (_, second, _) = divided(records), divided(renamed)
    assert {r.text for r in first} == {r.text for r in second}


def test_a_family_stays_together_whatever_its_texts() -> None:
    records = [Record("x", f"text {i}", family=f"{i // 3 * 2654435761 % 2**32:08x}00000000") for i in range(600)]
    train, heldout, split = divided(records)
    assert split.rule == "families"
    assert heldout
    assert not {r.family for r in train} & {r.family for r in heldout}


def test_one_document_gives_its_end_from_a_line_border() -> None:
    content = "".join(f"line {i}\n" for i in range(1000))
    (head,), (tail,), split = divided([text(content)])
    assert split.rule == "tails"
    assert head.text + tail.text == content
    assert head.text.endswith("\n")
    assert 0.05 <= len(tail.text) / len(content) < 0.055


def test_without_lines_the_cut_is_between_words_or_anywhere() -> None:
    (head,), (tail,), _ = divided([text("word " * 1000)])
    assert head.text.endswith(" ")
    assert tail.text.startswith("word")
    (head,), (tail,), _ = divided([text("x" * 1000)])
    assert len(tail.text) == 50


def test_few_large_documents_each_give_their_end() -> None:
    records = [text(f"{name}\n" * 5000) for name in "abc"] + [text("tiny")]
    _, heldout, split = divided(records)
    assert split.rule == "tails"
    assert {r.text[0] for r in heldout} >= set("abc")
    assert 0.04 < size(heldout) / size(records) < 0.06


@given(st.text(alphabet="ab \n", min_size=2, max_size=300), st.integers(1, 60))
def test_a_text_in_parts_gives_each_side_one_document(content: str, length: int) -> None:
    """Each side's parts are the text, and only the last of them is `last`: else two documents would run together."""
    split = decided([text(content)])
    whole = text(content)
    pieces = [content[i : i + length] for i in range(0, len(content), length)]
    sides: tuple[list[Record], list[Record]] = ([], [])
    for i, piece in enumerate(pieces):
        record = Record("x.txt", piece, family="0" * 64, last=i == len(pieces) - 1)
        for side, part in zip(sides, split.parts(record, 0, whole.key, i * length, len(content), 0), strict=True):
            side += [part] if part else []
    assert "".join(r.text for side in sides for r in side) == content
    for side in sides:
        assert [r.last for r in side] == [False] * (len(side) - 1) + [True] * bool(side)


def test_of_conversations_the_last_ones_are_the_tail() -> None:
    same = [chat("always the same")] * 100  # one family, too large to be held out
    train, heldout, split = divided(same)
    assert (len(train), len(heldout), split.tails) == (95, 5, {"chat"})


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (2, 1), (3, 2)])
def test_of_few_conversations_one_is_trained_on(count: int, kept: int) -> None:
    train, heldout, _ = divided([chat("same")] * count)
    assert (len(train), len(heldout)) == (kept, count - kept)


def test_a_kind_that_no_family_holds_out_gives_its_ends() -> None:
    """Many texts are held out by family; the one large conversation family is not, and gives its end instead."""
    records = [text(f"text {i} " * 20) for i in range(300)] + [chat("hello")] * 40
    train, heldout, split = divided(records)
    assert split.tails == {"chat"}
    assert {r.kind for r in train} == {r.kind for r in heldout} == {"text", "chat"}
    assert sum(r.kind == "chat" for r in heldout) == 2
    assert not {r.text for r in train if r.text} & {r.text for r in heldout if r.text}
