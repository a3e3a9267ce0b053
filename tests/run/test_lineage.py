"""Which checkpoints count after a run was resumed or went back: by the same rule as events."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.checkpoint import catalogue
from lumina.errors import UserError
from lumina.events import EventWriter, merged
from lumina.run.folder import Run
from lumina.run.lineage import Lineage, done_since, lineage, overlays


def abandoned(run: Run) -> list[Path]:
    return catalogue.abandoned(run.checkpoints, lineage(run).counts)


def begun(run: Run, attempt: int, parent: int | None, **fields: Any) -> None:
    run.path.mkdir(exist_ok=True)
    with EventWriter(run.event_log, attempt) as events:
        events.emit("run", step=parent or 0, parent_step=parent, **fields)


def saved(run: Run, name: str, attempt: int | None) -> None:
    path = run.checkpoints / name
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({"kind": "dense"} | ({} if attempt is None else {"attempt": attempt})))


@given(st.lists(st.integers(0, 9), max_size=4), st.integers(0, 4), st.integers(0, 9))
def test_a_checkpoint_counts_where_an_event_of_its_attempt_and_step_does(
    parents: list[int], attempt: int, step: int
) -> None:
    attempt = min(attempt, len(parents))
    known = Lineage(tuple((number, parent, True) for number, parent in enumerate(parents, 1)))
    events = [{"t": "run", "attempt": n, "step": p, "parent_step": p} for n, p in enumerate(parents, 1)]
    event = {"t": "checkpoint", "attempt": attempt, "step": step}
    assert known.counts(attempt, step) == (event in merged([*events, event]))


def test_what_a_run_left_behind(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    begun(run, 0, None)
    for name, attempt in (("step-000003", 0), ("step-000006", 0), ("step-000009", 0)):
        saved(run, name, attempt)
    assert abandoned(run) == []
    begun(run, 1, 6, reason="resume")  # the newest was damaged
    assert [path.name for path in abandoned(run)] == ["step-000009"]
    begun(run, 2, 3, reason="rollback")
    saved(run, "step-000004", 2)
    assert [path.name for path in abandoned(run)] == ["step-000006", "step-000009"]
    begun(run, 3, 4, reason="resume")
    (run.checkpoints / "step-000006").rename(run.checkpoints / "step-000006.old")  # killed while it was replaced
    saved(run, "step-000006", 3)
    assert [path.name for path in abandoned(run)] == ["step-000006.old", "step-000009"]
    assert lineage(run).after(4, 3).counts(3, 6) is False


def test_checkpoints_older_than_attempts_count_until_somebody_goes_back(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    begun(run, 0, None)
    begun(run, 1, 3)  # went on behind a damaged one, and saved it anew
    for name in ("step-000003", "step-000006"):
        saved(run, name, None)
    assert abandoned(run) == []
    begun(run, 2, 3, reason="rollback")
    assert [path.name for path in abandoned(run)] == ["step-000006"]


def test_what_cannot_be_read_is_not_abandoned(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert abandoned(run) == []
    begun(run, 1, 1, reason="rollback")
    for name, content in (("step-000003", "{"), ("step-000004", '{"attempt": "x"}'), ("step-x", "{}")):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "state.json").write_text(content)
    (run.checkpoints / "step-000005.tmp-1").mkdir()
    (run.checkpoints / "step-000006").mkdir()
    os.mkfifo(run.checkpoints / "step-000006" / "state.json")
    assert abandoned(run) == []


def test_the_last_event_that_tells_overlays_tells_all(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert overlays(run) is None
    begun(run, 0, None)
    assert overlays(run) is None
    begun(run, 1, 3, overlays=[{"id": "a"}])
    with EventWriter(run.event_log, 1) as events:
        events.emit("decision", step=4, overlays=[])
        events.emit("step", step=5)
    assert overlays(run) == []
    with run.event_log.open("a") as log:
        log.write('{"t":"run","attempt":2,"overlays":[{"id":')  # torn
    assert overlays(run) == []


def test_what_was_done_behind_a_checkpoint_is_ways_back_and_verdicts(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    begun(run, 0, None, reason="start")
    with EventWriter(run.event_log, 0) as events:
        for step, kind in ((3, "verdict"), (5, "begin"), (5, "verdict")):
            events.emit("trial", step=step, kind=kind)
    begun(run, 1, 2, reason="rollback")
    with EventWriter(run.event_log, 1) as events:
        events.emit("trial", step=3, kind="verdict")
    begun(run, 2, 3, reason="resume")
    found = [[(e["t"], e["attempt"], e["step"]) for e in done_since(run, *saved)] for saved in ((0, 3), (1, 3), (2, 3))]
    assert found == [[("trial", 0, 5), ("run", 1, 2), ("trial", 1, 3)], [], []]


def test_a_damaged_log_is_said(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    begun(run, 1, 3)
    run.event_log.write_text(run.event_log.read_text().replace('"parent_step":3', '"parent_step":"3"'))
    with pytest.raises(UserError, match="whole numbers"):
        lineage(run)
