"""What a value should have been by those before it, and by how much it may be off, with outliers that change neither.

The line through the values before is Tukey's resistant line (Exploratory Data Analysis, 1977: the medians of the outer
thirds), the scale the median absolute deviation from it times 1.4826, which is the standard deviation of normal noise.
The judged value and the `DELAY` before it are no part of it: what a fault raises slowly would raise its own baseline.
The line is read at the newest value that it is of, and not beyond: a loss falls less and less, and a line through its
steep beginning soon passes below it.
Values that are not finite are never part, nor those beyond `OUTLIER`, unless `RESTART` of them come one after another:
then the level is another, and the baseline begins anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WINDOW = 100  # values; with 100 and 8 deviations 1 to 1.6 false alarms in 10,000 steps of simulated noise
DELAY = 5
LEAST = 50  # values before anything is judged: the scale of fewer is a guess
OUTLIER = 6.0
RESTART = 64
FLOOR = 0.005  # of the scale, in log units: half a percent is nothing to be alarmed about
MAD = 1.4826


def median(values: Sequence[float]) -> float:
    """The middle one, or the mean of the two in the middle."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def line(values: Sequence[float]) -> tuple[float, float]:
    """Slope a place and value at place 0 of the resistant line; at least 3 values."""
    third = len(values) // 3
    slope = (median(values[-third:]) - median(values[:third])) / (len(values) - third)
    return slope, median([value - slope * place for place, value in enumerate(values)])


def scale(values: Sequence[float], slope: float, start: float) -> float:
    """Robust standard deviation of the values around a line."""
    return MAD * median([abs(value - start - slope * place) for place, value in enumerate(values)])


@dataclass
class Baseline:
    """What values to come are judged by: the logarithms of those accepted, oldest first."""

    accepted: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)  # since one was accepted
    spread: float = 0.0  # robust standard deviation of the last value that was judged; 0 before any was

    def z(self, value: float) -> float | None:
        """Robust deviations of a positive `value` above what the line leads to expect; None while too little is known.

        Infinite for what is not finite.
        """
        if not math.isfinite(value):
            return math.inf
        found = self.expected()
        if found is None or value <= 0:
            return None
        expected, spread = found
        self.spread = spread * math.exp(expected)
        return (math.log(value) - expected) / spread

    def expected(self) -> tuple[float, float] | None:
        """The logarithm of the next value, and its robust standard deviation; None while too little is known."""
        known = self.accepted[:-DELAY]
        if len(known) < LEAST:
            return None
        slope, start = line(known)
        return start + slope * (len(known) - 1), max(FLOOR, scale(known, slope, start))

    def take(self, value: float, z: float | None) -> None:
        """Learns the value, which was judged `z`, unless it is an outlier."""
        if not math.isfinite(value) or value <= 0:
            return
        if z is not None and abs(z) > OUTLIER:
            self.rejected.append(math.log(value))
            if len(self.rejected) >= RESTART:
                self.accepted, self.rejected = self.rejected, []
            return
        self.accepted.append(math.log(value))
        del self.accepted[: -WINDOW - DELAY]
        self.rejected = []

    def forget(self) -> None:
        """Begins anew: what comes is planned to be otherwise."""
        self.accepted, self.rejected, self.spread = [], [], 0.0
