"""docs/gauntlet.md says what the code does, and its examples run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lumina.cli import main
from lumina.verify.gauntlet import arms, page, policies, raw, running, scoring
from lumina.verify.gauntlet.cases import CASES, CI, FAULTS, LONG, SUITES, TRAPS, TUNED, WITHIN

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/gauntlet.md").read_text(encoding="utf-8")
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


def test_its_results_are_those_of_the_raw_files() -> None:
    """The table, and what README says of the held-out set."""
    columns = []
    for names in (TUNED_FILES, HELD_OUT_FILES):
        found = scoring.scores(raw.read([ROOT / "benchmarks/gauntlet" / f"{name}.jsonl" for name in names]))
        columns.append((found, next(one for one in scoring.measures(found) if one.mode == "act")))
    told = {
        "rescued, of runs that a fault hurts": [page._share(one.rescued) for _, one in columns],
        "of these by going back at once, as in any run": [_by(found, trial=False) for found, _ in columns],
        "by a trial, which was allowed to cost the run's length": [_by(found, trial=True) for found, _ in columns],
        "damage avoided, median": [f"{one.avoided:.3f}" for _, one in columns],
        "stopped rightly, where nothing mends it": [_of(one.stopped) for _, one in columns],
        "healthy runs acted on": [_of(one.touched) for _, one in columns],
        "traps to the bit the run that nobody watched": [_of(one.exact) for _, one in columns],
        "right diagnoses": [_of(one.right) for _, one in columns],
    }
    rows = [f"| {what} | {' | '.join(cells)} |" for what, cells in told.items()]
    assert [row for row in rows if row not in PAGE] == []
    tuned, held_out = (one for _, one in columns)
    letter = f"| {_of(tuned.by_letter)} | **{_of(held_out.by_letter)}**, all set right |"
    assert letter in PAGE
    assert held_out.restored == (held_out.by_letter[0],) * 2
    for one, cell in ((tuned, "0, 19, 126 at most"), (held_out, "0, 19, 91 at most")):
        assert ", ".join(f"{max(one.delays[heard]):g}" for heard in WITHIN) + " at most" == cell
        assert cell in PAGE
    hurt, rescued = held_out.rescued[1] + held_out.stopped[1], held_out.rescued[0]
    at_once, by_trial = (int(told[what][1].split()[0]) for what in list(told)[1:3])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"of {hurt} runs that a fault hurts it rescued {rescued} ({at_once} by going back" in readme
    assert f"{by_trial} by trials" in readme
    assert f"it acted on none of {held_out.touched[1]} healthy ones, and of 21" in readme
    assert held_out.by_letter[1] - held_out.touched[1] == 21


def test_its_table_of_policies_is_that_of_the_raw_files() -> None:
    rows: dict[str, list[list[str]]] = {}
    for names in (
        (TUNED_FILES[0], "2026-11-27-tuned-1451586"),
        (*HELD_OUT_FILES, "2026-11-27-held-out-others-a4b0f3f"),
    ):
        results = raw.read([ROOT / "benchmarks/gauntlet" / f"{name}.jsonl" for name in names])
        for mode, *cells in page.watchers(scoring.scores(results, alone=True))[1]:
            rows.setdefault(mode, []).append([cell.split(" (")[0] for cell in cells])
        known = scoring.regret(scoring.scores(results))
        assert known is not None
        assert known.best == "rewind"
        assert f"{max(known.against):.2f}" in PAGE
    for mode in ("act", *policies.POLICIES):
        tuned, held_out = rows[mode]
        shown = [f"`{mode}`" if mode == "act" else mode, tuned[0], held_out[0], f"{tuned[1]}, {held_out[1]}", tuned[3]]
        assert f"| {' | '.join(shown)} |" in PAGE


TUNED_FILES = ("2026-11-26-tuned-alone", "2026-11-26-tuned-d4b910c")
HELD_OUT_FILES = ("2026-11-27-held-out-alone", "2026-11-27-held-out-a4b0f3f")


def _of(share: tuple[int, int]) -> str:
    return f"{share[0]} of {share[1]}"


def _by(found: list[scoring.Score], trial: bool) -> str:
    """Runs that are hurt, and rescued: those in which something won a trial, or the others."""
    ends = [
        good
        for one in found
        if one.mode == "act" and one.hurts and not one.case.stops
        for run, good, hurt in zip(one.runs, one.good, one.hurt, strict=True)
        if hurt and bool(run.won) == trial
    ]
    return f"{sum(map(bool, ends))} of {len(ends)}"
