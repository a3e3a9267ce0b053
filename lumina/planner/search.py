"""The least of a function of one number."""

from __future__ import annotations

import math
from collections.abc import Callable

SECTIONS = 60  # the interval shrinks to 3e-13 of itself


def least(f: Callable[[float], float], low: float, high: float) -> float:
    """Where `f`, which falls and then rises, is least between `low` and `high`: golden sections."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(SECTIONS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if f(left) < f(right) else (left, high)
    return (low + high) / 2
