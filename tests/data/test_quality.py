"""Which documents are removed, against exact similarities, sets and counts by hand."""

from __future__ import annotations

import json
import random
import re
import time
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.config.schema.data import QualityConfig
from lumina.data import quality
from lumina.data.quality import EXACT, KEPT, NEAR, PERMUTATIONS, REASONS, REPETITIVE, SHORT, SYMBOLS, Quality

OFF = {"exact": False, "near": 0.0, "repetition": 0.0, "symbols": 0.0, "min_chars": 0}


def judge(folder: Path, documents: list[str], **limits: Any) -> tuple[list[int], dict[str, Any]]:
    judged = Quality(QualityConfig(**{**OFF, **limits}), folder)
    for i, document in enumerate(documents):
        judged.add(document, f"a.jsonl:{i + 1}")
    verdicts = judged.finish().tolist()
    assert list(folder.iterdir()) == []
    return verdicts, json.loads(json.dumps(judged.report()))


def words(seed: int, count: int = 200) -> list[str]:
    generator = random.Random(seed)
    return [f"w{generator.randrange(100_000)}" for _ in range(count)]


def edited(original: list[str], edits: int, seed: int) -> list[str]:
    """Some words replaced."""
    generator = random.Random(seed)
    copy = list(original)
    for at in generator.sample(range(len(copy)), edits):
        copy[at] = f"x{generator.randrange(10**9)}"
    return copy


@lru_cache(1000)
def pieces(text: str) -> set[tuple[str, ...]]:
    split = re.findall(r"\w+", text.casefold())
    return {tuple(split[i : i + 5]) for i in range(len(split) - 4)}


def jaccard(one: str, other: str) -> float:
    """Exact, of five-word pieces; 0 without any."""
    shared = len(pieces(one) & pieces(other))
    return shared / max(1, len(pieces(one)) + len(pieces(other)) - shared)


# ---- exact duplicates


@given(st.lists(st.text(max_size=3), max_size=30))
def test_exact_duplicates_are_those_a_set_finds(documents: list[str]) -> None:
    seen: set[str] = set()
    expected = []
    for document in documents:
        expected.append(EXACT if document in seen else KEPT)
        seen.add(document)
    with TemporaryDirectory() as folder:
        assert judge(Path(folder), documents, exact=True)[0] == expected


def test_an_exact_duplicate_goes_before_it_is_looked_at_as_a_near_one(tmp_path: Path) -> None:
    text = " ".join(words(0))
    assert judge(tmp_path, [text, text, " ".join(edited(words(0), 2, 1)), text], exact=True, near=0.8)[0] == [
        0,
        1,
        2,
        1,
    ]
    assert judge(tmp_path, [text, text, "a b", "a b"], near=1.0)[0] == [KEPT, NEAR, KEPT, KEPT]


@pytest.mark.parametrize("run", [1, 2, 7, 50, 99, 100, 101])
def test_groups_are_the_rows_with_equal_keys(monkeypatch: pytest.MonkeyPatch, run: int) -> None:
    monkeypatch.setattr(quality, "RUN", run)
    generator = np.random.default_rng(run)
    keys, live = generator.integers(30, size=100).astype(np.uint64), generator.random(100) < 0.8
    found = {
        int(row): int(first)
        for rows, firsts in quality._groups(keys, live)
        for row, first in zip(rows, firsts, strict=True)
    }
    rows = np.flatnonzero(live).tolist()
    assert found == {row: next(other for other in rows if keys[other] == keys[row]) for row in rows}


# ---- near duplicates


def corpus() -> list[str]:
    """120 originals with four copies each, from hardly to badly edited, shuffled."""
    documents = []
    for seed in range(120):
        original = words(seed, 100 + seed)
        documents.append(" ".join(original))
        documents += [" ".join(edited(original, edits, 7 * seed + edits)) for edits in (1, 3, 8, 25)]
    random.Random(1).shuffle(documents)
    return documents


def greedy(documents: list[str], near: float) -> list[int]:
    """The same rule with exact similarities."""
    kept: list[str] = []
    verdicts = []
    for document in documents:
        verdicts.append(NEAR if any(jaccard(document, other) >= near for other in kept) else KEPT)
        if verdicts[-1] == KEPT:
            kept.append(document)
    return verdicts


@pytest.mark.parametrize("near", [0.5, 0.8, 0.9])
def test_near_duplicates_against_exact_similarities(tmp_path: Path, near: float) -> None:
    """Every verdict agrees but where the similarity is within three standard errors of the threshold."""
    documents = corpus()
    verdicts, _ = judge(tmp_path, documents, near=near)
    error = 3 * (near * (1 - near) / PERMUTATIONS) ** 0.5
    kept = [document for document, verdict in zip(documents, verdicts, strict=True) if verdict == KEPT]
    position = {document: i for i, document in enumerate(documents)}
    wrong = {KEPT: 0, NEAR: 0}
    for i, (document, verdict) in enumerate(zip(documents, verdicts, strict=True)):
        closest = max((jaccard(document, other) for other in kept if position[other] < i), default=0.0)
        wrong[verdict] += closest >= near + error if verdict == KEPT else closest < near - error
    assert verdicts.count(NEAR) > 100
    assert wrong == {KEPT: 0, NEAR: 0}


