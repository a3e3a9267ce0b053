"""The held-out split: by content alone, duplicates together, something on both sides."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lumina.data.documents import Document, digest
from lumina.data.split import MOST, SHARE, split


def document(text: str) -> Document:
    return Document(text, "x.txt", digest(text))


def size(documents: list[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=150))
def test_nothing_is_lost_and_duplicates_stay_together(texts: list[str]) -> None:
    documents = [document(text) for text in texts]
    train, heldout, rule = split(documents)
    assert size(train) + size(heldout) == size(documents)
    if rule == "families":
        assert not {d.text for d in train} & {d.text for d in heldout}
        assert SHARE / 2 * size(documents) <= size(heldout) <= MOST * size(documents)


def test_order_and_names_do_not_matter() -> None:
    documents = [document(f"text {i}") for i in range(300)]
    renamed = [Document(d.text, f"{i}.txt", d.family) for i, d in enumerate(reversed(documents))]
    _, first, _ = split(documents)
    _, second, _ = split(renamed)
    assert {d.text for d in first} == {d.text for d in second}


def test_one_document_gives_its_end_from_a_line_border() -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    (head,), (tail,), rule = split([document(text)])
    assert rule == "tails"
    assert head.text + tail.text == text
    assert head.text.endswith("\n")
    assert 0.05 <= len(tail.text) / len(text) < 0.055


def test_without_lines_the_cut_is_between_words_or_anywhere() -> None:
    (head,), (tail,), _ = split([document("word " * 1000)])
    assert head.text.endswith(" ")
    assert tail.text.startswith("word")
    (head,), (tail,), _ = split([document("x" * 1000)])
    assert len(tail.text) == 50


def test_few_large_documents_each_give_their_end() -> None:
    documents = [document(f"{name}\n" * 5000) for name in "abc"] + [document("tiny")]
    _, heldout, rule = split(documents)
    assert rule == "tails"
    assert {d.text[0] for d in heldout} >= set("abc")
    assert 0.04 < size(heldout) / size(documents) < 0.06
