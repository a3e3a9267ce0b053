"""Exact copies, found in passes."""

from __future__ import annotations

import random

import pytest

from lumina.data import repeats
from lumina.data.repeats import Repeats, hash_of


@pytest.mark.parametrize("run", [3, 16, 1 << 21])
def test_each_copy_is_found_with_the_first_of_its_kind(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "RUN", run)
    values = random.Random(run).choices(range(40), k=100)
    with Repeats() as found:
        for at, value in enumerate(values):
            found.add(hash_of("text", [str(value)]).digest(), f"é{at}.txt")
        expected = [(at, values.index(value)) for at, value in enumerate(values) if values.index(value) < at]
        pairs = list(found.pairs())
        assert sorted(pairs) == expected
        assert [found.where(at) for at in (0, 7, 99)] == ["é0.txt", "é7.txt", "é99.txt"]
    if run > 100:
        assert pairs == expected


def test_nothing_repeats_in_nothing() -> None:
    with Repeats() as found:
        assert list(found.pairs()) == []


def test_texts_and_conversations_are_never_equal() -> None:
    assert hash_of("text", ["a", "b"]).digest() == hash_of("text", ["ab"]).digest() != hash_of("chat", ["ab"]).digest()