@pytest.mark.parametrize(("near", "recall", "precision"), [(0.5, 0.95, 0.95), (0.8, 0.9, 0.93)])
def test_recall_and_precision(tmp_path: Path, near: float, recall: float, precision: float) -> None:
    """Against the same rule with exact similarities: 98 % and 98 % at 0.5, 91 % and 94 % at 0.8.

    Three edits in 100 to 219 words are similarities of 0.73 to 0.87, so that a third of the pairs lies within the
    estimate's error of 0.8; the test above says that nothing else is wrong.
    """
    documents = corpus()
    found, expected = np.array(judge(tmp_path, documents, near=near)[0]), np.array(greedy(documents, near))
    both = np.count_nonzero((found == NEAR) & (expected == NEAR))
    assert both >= recall * np.count_nonzero(expected == NEAR)
    assert both >= precision * np.count_nonzero(found == NEAR)


def test_the_estimate_has_the_error_that_is_stated() -> None:
    """Unbiased, and sqrt(J(1-J)/128) on average: the permutations are as good as independent ones."""
    deviations = []
    for seed in range(300):
        original = words(seed)
        one, other = " ".join(original), " ".join(edited(original, 1 + seed % 30, seed))
        exact = jaccard(one, other)
        first, second = (quality.signature(quality._Words(text).pieces) for text in (one, other))
        estimate = quality.similarities(first, second[None])[0]
        deviations.append((estimate - exact) / (exact * (1 - exact) / PERMUTATIONS) ** 0.5)
    assert abs(np.mean(deviations)) < 0.2
    assert 0.85 < np.std(deviations) < 1.15


