from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lumina.errors import UserError
from lumina.events import EventWriter
from lumina.run import folder
from lumina.run.folder import Run, write_json


def started(path: Path) -> Run:
    """A run folder with what makes it one."""
    path.mkdir(parents=True)
    run = Run(path)
    run.config.write_text("preset: tiny\n")
    run.write_meta({"request": "r"})
    return run


def test_created_folders_are_new_and_named_by_preset_and_date(tmp_path: Path) -> None:
    runs = [Run.create(tmp_path / "a" / "runs", "tiny") for _ in range(20)]
    assert len({run.path for run in runs}) == 20
    for run in runs:
        assert re.fullmatch(r"tiny-\d{8}-[a-z2-9]{4}", run.path.name)
        assert list(run.path.iterdir()) == []


def test_a_taken_name_is_never_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    characters = iter("aaaaaaaabbbb")
    monkeypatch.setattr(folder.secrets, "choice", lambda alphabet: next(characters))
    names = [Run.create(tmp_path, "tiny").path.name[-4:] for _ in range(2)]
    assert names == ["aaaa", "bbbb"]


def test_a_root_that_cannot_hold_runs_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"cannot make a run folder here: File exists(.|\n)*--root"):
        Run.create(tmp_path / "runs", "tiny")


def test_open_says_what_a_folder_lacks(tmp_path: Path) -> None:
    run = started(tmp_path / "tiny-1")
    assert Run.open(run.path) == run
    run.meta.unlink()
    with pytest.raises(UserError, match=r"not a run folder: it has no meta\.json") as error:
        Run.open(run.path)
    assert "did you mean" not in error.value.fix  # it does not resemble itself
    run.config.unlink()
    with pytest.raises(UserError, match=r"it has no config\.yaml and no meta\.json"):
        Run.open(run.path)


def test_open_names_the_runs_that_were_perhaps_meant(tmp_path: Path) -> None:
    started(tmp_path / "debug-20260101-abcd")
    (tmp_path / "debug-20260101-abce").mkdir()  # not a run
    with pytest.raises(UserError, match="no such run") as error:
        Run.open(tmp_path / "debug-20260101-abcx")
    assert error.value.fix == f"did you mean {tmp_path / 'debug-20260101-abcd'}?"
    started(tmp_path / "debug-20260202-aaaa")
    with pytest.raises(UserError, match="no such run") as error:
        Run.open(tmp_path / "debug")  # far from the whole name, and what a person types
    assert error.value.fix == f"did you mean {tmp_path / 'debug-20260202-aaaa'} or {tmp_path / 'debug-20260101-abcd'}?"
    with pytest.raises(UserError, match="lumina train"):
        Run.open(tmp_path / "nowhere" / "x")


def test_attempts_are_counted_and_only_a_planned_end_finishes(tmp_path: Path) -> None:
    run = started(tmp_path / "tiny-1")
    assert (run.next_attempt(), run.finished, run.events()) == (0, False, [])
    for attempt, reason in enumerate(["stopped", "done"]):
        assert not run.finished
        with EventWriter(run.event_log, run.next_attempt()) as events:
            events.emit("end", step=5, reason=reason)
        assert run.next_attempt() == attempt + 1
    assert run.finished


def test_events_are_the_merged_history(tmp_path: Path) -> None:
    run = started(tmp_path / "tiny-1")
    with EventWriter(run.event_log, 0) as events:
        events.emit("step", step=1)
        events.emit("step", step=2)
    with EventWriter(run.event_log, 1) as events:
        events.emit("run", step=1, parent_step=1)
    assert [(event["t"], event["step"]) for event in run.events()] == [("step", 1), ("run", 1)]


def test_meta_round_trip_and_damage(tmp_path: Path) -> None:
    run = started(tmp_path / "tiny-1")
    assert run.read_meta()["request"] == "r"
    run.meta.write_text('{"request": ')
    with pytest.raises(UserError, match=r"meta\.json: not JSON"):
        run.read_meta()


def test_write_json_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def crash(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    write_json(path, {"a": 3})
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]
