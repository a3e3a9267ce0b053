"""Token F1 against cases counted by hand."""

from __future__ import annotations

import pytest

from lumina.bench.answers import token_f1


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Copy a file.", "copy the FILE", 1.0),
        ("copy file", "move directory", 0.0),
        # 2 of 4 words given and 2 of 3 wanted: P = 1/2, R = 2/3.
        ("copy one file now", "copy file metadata", 4 / 7),
        # The second "no" finds no partner: P = 1/2, R = 1.
        ("no no", "no", 2 / 3),
        ("no no", "no no yes", 4 / 5),
        # Order does not count.
        ("dst and src", "src and dst", 1.0),
        # Punctuation is deleted, not turned into a space.
        ("os.path", "ospath", 1.0),
        ("os.path", "os path", 0.0),
        # Articles only where they are whole words.
        ("another theory", "other ory", 0.0),
        ("", "", 1.0),
        ("The!", "an", 1.0),
        ("", "file", 0.0),
        ("file", "a ...", 0.0),
    ],
)
def test_hand_counted(answer: str, reference: str, expected: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(expected)
    assert token_f1(reference, answer) == pytest.approx(expected)
