"""Text of others on its way to a terminal."""

from __future__ import annotations

CONTROL = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\ufffd")  # all but tab and newline


def visible(text: str) -> str:
    """Text for a terminal: what it would obey, escape sequences above all, becomes U+FFFD."""
    return text.translate(CONTROL)
