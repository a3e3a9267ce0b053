"""Runs that are killed and go on, on a small scale; and that the verifier sees it when going on is broken."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lumina.cli import main
from lumina.run.exit_codes import BUG
from lumina.verify import configurations, moments, report, resume

SABOTAGED = str(Path(__file__).with_name("sabotaged.py"))
SABOTAGES = {
    "loses the optimizer's steps": ["tensor ", "state.json: ", "event "],
    "begins with the last checkpoint but one": ["an attempt began at step "],
}
BROKEN = "dense-adamw-fp32-x1-inline-base"  # not in the array: its first kill is at an exact instant


def test_killed_runs_go_on_to_the_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command = [
        "verify",
        "resume",
        "tiny",
        "--kills",
        "5",
        "--configuration",
        "hybrid-muon-fp32-x2-inline-hybrid_interleaved",
    ]
    assert main([*command, "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["complete"]
    assert not told["mismatches"]
    kills = told["kills"]
    assert len(kills) == 5
    assert [kill["way"] for kill in kills] == ["exact", "exact", "clock", "exact", "exact"]
    assert len({kill["moment"] for kill in kills if kill["way"] == "exact"}) == 4
    assert all(kill["lost"] == kill["trained"] - kill["newest"] for kill in kills)
    (page,), (log,) = (tmp_path / "out").glob("*.md"), (tmp_path / "out").glob("*.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line for line in lines if line["t"] == "kill"] == kills
    assert "5 kills in 1 configuration, 0 mismatches" in page.read_text()
    assert not list(tmp_path.glob("lumina-verify-*"))  # what holds leaves nothing behind


@pytest.mark.parametrize("turn", [16, 17])  # the eleventh and twelfth place, which no first attempt comes to
def test_a_checkpoint_that_is_found_damaged_is_set_aside_in_every_run_and_kills_come_there_too(
    turn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outcome = resume.plan("tiny", 2, 0, BROKEN)
    outcome.jobs[0] = replace(outcome.jobs[0], turn=turn)  # of which each third is by the clock
    resume.verify(outcome, 1, lambda _: None)
    assert not outcome.failed
    first = outcome.kills[0]
    assert (first["moment"], first["newest"]) == (moments.SETTING_ASIDE, configurations.DAMAGED - configurations.EVERY)


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_a_broken_resume_is_a_mismatch(sabotage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outcome = resume.plan("tiny", 1, 5, BROKEN)
    resume.verify(outcome, 1, lambda _: None, worker=(SABOTAGED, sabotage))
    (kill,) = outcome.kills
    assert kill["newest"] > 4  # else there was nothing to break
    (verdict,) = outcome.failed
    seen = zip(verdict["problems"], SABOTAGES[sabotage], strict=True)
    assert all(problem.startswith(expected) for problem, expected in seen), verdict["problems"]
    complaint = "\n".join(report.complaints(outcome))
    assert f"--kills 1 --seed 5 --configuration {BROKEN}" in complaint
    kept = Path(outcome.folder) / BROKEN
    assert str(kept) in complaint
    assert {"whole", "killed-1", "output.txt"} <= {path.name for path in kept.iterdir()}
    shutil.rmtree(outcome.folder)


def test_a_mismatch_ends_with_the_code_of_a_bug(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(outcome: resume.Outcome, *_: object) -> None:
        name = outcome.jobs[0].name
        verdict = {"t": "verdict", "configuration": name, "kills": 1, "rounds": 1, "seconds": 1.0}
        outcome.verdicts.append(verdict | {"problems": ["tensor model/x: 1 of 2 values differ, by 1 at most"]})

    monkeypatch.setattr("lumina.verify.resume.verify", fail)
    assert main(["verify", "resume", "--kills", "1"]) == BUG
    said = capsys.readouterr().out
    assert "1 mismatch" in said
    assert "! dense-muon-fp32-x1-inline-base, seed 0: tensor model/x: 1 of 2 values differ" in said


def test_an_interruption_leaves_a_report_of_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(outcome: resume.Outcome, workers: int, listen: resume.Listener) -> None:
        kill = {"t": "kill", "configuration": outcome.jobs[0].name, "way": "clock", "moment": "computing + writing"}
        kill |= {"when": "after 1.000 s", "from": 0, "trained": 7, "newest": 4, "lost": 3, "seconds": 1.0}
        outcome.kills.append(kill)
        listen(kill)
        raise KeyboardInterrupt

    monkeypatch.setattr("lumina.verify.resume.verify", interrupt)
    assert main(["verify", "resume", "--kills", "9", "--out", str(tmp_path)]) == 130
    assert "stopped early, 9 were wanted: 1 kill" in capsys.readouterr().out
    page = next(tmp_path.glob("*.md")).read_text()
    assert "| computing + writing | 1 |" in page
    assert '"trained": 7' in next(tmp_path.glob("*.jsonl")).read_text()


def test_a_place_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(moments.resolve()) == len(moments.PLACES)
    gone = moments.Place("gone", "lumina.checkpoint.store.no_such_function", "disk")
    monkeypatch.setattr(moments, "PLACES", (*moments.PLACES, gone))
    with pytest.raises(LookupError, match="no_such_function is gone"):
        moments.resolve()


def test_a_dead_worker_is_a_failure_not_a_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outcome = resume.plan("tiny", 2, 0)
    resume.verify(outcome, 1, lambda _: None, worker=("-c", "raise SystemExit('no room')"))
    assert [verdict["problems"] for verdict in outcome.verdicts] == [["the worker process died: no room"]] * 2
