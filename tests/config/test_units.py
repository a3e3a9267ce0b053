"""Numbers as people write them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.config import units


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (300, 300),
        (1e6, 10**6),
        ("1e6", 10**6),
        ("1_000", 1000),
        ("2B", 2 * 10**9),
        ("1.005k", 1005),  # 1.005 * 1000 is not 1005 in floating point
        ("8k", 8000),
        ("8 K", 8000),
        ("0.5M", 500_000),
        ("3T", 3 * 10**12),
        (-4, -4),
    ],
)
def test_counts(value: Any, count: int) -> None:
    assert units.parse_count(value) == count


@pytest.mark.parametrize(("value", "count"), [(4096, 4096), ("4k", 4096), ("1.5k", 1536), ("1M", 2**20), ("512", 512)])
def test_context_lengths_are_powers_of_two(value: Any, count: int) -> None:
    assert units.parse_context(value) == count


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3.0), ("3e-4", 3e-4), ("5%", 0.05), (".5", 0.5), ("-1.5", -1.5), ("1_000.5", 1000.5)],
)
def test_numbers(value: Any, number: float) -> None:
    assert units.parse_number(value) == number


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (90, 90),
        ("90", 90),
        ("90s", 90),
        ("10m", 600),
        ("10min", 600),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("1.5d", 129600),
        ("0.1s", 0.1),
    ],
)
def test_durations(value: Any, seconds: float) -> None:
    assert units.parse_seconds(value) == seconds


@pytest.mark.parametrize(
    ("value", "span"), [(0.05, 0.05), ("5%", 0.05), (0, 0), (1, 1), (200, 200), ("2k", 2000), (1e3, 1000)]
)
def test_spans_are_shares_or_steps(value: Any, span: float) -> None:
    parsed = units.parse_span(value)
    assert parsed == span
    assert isinstance(parsed, float) == (0 < span < 1)


BAD: list[tuple[Callable[[Any], Any], list[Any]]] = [
    (
        units.parse_count,
        [1.5, "1.5", "1.0001k", "four", "4kk", "", True, None, [3], float("inf"), float("nan"), "5%"],
    ),
    (units.parse_context, [0.5, "4G", "2B", True]),
    (units.parse_auto_count, [0, -1, "Auto", "all", 1.5, False, None]),
    (units.parse_number, ["", "x", "1e", "1 2", "%", True, None, [1], float("inf"), float("nan")]),
    (units.parse_seconds, ["2 hours", "h", "-1h", "1h-30m", "1:30", "5%", "", True, None, float("inf")]),
    (units.parse_span, [1.0, "100%", "150%", 1.5, "half", True, float("nan")]),
    (units.parse_betas, [0.9, [0.9], [0.9, 0.95, 0.99], ["a", "b"], {"a": 1, "b": 2}, "ab"]),
    (units.parse_path, ["", 3, None, ["a"]]),
    (units.parse_paths, ["", 3, None, ["a", ""], ["a", 3], {"a": 1}]),
]


@pytest.mark.parametrize(("parse", "value"), [(parse, value) for parse, values in BAD for value in values])
def test_what_is_not_understood_is_refused_with_what_is_needed(parse: Callable[[Any], Any], value: Any) -> None:
    with pytest.raises(ValueError, match="needed"):
        parse(value)


def test_paths() -> None:
    assert units.parse_paths("a.txt") == units.parse_paths(Path("a.txt")) == units.parse_paths(["a.txt"]) == ("a.txt",)
    assert units.parse_paths([]) == ()


@given(st.integers(-(10**15), 10**15), st.sampled_from(["", "k", "M", "B", "T"]))
def test_suffixes_scale_exactly(number: int, suffix: str) -> None:
    scale = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[suffix]
    assert units.parse_count(f"{number}{suffix}") == number * scale


@given(st.text(max_size=12) | st.integers() | st.floats() | st.booleans() | st.none() | st.lists(st.integers()))
def test_a_parser_gives_a_value_or_a_value_error(value: Any) -> None:
    for parse, _ in BAD:
        with contextlib.suppress(ValueError):  # any other error is a defect
            parse(value)


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300))
def test_floats_keep_every_bit(number: float) -> None:
    assert units.parse_number(number) == units.parse_number(repr(number)) == number
