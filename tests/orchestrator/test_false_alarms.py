"""What benchmarks/orchestrator/calibration.md says is what the detectors do on the recorded runs."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import script
from watched import Watch, replay

FOLDER = Path(__file__).parents[2] / "benchmarks" / "orchestrator"
FIXTURE = Path(__file__).with_name("healthy.json.xz")


@pytest.fixture(scope="module")
def calibrate() -> ModuleType:
    return script(FOLDER / "calibrate.py")


@pytest.fixture(scope="module")
def runs(calibrate: ModuleType) -> Any:
    return calibrate.recorded()


def page(heading: str) -> list[list[str]]:
    """The rows of a table of the page, by the first cell of its head."""
    text = (FOLDER / "calibration.md").read_text(encoding="utf-8")
    table = text.split(f"| {heading} |")[1].split("\n\n")[0]
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in table.splitlines() if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= {"-"}]


def test_the_recorded_runs_are_many_and_different(runs: Any) -> None:
    assert FIXTURE.stat().st_size < 1_000_000
    assert len(runs) >= 20
    assert {run.name.split()[0] for run in runs} == {"dense", "moe", "mod", "hybrid"}
    assert len({run.facts.batch_tokens for run in runs}) >= 4
    assert sum(len(run.phases) > 1 for run in runs) >= 2
    assert sum(len(run.steps) for run in runs) >= 20_000


def test_false_alarms_are_those_of_the_page_and_within_the_budget(calibrate: ModuleType, runs: Any) -> None:
    found = [[name, str(alarms), f"{armed:,}"] for name, alarms, armed in calibrate.false_alarms(runs)]
    assert found == [row[:3] for row in page("rule")]
    detectors = {one.name for one in calibrate.DETECTORS}
    for name, alarms, armed in calibrate.false_alarms(runs):
        assert name not in detectors or alarms <= armed / 10_000


def test_delays_are_those_of_the_page(calibrate: ModuleType, runs: Any) -> None:
    """Of every fault, in a run of each kind that it is for: the page's are of all runs."""
    rows = page("fault")
    assert [row[0] for row in rows] == [fault for fault, *_ in calibrate.FAULTS]
    some = [next(run for run in runs if run.name == f"{kind} wsd") for kind in ("dense", "hybrid")]
    for row, (_, rules, kinds, put) in zip(rows, calibrate.FAULTS, strict=True):
        assert int(row[2]) == len(calibrate.meant(runs, kinds))
        for run in calibrate.meant(some, kinds):
            delay = calibrate.delay(run, rules, put)
            assert delay is not None, (run.name, rules)
            assert delay <= int(row[5])


def test_act_does_nothing_to_any_recorded_run(runs: Any) -> None:
    for run in runs:
        watch = Watch(facts=run.facts, points=(1,), answer=replay(1, 2.0, 2.0))
        for seen in run.steps:
            watch.step(seen, run.looks.get(seen.step))
            if event := run.forecasts.get(seen.step):
                watch.orchestrator.forecast(event)
        assert watch.door.did == [], run.name
        assert not [event for event in watch.told if event["t"] == "incident"]
