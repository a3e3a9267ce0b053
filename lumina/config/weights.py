"""`path:weight`, as `data.train` takes it."""

from __future__ import annotations

import os
import re

_WEIGHT = re.compile(r"(.+):(\d+\.?\d*|\.\d+)")


def split_weight(spec: str) -> tuple[str, float | None]:
    """`("a.txt", 0.7)` of `a.txt:0.7`; the weight is None if there is none, or if there is a file of that very name."""
    match = _WEIGHT.fullmatch(spec)
    if match is None or os.path.exists(spec):
        return spec, None
    return match[1], float(match[2])
