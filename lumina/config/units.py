"""Numbers as people write them: `2B` tokens, `2h`, `4k`, `5%`, `3e-4`, `1_000`.

Each parser takes what YAML or Python hands over, mostly a number or a text, and raises ValueError with what
is needed.
"""

from __future__ import annotations

import os
import re
from decimal import Decimal
from typing import Any

_NUMBER = r"(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?"
_DECIMAL = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BINARY = {"": 1, "k": 2**10, "K": 2**10, "M": 2**20}
MOST_TOKENS = 2**63
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "min": 60, "s": 1}


def parse_count(value: Any) -> int:
    """`300`, `1e6`, `2_000`, `1.5k`, `2B` (decimal suffixes) -> a whole number."""
    return _whole(value, _DECIMAL, "a whole number is needed, such as 300, 4k or 2B")


def parse_tokens(value: Any) -> int | str:
    """`chinchilla`, or `2B`: a number of tokens of at least 1."""
    need = "chinchilla or a whole number of at least 1 is needed, such as 500M or 2B"
    if value == "chinchilla":
        return "chinchilla"
    count = _whole(value, _DECIMAL, need)
    if not 1 <= count <= MOST_TOKENS:
        raise ValueError(f"must be at {'least 1' if count < 1 else f'most {MOST_TOKENS}'}")
    return count


def parse_context(value: Any) -> int:
    """As `parse_count`, but `4k` is 4096: context lengths are powers of two in everybody's mouth."""
    return _whole(value, _BINARY, "a whole number is needed, such as 512 or 4k (4096)")


def parse_bytes(value: Any) -> int:
    """`64M`, `1G`: bytes, in powers of two."""
    return _whole(value, _BINARY | {"G": 2**30}, "a number of bytes is needed, such as 64M or 1G")


def parse_auto_count(value: Any) -> int | str:
    """`auto`, or a whole number of at least 1."""
    need = "auto or a whole number of at least 1 is needed"
    if value == "auto":
        return "auto"
    count = _whole(value, _DECIMAL, need)
    if count < 1:
        raise ValueError(need)
    return count


def parse_auto_steps(value: Any) -> int | str:
    """`auto`, or a number of steps, which may be 0."""
    need = "auto or a whole number of steps is needed"
    steps = "auto" if value == "auto" else _whole(value, _DECIMAL, need)
    if isinstance(steps, int) and steps < 0:
        raise ValueError(need)
    return steps


def parse_number(value: Any) -> float:
    """`3e-4`, `0.1`, `5%` -> a float."""
    text = _text(value, "a number is needed, such as 0.1, 3e-4 or 5%", rf"[-+]?{_NUMBER}%?")
    return float(Decimal(text[:-1]) / 100 if text.endswith("%") else Decimal(text))


def parse_span(value: Any) -> float | int:
    """A share of the run (`0.05`, `5%`: below 1) or a number of steps (`1`, `200`, `2k`).

    `100%` and `1.0` are refused: whoever writes them does not mean one step.
    """
    need = "a share of the run below 1 (0.05, 5%) or whole steps (200) is needed"
    if value == 1.0 and isinstance(value, float):
        raise ValueError(need)
    if isinstance(value, float) and value < 1:
        return value
    if isinstance(value, str) and value.strip().endswith("%"):
        share = parse_number(value)
        if share < 1:
            return share
        raise ValueError(need)
    return _whole(value, _DECIMAL, need)


def span(value: float, steps: int) -> int:
    """What `parse_span` reads, in steps of a run of so many."""
    return round(value * steps) if value < 1 else int(value)


def parse_seconds(value: Any) -> float:
    """`90`, `90s`, `10m`, `2h`, `1h30m`, `1.5d` -> seconds."""
    need = "a duration is needed, such as 90s, 2h, 1h30m or 1.5d"
    part = rf"({_NUMBER})\s*(min|[smhd])\s*"
    text = _text(value, need, rf"{_NUMBER}|(?:{part})+")
    parts = re.findall(part, text)
    return float(sum(Decimal(number) * _SECONDS[unit] for number, unit in parts) if parts else Decimal(text))


def parse_betas(value: Any) -> tuple[float, float]:
    """Two numbers."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("two numbers are needed, such as [0.9, 0.95]")
    return parse_number(value[0]), parse_number(value[1])


def parse_path(value: Any) -> str:
    """A name or a path."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ValueError("a path is needed; quote a name that looks like a number")
    return str(value)


def parse_text(value: Any) -> str:
    """A path, or nothing."""
    return "" if value in (None, "") else parse_path(value)


def parse_list(value: Any) -> Any:
    """A list as a tuple; anything else is for the schema to refuse."""
    return tuple(value) if isinstance(value, list) else value


def parse_paths(value: Any) -> tuple[str, ...]:
    """One path, or a list of paths."""
    return tuple(map(parse_path, value if isinstance(value, list | tuple) else [value]))


def _whole(value: Any, suffixes: dict[str, int], need: str) -> int:
    text = _text(value, need, rf"[-+]?{_NUMBER}\s*[{''.join(suffixes)}]?")
    digits = text.rstrip("".join(suffixes))
    number = Decimal(digits.strip()) * suffixes[text[len(digits) :]]
    if number != number.to_integral_value():
        raise ValueError(need)
    return int(number)


def _text(value: Any, need: str, pattern: str) -> str:
    """A number or text as text that matches `pattern`; true, false, lists, inf and nan never do."""
    text = str(value).strip()
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not re.fullmatch(pattern, text):
        raise ValueError(need)
    return text
