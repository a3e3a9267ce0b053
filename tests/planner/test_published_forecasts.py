"""The constants of forecasts, and how often forecasts held the end, are what the recorded curves give."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from support import script

from lumina.planner.prior import SHIPPED

FOLDER = Path(__file__).parents[2] / "benchmarks" / "planner"


@pytest.fixture(scope="module")
def forecasts() -> ModuleType:
    return script(FOLDER / "forecasts.py")


def test_the_constants_are_those_of_the_runs_that_they_name(forecasts: ModuleType) -> None:
    found = forecasts.constants(forecasts.recorded("constants"))
    assert found.exponents == pytest.approx(SHIPPED.exponents, abs=1e-3)
    for name in ("gain", "gain_spread", "drift", "repeat", "wobble", "runs"):
        assert getattr(found, name) == pytest.approx(getattr(SHIPPED, name), rel=0.01)


def test_the_published_coverage_is_that_of_the_recorded_curves(forecasts: ModuleType) -> None:
    """Of runs that have no part in the constants, of every kind and schedule."""
    runs = forecasts.recorded("coverage")
    assert {run["kind"] for run in runs} == {"dense", "moe", "mod", "hybrid"}
    assert {run["schedule"] for run in runs} == {"wsd", "cosine"}
    rows = list(forecasts.replay(runs))
    page = (FOLDER / "forecasts.md").read_text(encoding="utf-8")
    assert all(line in page for line in forecasts.as_lines(rows))
    assert forecasts.said_of_deviations(runs) in page
    inside = sum(row.inside for row in rows) / len(rows)
    assert 0.7 < inside < 0.98  # not so often that the interval is nothing said
