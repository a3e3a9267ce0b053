"""Figures as people read them: counts, durations, sizes."""

from __future__ import annotations

import math


def count(value: float) -> str:
    """1234567 -> 1.23M"""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """4500 -> 1h15m"""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m"


def size(value: float) -> str:
    """Bytes in binary units: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB" if value < 1024 else f"{value / 1024:.1f} TiB"


def perplexity(loss: float) -> str:
    """exp(loss): 11.66; of a loss that ran away three digits, 2.66e+206, or inf, for more were never measured."""
    if not loss < 709:  # beyond it exp overflows; nan stays nan
        return f"{loss if math.isnan(loss) else math.inf}"
    value = math.exp(loss)
    return f"{value:.2f}" if value < 1e6 else f"{value:.2e}"
