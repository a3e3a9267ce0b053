"""YAML that reads numbers as numbers, and what it writes as what was written."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.config.yaml12 import dump_value, load, load_value
from lumina.errors import UserError

SCALARS = [
    ("3e-4", 3e-4),
    ("1e6", 1e6),
    ("-1.5E+3", -1500.0),
    (".5", 0.5),
    ("5.", 5.0),
    ("010", 10),
    ("0x1F", 31),
    ("0o17", 15),
    ("-7", -7),
    ("no", "no"),
    ("on", "on"),
    ("true", True),
    ("False", False),
    ("null", None),
    ("~", None),
    ("1_000", "1_000"),  # a text for YAML; `units` reads it as a thousand
    ("12:30", "12:30"),
    ("2024-01-02", "2024-01-02"),
    ("5%", "5%"),
    (".inf", math.inf),
    ("-.INF", -math.inf),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    for read in (load(f"key: {text}")["key"], load_value(text)):
        assert read == value
        assert type(read) is type(value)


def test_nan() -> None:
    assert math.isnan(load(".NaN"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("*.txt", "*.txt"),
        ("notes #2.txt", "notes #2.txt"),
        ("a: b", "a: b"),
        ("@home", "@home"),
        ("", ""),
        (" 3 ", 3),
        ("'3'", "3"),
        ("[a.txt, 'b c/*.md']", ["a.txt", "b c/*.md"]),
        ("{experts: 4}", {"experts": 4}),
    ],
)
def test_a_setting_is_one_plain_scalar_unless_it_begins_as_something_else(text: str, value: Any) -> None:
    assert load_value(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' is given twice"),
        ("train:\n  lr: 1\n  lr: 1\n", "line 3: the key 'lr' is given twice"),
        ("? [a, b]\n: 3\n", "line 1: a key must be a plain name"),
        ("a:\n\tb: 1\n", "line 2: found character '\\t'"),
        ("a: [1, 2\n", "line 2: expected ',' or ']'"),
        ("a: !!python/object:os.system x\n", "line 1: could not determine a constructor"),
        ("a: !!int x\n", "invalid literal"),
        ("a: \x00\n", "unacceptable character #x0000: special characters are not allowed"),
    ],
)
def test_bad_yaml_is_a_user_error_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(text)
    assert error.value.message.startswith(message)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(plain | st.lists(plain, max_size=4))
def test_what_is_written_on_one_line_reads_back(value: Any) -> None:
    text = dump_value(value)
    assert len(text.splitlines()) == 1
    read = load(f"key: {text}  # comment")["key"]
    assert read == value
    assert type(read) is type(value)


def test_a_value_that_yaml_does_not_know_is_shown_as_text() -> None:
    assert dump_value(1 + 2j) == "(1+2j)"
