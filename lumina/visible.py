"""Text of others on its way to a terminal."""

from __future__ import annotations

# All but tab and newline; and halves of surrogate pairs, which stand for bytes of file names and cannot be printed.
CONTROL = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160), *range(0xD800, 0xE000)), "\ufffd")


def visible(text: str) -> str:
    """Text for a terminal: what it would obey, escape sequences above all, becomes U+FFFD."""
    return text.translate(CONTROL)