@pytest.mark.parametrize("near", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_miss_one_pair_in_a_hundred_at_the_threshold(near: float) -> None:
    count, rows = quality.bands(near)
    assert count * rows <= PERMUTATIONS
    assert (1 - near**rows) ** count <= quality.MISSED
    longer = PERMUTATIONS // (rows + 1)
    assert not longer or (1 - near ** (rows + 1)) ** longer > quality.MISSED


def test_bands_for_usual_thresholds() -> None:
    assert [quality.bands(near) for near in (0.0001, 0.8, 1.0)] == [(128, 1), (21, 6), (1, 128)]


def test_the_estimated_similarity_counts_from_the_threshold_on(tmp_path: Path) -> None:
    documents = [" ".join(words(0)), " ".join(edited(words(0), 4, 0))]
    first, second = (quality.signature(quality._Words(text).pieces) for text in documents)
    at = float(quality.similarities(first, second[None])[0])
    assert 0.7 < at < 0.95
    assert judge(tmp_path, documents, near=at)[0] == [KEPT, NEAR]
    assert judge(tmp_path, documents, near=at + 1e-9)[0] == [KEPT, KEPT]


def test_a_chain_loses_only_what_has_a_kept_neighbour(tmp_path: Path) -> None:
    """Windows of one text, each like its neighbours and less like the others."""
    text = words(0, 1000)
    chain = [" ".join(text[at : at + 400]) for at in range(0, 401, 40)]
    assert all(jaccard(one, other) > 0.8 for one, other in pairwise(chain))
    assert all(jaccard(one, other) < 0.7 for one, other in zip(chain, chain[2:], strict=False))
    assert judge(tmp_path, chain, near=0.75)[0] == [KEPT, NEAR] * 5 + [KEPT]


def test_a_document_that_is_removed_takes_no_other_with_it(tmp_path: Path) -> None:
    repetitive = ("the same line of words again\n" * 50) + " ".join(words(1, 10))
    assert judge(tmp_path, [repetitive, repetitive], near=0.8, exact=True, repetition=0.5)[0] == [REPETITIVE] * 2


def test_case_and_punctuation_do_not_count_and_scripts_do(tmp_path: Path) -> None:
    documents = [
        "Ein Fuß geht über die STRASSE und wieder heim.",
        "ein fuss geht: ÜBER die Straße, und wieder heim",
        "один два три четыре пять шесть",
        "одна две три четыре пять шесть",
        "\N{GRINNING FACE} ! ?",
        "\N{GRINNING FACE} ! ?",
        "four words are few",
        "four words are few",
        "",
        "",
    ]
    assert judge(tmp_path, documents, near=0.8)[0] == [KEPT, NEAR] + [KEPT] * 8


def test_a_full_bucket_does_not_take_quadratic_time(tmp_path: Path) -> None:
    """5,000 documents that differ in a word, then 5,000 that agree in half of their words only and are kept."""
    original = words(0)
    alike = [" ".join(edited(original, 1, seed)) for seed in range(5000)]
    start = time.process_time()
    verdicts, report = judge(tmp_path, alike, exact=True, near=0.8)
    assert verdicts == [KEPT] + [NEAR] * 4999
    half = [" ".join(original + words(seed + 1)) for seed in range(5000)]
    assert judge(tmp_path, half, near=0.6)[0].count(KEPT) > 4900
    assert time.process_time() - start < 60
    assert report["near duplicate"]["documents"] == 4999


# ---- documents by themselves


def test_repeated_lines() -> None:
    assert quality.repeated_lines("ab\n  ab\n\n\ncdef\nab ") == 4 / 10
    assert quality.repeated_lines("") == quality.repeated_lines(" \n\n") == 0


def test_repeated_pieces_count_a_character_once() -> None:
    assert quality._Words("a b c d e f a b c d e").repeated() == 5 / 11
    assert quality._Words("a b c d e f a b c d e f").repeated() == 6 / 12
    assert quality._Words("aa bb cc dd ee " * 2 + "x").repeated() == 10 / 21
    assert quality._Words("a b c d a b c d").repeated() == 0
    assert quality._Words("a a a a").repeated() == quality._Words("").repeated() == 0


def test_symbols_of_all_scripts() -> None:
    assert quality.symbols("ab_1 ?\n-") == 3 / 8
    assert quality.symbols("हिन्दी में लिखा है") == 0  # vowel signs are no symbols
    assert quality.symbols("e\u0301") == quality.symbols("日本語　です") == quality.symbols("") == 0
    assert quality.symbols("→→") == 1


@pytest.mark.parametrize(
    ("document", "limit", "at", "beyond", "reason"),
    [
        ("ab\nab\ncdef\ngh", "repetition", 0.2, 0.19, REPETITIVE),
        ("abcdefg???", "symbols", 0.3, 0.29, SYMBOLS),
        ("  äbc ", "min_chars", 3, 4, SHORT),
    ],
)
def test_at_the_limit_a_document_stays(
    tmp_path: Path, document: str, limit: str, at: float, beyond: float, reason: int
) -> None:
    assert judge(tmp_path, [document], **{limit: at})[0] == [KEPT]
    assert judge(tmp_path, [document], **{limit: beyond})[0] == [reason]


# ---- the whole


def test_report(tmp_path: Path) -> None:
    text, like = "ü" + " ".join(words(0)), " ".join(edited(words(0), 2, 0))
    documents = ["x", text, text, like, "§§§§§§", "word " * 50, "y", "z", "v"]
    verdicts, report = judge(tmp_path, documents, exact=True, near=0.5, repetition=0.5, symbols=0.5, min_chars=2)
    assert verdicts == [SHORT, KEPT, EXACT, NEAR, SYMBOLS, REPETITIVE, SHORT, SHORT, SHORT]
    assert list(report) == list(REASONS)
    assert [row["documents"] for row in report.values()] == [1, 1, 1, 1, 1, 4]
    size = len(text.encode())
    assert [row["bytes"] for row in report.values()] == [size, size, len(like), 250, 12, 4]
    assert report["kept"]["examples"] == []
    (copy,) = report["exact duplicate"]["examples"]
    assert copy == {"where": "a.jsonl:3", "text": text[:120], "of": "a.jsonl:2", "value": 1.0}
    (near,) = report["near duplicate"]["examples"]
    assert (near["where"], near["text"], near["of"]) == ("a.jsonl:4", like[:120], "a.jsonl:2")
    assert abs(near["value"] - jaccard(text, like)) < 0.1
    assert report["symbols"]["examples"] == [{"where": "a.jsonl:5", "text": "§§§§§§", "of": None, "value": 1.0}]
    assert report["repetitive"]["examples"][0]["value"] == 49 / 50  # overlapping pieces
    assert [(row["where"], row["value"]) for row in report["short"]["examples"]] == [
        ("a.jsonl:1", 1),
        ("a.jsonl:7", 1),
        ("a.jsonl:8", 1),
    ]


def test_the_same_documents_have_the_same_verdicts_in_any_number_of_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = corpus()[:200] + corpus()[:20]
    first, again = (judge(tmp_path, documents, exact=True, near=0.8) for _ in range(2))
    monkeypatch.setattr(quality, "RUN", 3 * PERMUTATIONS)
    monkeypatch.setattr(quality, "_STRIDE", 7)
    monkeypatch.setattr(quality, "_SLICE", 50)
    assert first == again == judge(tmp_path, documents, exact=True, near=0.8)


@pytest.mark.parametrize("limits", [{"exact": True}, {"near": 0.8}, {"repetition": 0.5}, {"symbols": 0.5}])
def test_no_documents_and_empty_ones(tmp_path: Path, limits: dict[str, Any]) -> None:
    assert judge(tmp_path, [], **limits)[0] == []
    assert judge(tmp_path, ["", " "], **limits)[0] == [KEPT, KEPT]
    assert judge(tmp_path, ["", " \n"], **limits, min_chars=1)[0] == [SHORT, SHORT]


def test_with_every_limit_off_there_is_nothing_to_construct(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="removes nothing"):
        Quality(QualityConfig(**OFF), tmp_path)


def test_the_report_comes_after_finish_which_comes_once(tmp_path: Path) -> None:
    judged = Quality(QualityConfig(**{**OFF, "min_chars": 1}), tmp_path)
    with pytest.raises(ValueError, match="after finish"):
        judged.report()
    judged.finish()
    with pytest.raises(ValueError, match="before"):
        judged.finish()
