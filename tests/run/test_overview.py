"""What a list of runs says of logs and folders that something went wrong with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lumina.cli import main
from lumina.events import EventWriter
from lumina.run import overview as listing
from lumina.run.folder import Run
from lumina.run.overview import overview


def made(root: Path, name: str = "tiny-1", **meta: Any) -> Run:
    """A run folder without a log."""
    (root / name).mkdir(parents=True)
    run = Run(root / name)
    run.config.touch()
    run.write_meta(meta)
    return run


def begin(events: EventWriter, parent: int | None = None) -> None:
    events.emit("run", step=parent or 0, parent_step=parent, kind="moe", active=1000, steps=10)


def step(events: EventWriter, number: int, loss: float = 2.0) -> None:
    events.emit("step", step=number, tokens=100 * number, loss=loss)


def attempt(run: Run, number: int, steps: range, parent: int | None = None) -> None:
    with EventWriter(run.event_log, number) as events:
        begin(events, parent)
        for n in steps:
            step(events, n, loss=number + n / 10)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_run_that_diverged_is_listed(tmp_path: Path, loss: float, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path)
    with EventWriter(run.event_log, 0) as events:
        begin(events)
        events.emit("eval", step=1, bpb=1.5, comparable=True)
        events.emit("eval", step=2, bpb=loss, comparable=True)
        step(events, 2, loss)
    assert main(["runs", "--root", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["loss"], row["best_bpb"]) == (str(loss), 1.5)
    assert main(["runs", "--root", str(tmp_path)]) == 0
    assert f" {loss} " in capsys.readouterr().out


def test_where_it_ends_is_not_whether_an_incident_ended_it(tmp_path: Path) -> None:
    run = made(tmp_path)
    with EventWriter(run.event_log, 0) as events:
        begin(events)
        events.emit("decision", step=3, ends=7)
        events.emit("incident", step=4, kind="save refused", ends=True)
    assert overview(tmp_path)[0]["steps"] == 7


def test_an_attempt_without_a_step_stands_where_it_went_on(tmp_path: Path) -> None:
    run = made(tmp_path)
    attempt(run, 0, range(1, 6))
    attempt(run, 1, range(0), parent=3)
    (row,) = overview(tmp_path)
    assert (row["step"], row["tokens"], row["loss"], row["state"]) == (3, 300, 0.3, "interrupted")
    attempt(run, 2, range(3, 5), parent=2)
    (row,) = overview(tmp_path)
    assert (row["step"], row["tokens"], row["loss"]) == (4, 400, 2.4)


@pytest.mark.parametrize("torn", ['{"t":"step","v":1,"st', '{"t":"eval","v":1,"x":{"a":1}'])
def test_a_line_that_a_crash_tore_is_no_damage(tmp_path: Path, torn: str) -> None:
    run = made(tmp_path)
    attempt(run, 0, range(1, 3))
    with run.event_log.open("a") as log:
        log.write(torn)
    assert overview(tmp_path)[0]["step"] == 2
    attempt(run, 1, range(0), parent=2)
    (row,) = overview(tmp_path)
    assert (row["state"], row["step"], row["loss"]) == ("interrupted", 2, 0.2)


def test_a_line_that_no_crash_tore_is(tmp_path: Path) -> None:
    run = made(tmp_path)
    attempt(run, 0, range(1, 2))
    with run.event_log.open("a") as log:
        log.write("rubbish\n")
    attempt(run, 0, range(2, 3))
    (row,) = overview(tmp_path)
    assert row["state"] == "damaged"
    assert "events.jsonl:3: not an event" in row["problem"]


def test_damaged_folders_are_listed_after_the_others(tmp_path: Path) -> None:
    attempt(made(tmp_path, "whole"), 0, range(1, 2))
    made(tmp_path, "no-date", created=None)
    made(tmp_path, "no-type").event_log.write_text('{"attempt":0,"v":1}\n')
    made(tmp_path, "no-reason").event_log.write_text('{"t":"end","attempt":0,"v":1,"step":1}\n')
    (tmp_path / "only-checkpoints" / "checkpoints").mkdir(parents=True)
    (tmp_path / "no-run").mkdir()
    rows = overview(tmp_path)
    assert [row["name"] for row in rows] == ["whole", "no-date", "no-reason", "no-type", "only-checkpoints"]
    assert [row["state"] for row in rows] == ["interrupted"] + 4 * ["damaged"]
    assert all(row["problem"] for row in rows[1:])


def test_of_a_long_log_only_what_counts_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path)
    attempt(run, 0, range(1, 1000))
    attempt(run, 1, range(901, 1000), parent=900)
    parsed = []
    monkeypatch.setattr(listing, "parse", lambda line, real=listing.parse: parsed.append(line) or real(line))
    assert overview(tmp_path)[0]["step"] == 999
    assert len(parsed) == 3  # two beginnings and one step
