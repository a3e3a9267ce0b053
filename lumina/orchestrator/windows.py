"""What signals remember beside baselines: the level of the loss, the batches' contents, the load of experts.

Each is fed one step after another, holds so much and no more, and goes to plain values and back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lumina.orchestrator.robust import line, median

SMOOTH = 25  # steps whose median is the smoothed loss: 12 outliers among them move it little
TREND = 50  # steps whose trend says whether a loss returns
SEVERE = 0.3  # nats above the best
SEVERE_SIGMA = 6.0  # standard deviations of a smoothed loss above the best
BRIEF = 9  # steps whose median is held against that of a uniform guess
LEARNED = 0.3  # nats below a uniform guess, after which a loss above it is a fault
MEDIAN = 1.2533  # standard error of a median of normal noise over that of the mean: sqrt(pi / 2)

JUMPS = 2.0  # times from one step to the next: schedules are smoother, but for the warm-up and the end of a decay

CONTENTS = 256  # batches whose contents are remembered

EXPECTED = 1000  # assignments that each expert must expect before its load says something
LOAD_STEPS = 100  # at least, of a window of load
BLOCK = 10  # steps whose load together is held against noise
BLOCKS = 10
STARVED = 0.1  # of the mean load
EVEN = 0.85  # entropy of the load over ln E: healthy ones are above 0.95
BALANCED = 0.95  # from which on a layer counts as one that was even: in the beginning of a run few get most
FEW = 0.7  # the same of a block, in which few get nearly all: two of four experts alone make 0.5
FULL = 0.95  # of all tokens that one expert takes in a block

KNOWN = 100  # values of which a level is known that does not follow what leaves it
LATEST = 20  # values that are held against it
LEAVES = 10.0  # times the level: what is further away is no part of it


@dataclass
class Level:
    """Where the loss is, against the best it was since the plan last changed it."""

    recent: list[float] = field(default_factory=list)  # finite losses, oldest first
    best: float | None = None  # smoothed
    smoothed: float | None = None
    margin: float | None = None  # above the best, from which on it is severe; None while the noise is not known
    above: int = 0  # steps in a row that it was
    learned: bool = False
    unlearned: int = 0  # steps in a row above a uniform guess, after it was below

    def take(self, loss: float, sigma: float, uniform: float, rising: bool = False) -> None:
        """`sigma`: standard deviation of one loss, nats. `uniform`: what guessing costs, nats.

        `rising`: it may rise by plan, as the learning rate does again where it had decayed, or the difficulty of the
        data: the best of then is none to hold to.
        """
        if math.isfinite(loss):
            self.recent = [*self.recent[1 - TREND :], loss]
        brief = median(self.recent[-BRIEF:]) if len(self.recent) >= BRIEF else None
        if brief is not None:
            self.learned = self.learned or brief < uniform - LEARNED
            self.unlearned = self.unlearned + 1 if self.learned and brief > uniform else 0
        if len(self.recent) < SMOOTH:
            return
        self.smoothed = median(self.recent[-SMOOTH:])
        if rising:
            self.best, self.above = None, 0
            return
        self.best = self.smoothed if self.best is None else min(self.best, self.smoothed)
        # What leaves would widen what it is judged by.
        if sigma > 0 and (self.margin is None or self.smoothed <= self.best + SEVERE):
            self.margin = max(SEVERE, SEVERE_SIGMA * MEDIAN * sigma / math.sqrt(SMOOTH))
        self.above = self.above + 1 if self.margin and self.smoothed > self.best + self.margin else 0

    @property
    def slope(self) -> float | None:
        """Of the last `TREND` losses, nats a step."""
        return line(self.recent)[0] if len(self.recent) == TREND else None

    def forget(self) -> None:
        """What comes is planned to be otherwise; that something was learned stays."""
        learned = self.learned
        self.__init__(learned=learned)  # type: ignore[misc]


@dataclass
class Pace:
    """By how much the learning rate jumped where no change was planned, and for how long.

    Only jumps count, from one step to the next: what a schedule does slowly it does on purpose.
    """

    last: float = 0.0  # rate; 0: none is known
    times: float = 1.0  # what it was before all jumps that still hold
    steps: int = 0  # since the first of them

    def take(self, lr: float, stable: bool) -> None:
        """`stable`: the schedule neither warms up nor decays."""
        if not stable or lr <= 0:
            self.forget()
            return
        jump = lr / self.last if self.last else 1.0
        if max(jump, 1 / jump) > JUMPS:
            self.times *= jump
        off = max(self.times, 1 / self.times) > JUMPS
        self.times, self.steps = (self.times, self.steps + 1) if off else (1.0, 0)
        self.last = lr

    def forget(self) -> None:
        """What comes is planned to be otherwise."""
        self.last, self.times, self.steps = 0.0, 1.0, 0


@dataclass
class Usual:
    """A level that does not follow what leaves it, however long that stays away: it can be told again."""

    kept: list[float] = field(default_factory=list)
    latest: list[float] = field(default_factory=list)

    def take(self, value: float | None) -> None:
        if value is None or not math.isfinite(value) or value <= 0:
            return
        self.latest.append(value)
        if len(self.latest) > LATEST:
            old = self.latest.pop(0)
            level = self.level
            if level is None or max(old / level, level / old) <= LEAVES:
                self.kept = [*self.kept[1 - KNOWN :], old]

    @property
    def level(self) -> float | None:
        """The median of what is known; None while that is little."""
        return median(self.kept) if len(self.kept) >= KNOWN // 2 else None

    def times(self, steps: int = LATEST) -> float | None:
        """The median of the last values over the level; None while one of them is not known."""
        level = self.level
        return median(self.latest[-steps:]) / level if level and len(self.latest) == LATEST else None

    def forget(self) -> None:
        """What comes is planned to be otherwise."""
        self.kept, self.latest = [], []


@dataclass
class Contents:
    """Whether batches come again: the period at which the last ones did, and how many in a row."""

    hashes: list[str] = field(default_factory=list)  # newest last
    period: int = 0
    again: int = 0

    def take(self, content: str) -> None:
        if not content:  # the data has it twice
            self.again = self.period = 0
            return
        back = next((n for n in range(1, len(self.hashes) + 1) if self.hashes[-n] == content), 0)
        self.again = self.again + 1 if back and back == self.period else int(back > 0)
        self.period = back
        self.hashes = [*self.hashes[1 - CONTENTS :], content]

    @property
    def distinct(self) -> int:
        """How many are remembered; no more than the period if none came before those that repeat."""
        return len(set(self.hashes))


@dataclass
class Loads:
    """Load of each expert over the mean, of each layer, over windows long enough that noise is small."""

    layers: list[list[float]] = field(default_factory=list)  # sums over the window that is being filled
    steps: int = 0  # of it
    block: list[list[float]] = field(default_factory=list)  # sums over the block that is being filled
    blocked: int = 0  # steps of it
    recent: list[list[float]] = field(default_factory=list)  # means over the last whole block
    uneven: list[float] = field(default_factory=list)  # largest load of any layer over the mean less 1, of each block
    last: list[list[float]] = field(default_factory=list)  # means over the last whole window
    length: int = 0  # its steps
    low: list[list[int]] = field(default_factory=list)  # steps that each expert was starved up to its end
    narrow: list[int] = field(default_factory=list)  # steps that the load of each layer had little entropy
    even: list[bool] = field(default_factory=list)  # whether the load of each layer was even once, over a window
    few: list[int] = field(
        default_factory=list
    )  # steps in a row, by blocks, in which few got nearly all, of each layer
    silent: list[list[int]] = field(default_factory=list)  # steps in a row in which each expert got nothing at all
    had: list[list[float]] = field(default_factory=list)  # load over the last window that each did not end in silence
    whole: bool = False  # whether a window ended with this step

    def take(self, load: Sequence[Sequence[float]], assignments: float, top_k: int) -> None:
        """`assignments` of a step, in each layer; a token takes `top_k` experts."""
        self.whole = False
        if not load:
            return
        if [len(layer) for layer in load] != [len(layer) for layer in self.layers]:
            low, silent = ([[0] * len(layer) for layer in load] for _ in range(2))
            sums = {"layers": _zeros(load), "block": _zeros(load), "had": _zeros(load)}
            each = {"narrow": [0] * len(load), "few": [0] * len(load), "even": [False] * len(load)}
            self.__init__(low=low, silent=silent, **sums, **each)  # type: ignore[misc]
        if all(math.isfinite(value) for layer in load for value in layer):
            self.layers, self.block = _sums(self.layers, load), _sums(self.block, load)
            self.steps, self.blocked = self.steps + 1, self.blocked + 1
            self.silent = [
                [0 if value else steps + 1 for value, steps in zip(layer, silent, strict=True)]
                for layer, silent in zip(load, self.silent, strict=True)
            ]
        if self.blocked == BLOCK:
            self.uneven = [*self.uneven[1 - BLOCKS :], max(max(layer) for layer in self.block) / BLOCK - 1]
            self.few = [
                steps + BLOCK if _crowded(layer, top_k) else 0
                for steps, layer in zip(self.few, self.block, strict=True)
            ]
            self.recent = [[value / BLOCK for value in layer] for layer in self.block]
            self.block, self.blocked = _zeros(load), 0
        most = max(len(layer) for layer in load)
        if self.steps >= max(LOAD_STEPS, math.ceil(EXPECTED * most / assignments)):
            self._close()

    def _close(self) -> None:
        self.last = [[value / self.steps for value in layer] for layer in self.layers]
        self.low = [
            [low + self.steps if load < STARVED else 0 for low, load in zip(lows, layer, strict=True)]
            for lows, layer in zip(self.low, self.last, strict=True)
        ]
        self.narrow = [
            steps + self.steps if entropy(layer) < EVEN else 0
            for steps, layer in zip(self.narrow, self.last, strict=True)
        ]
        self.even = [once or entropy(layer) >= BALANCED for once, layer in zip(self.even, self.last, strict=True)]
        self.had = [
            [had if 2 * silent > self.steps else load for load, had, silent in zip(*layers, strict=True)]
            for layers in zip(self.last, self.had, self.silent, strict=True)
        ]
        self.length, self.steps, self.whole = self.steps, 0, True
        self.layers = _zeros(self.layers)


def _crowded(layer: Sequence[float], top_k: int) -> bool:
    """Whether few experts get nearly all of a load, or one gets nearly every token, of twice as many."""
    share = max(layer) * top_k / sum(layer)  # of the tokens
    return entropy(layer) < FEW or (share > FULL and len(layer) >= 2 * top_k)


def _zeros(like: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[0.0] * len(layer) for layer in like]


def _sums(sums: list[list[float]], load: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[a + b for a, b in zip(*layers, strict=True)] for layers in zip(sums, load, strict=True)]


def entropy(load: Sequence[float]) -> float:
    """Of the load, 1 if it is even."""
    total = sum(load)
    shares = [value / total for value in load if value > 0]
    return -sum(share * math.log(share) for share in shares) / math.log(len(load)) if len(load) > 1 else 1.0


def floor(experts: int, assignments: float) -> float:
    """Largest load over the mean less 1, of balanced random routing (Poisson, extreme of normals)."""
    return math.sqrt(2 * math.log(experts) * experts / assignments)


def pack(value: Any) -> dict[str, Any]:
    """As plain values."""
    return asdict(value)
