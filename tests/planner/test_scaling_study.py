"""What the scaling study says of the planner: recomputed from what it recorded."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from lumina.planner.fit import fit
from lumina.planner.forecast import EARLY, HALF_WIDTH
from lumina.planner.points import read_points

STUDY = Path(__file__).parents[2] / "benchmarks" / "planner" / "study"


def recorded() -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads((STUDY / "runs.json").read_text())
    return runs


def costs() -> list[tuple[float, float]]:
    """What was forecast that an early decay would cost, within 10 steps of where one began; and what it did."""
    found = []
    for run in recorded():
        for arm in run["now"]:
            told = [one for one in run["forecasts"] if one.get("decay_now") and abs(one["step"] - arm["step"]) <= 10]
            found += [(one["decay_now"]["cost"]["mid"], arm["later"]) for one in told]
    return found


def test_what_an_early_decay_costs_is_as_uncertain_as_it_was_wrong() -> None:
    found = costs()
    assert len(found) == 8
    errors = [(truth - said) / said for said, truth in found]
    assert math.sqrt(statistics.mean(error**2 for error in errors)) == pytest.approx(EARLY, abs=0.02)
    assert all(abs(error) < HALF_WIDTH * EARLY for error in errors)
    assert all(2.1 < said / truth < 3.0 for said, truth in found)


def test_how_many_forecasts_held_the_final_loss() -> None:
    told = [
        (one["heldout"], run["ends"][-1][1]) for run in recorded() for one in run["forecasts"] if one.get("heldout")
    ]
    inside = sum(interval["low"] <= final <= interval["high"] for interval, final in told)
    assert f"{len(told)} forecasts of the final held-out loss {inside} lay" in (STUDY / "README.md").read_text()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_prediction_is_what_the_law_of_the_points_says(kind: str) -> None:
    law = fit(read_points(STUDY / f"points-{kind}.csv"), 100, 0, "points", "active")
    told = json.loads((STUDY / "prediction.json").read_text())[kind]
    assert law.loss(told["params"], told["tokens"]) == pytest.approx(told["loss"], abs=1e-4)
    ends = [tuple(end) for run in recorded() if run["kind"] == kind for end in run["ends"]]
    assert sorted(ends) == sorted((point.tokens, point.loss) for point in read_points(STUDY / f"points-{kind}.csv"))


def test_the_larger_run_came_to_what_was_predicted_of_it() -> None:
    told, came = (json.loads((STUDY / f"{name}.json").read_text()) for name in ("prediction", "larger-dense"))
    low, high = told["dense"]["80%"]
    assert (came["params"], came["tokens"]) == (told["dense"]["params"], told["dense"]["tokens"])
    assert low < came["loss"] < high
    assert came["loss"] == pytest.approx(told["dense"]["loss"], rel=0.01)
