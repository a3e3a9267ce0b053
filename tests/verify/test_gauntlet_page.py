"""docs/gauntlet.md says what the code does, and its examples run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lumina.cli import main
from lumina.verify.gauntlet import arms, policies, running, scoring
from lumina.verify.gauntlet.cases import CASES, CI, FAULTS, LONG, SUITES, TRAPS, TUNED, WITHIN

PAGE = (Path(__file__).parents[2] / "docs/gauntlet.md").read_text(encoding="utf-8")
WORDS = {5: "five", 15: "fifteen", 16: "sixteen", 8: "eight"}


def test_its_numbers_are_the_code() -> None:
    said = [
        f"{arms.STEPS} steps of {arms.TOKENS} tokens, or {LONG['train.steps']:,}",
        f"The {WORDS[len(FAULTS)]} faults and {WORDS[len(TRAPS)]} traps",
        f"more than {scoring.HURTS:g} standard deviations",
        f"at most {scoring.SIGMAS:g} standard deviations above",
        f"| {WITHIN['hard']}, {WITHIN['divergence']}, {WITHIN['drift']} |",
        f"a fixed clip of {policies.CLIP:g} from the fork on, ZClip, OLMo's skip-step at {policies.SIGMAS:g}",
        f"{WORDS[running.HEALTHY_RUNS]} at least for the standard deviation",
        f"{WORDS[len(CI.cases)]} cases",
    ]
    assert [text for text in said if text not in PAGE] == []
    assert "under six more policies" in PAGE
    assert len(policies.POLICIES) == 6
    assert all(f"--subset {name}" in PAGE for name in SUITES if name != TUNED.name)


def test_the_policy_of_ones_own_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    made: dict[str, Any] = {}
    exec(code, made)
    session = SimpleNamespace(course=SimpleNamespace(planned=lambda step: {"clip": 1.0, "lr": step}))
    made["gentle"](session, 1)
    assert session.course.planned(3) == {"clip": 0.5, "lr": 3}


def test_the_lines_of_the_protocol_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    rows = [json.loads(line) for line in block.splitlines()]
    assert {row["case"] for row in rows} <= set(CASES)
    (tmp_path / "results.jsonl").write_text(block)
    assert main(["gauntlet", "--score", str(tmp_path / "results.jsonl")]) == 0
    assert "junk" in capsys.readouterr().out
