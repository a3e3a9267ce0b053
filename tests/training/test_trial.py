"""A run on trial: what is measured is what a run does, and nothing is left behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support import write_text

from lumina.errors import UserError
from lumina.planner.laws import Interval
from lumina.training import trial


def configuration(folder: Path, *lines: str) -> Path:
    text = write_text(folder)
    file = folder / "plan.yaml"
    file.write_text("\n".join(["extends: tiny", f"data: {{train: {text}}}", *lines]) + "\n")
    return file


def test_every_part_of_a_run_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    file = configuration(tmp_path, "train: {steps: 10, compile: off}", "orchestrator: {probe_every: 1}")
    before = {path.name for path in tmp_path.iterdir()}
    told: list[str] = []
    figures = trial.measure(file, lambda what, done: told.append(what))
    assert figures.keys() == {
        "step", "step_low", "step_high", "start", "compiled", "evaluation", "probe", "save", "end", "memory",
        "matmul_fp32",
    }  # fmt: skip
    assert all(value > 0 for name, value in figures.items() if name != "compiled")
    assert Interval(*(figures[name] for name in ("step_low", "step", "step_high")))
    assert figures["step_low"] <= figures["step"] <= figures["step_high"]
    assert figures["compiled"] == 0
    assert len(told) == trial.STAGES
    assert {path.name for path in tmp_path.iterdir()} == before


def test_what_a_run_takes_lies_in_the_interval_of_its_measurement() -> None:
    """All five that were measured (a fit: the drift is theirs); steps that are slow together tell less than others."""
    log = Path(__file__).parents[2] / "benchmarks/planner/total_time.jsonl"
    for run in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
        low, mean, high = trial.spread([run["planned_step"]["mid"]] * trial.STEPS)
        factor = run["actual_steps"] / run["planned"]["parts"]["steps"]
        assert low < factor * mean < high
        assert low > 0.85 * mean
    apart, together = trial.spread([1.0, 2.0] * 10), trial.spread([1.0] * 10 + [2.0] * 10)
    assert together[1] == apart[1] == 1.5
    assert together[2] - together[0] > 2 * (apart[2] - apart[0])
    assert together[0] > 0


def test_what_is_wrong_is_said_in_the_last_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("extends: tiny\ndata: {train: nowhere.txt}\n")
    assert trial.main(str(file)) == 2
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "nowhere.txt" in said["message"]
    assert said["fix"]


def python_that_says(folder: Path, said: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    script = folder / "python"
    script.write_text(f"#!/bin/sh\nprintf '%s\\n' {said}\nexit {code}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_the_other_process_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    python_that_says(tmp_path, """'{"what": "timing steps", "done": 3}' '{"step": 0.5, "start": 2}'""", 0, monkeypatch)
    assert trial.measure_in_process(tmp_path, lambda *progress: told.append(progress)) == {"step": 0.5, "start": 2.0}
    assert told == [("timing steps", 3, trial.STAGES)]
    python_that_says(tmp_path, """'{"message": "no text", "fix": "give some"}'""", 2, monkeypatch)
    with pytest.raises(UserError, match="no text"):
        trial.measure_in_process(tmp_path)
    python_that_says(tmp_path, """'{"what": "timing steps", "done": 3}'""", 9, monkeypatch)
    with pytest.raises(UserError, match="ended with exit code 9"):
        trial.measure_in_process(tmp_path)
