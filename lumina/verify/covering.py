"""Pairwise covering arrays: few rows in which every two levels of two factors meet.

Most faults that a combination shows are of two of its parts (Kuhn, Wallace and Gallo 2004, IEEE TSE 30:418), and pairs
need tens of rows where all combinations are hundreds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

Row = Mapping[str, str]  # a level for every factor
Factors = Mapping[str, Sequence[str]]
Constraints = Mapping[str, Callable[[Row], bool]]  # by name; each holds for every row that can be
Pair = tuple[tuple[str, str], tuple[str, str]]


def cover(factors: Factors, constraints: Constraints) -> list[Row]:
    """Rows that hold every pair which some feasible row holds; those that hold most new ones come first.

    Greedy over all combinations, hence for hundreds of them, not millions; the same rows every time.
    """
    every = list(feasible(factors, constraints))
    missing = {pair for row in every for pair in pairs(row)}
    rows: list[Row] = []
    while missing:
        best = max(every, key=lambda row: len(pairs(row) & missing))
        rows.append(best)
        missing -= pairs(best)
    return rows


def feasible(factors: Factors, constraints: Constraints) -> Iterator[Row]:
    """Every combination that all constraints allow."""
    for levels in itertools.product(*factors.values()):
        row = dict(zip(factors, levels, strict=True))
        if not broken(row, constraints):
            yield row


def broken(row: Row, constraints: Constraints) -> list[str]:
    """The names of the constraints that a row does not keep."""
    return [name for name, holds in constraints.items() if not holds(row)]


def pairs(row: Row) -> set[Pair]:
    """Every two levels that meet in a row."""
    return set(itertools.combinations(row.items(), 2))
