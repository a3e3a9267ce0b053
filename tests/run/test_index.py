from __future__ import annotations

from pathlib import Path

import pytest

from lumina.errors import UserError
from lumina.events import EventWriter
from lumina.run import index
from lumina.run.folder import Run, write_json


def make(path: Path, request: str, created: float, end: str | None = None) -> Run:
    path.mkdir(parents=True)
    run = Run(path)
    run.config.write_text("")
    write_json(run.meta, {"created": created, "request": request})
    with EventWriter(run.event_log, 0) as events:
        events.emit("run", step=0)
        if end:
            events.emit("end", step=1, reason=end)
    return run


def test_the_newest_unfinished_run_of_the_request_is_found(tmp_path: Path) -> None:
    assert index.newest(tmp_path / "none", "r") == (None, "none")
    make(tmp_path / "d", "other", created=9)
    make(tmp_path / "c", "r", created=1, end="stopped")
    middle = make(tmp_path / "b", "r", created=2)
    last = make(tmp_path / "a", "r", created=3, end="done")
    (tmp_path / "half-made").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    assert index.newest(tmp_path, "r") == (middle, "unfinished")
    assert [run.path.name for run in index.runs(tmp_path)] == ["d", "a", "b", "c"]
    for name in "bc":
        with EventWriter(Run(tmp_path / name).event_log, 1) as events:
            events.emit("end", step=2, reason="done")
    assert index.newest(tmp_path, "r") == (last, "finished")
    assert index.newest(tmp_path, "unheard") == (None, "none")


def test_a_run_is_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "runs"
    run = make(root / "tiny-1", "r", created=1)
    assert index.find(root, "tiny-1") == run
    assert index.find(tmp_path / "elsewhere", str(run.path)) == run
    monkeypatch.chdir(tmp_path)
    assert index.find(Path("elsewhere"), "runs/tiny-1").path.resolve() == run.path
    monkeypatch.chdir(run.path)
    assert index.find(root, ".").path.resolve() == run.path


@pytest.mark.parametrize("name", ["tiny-2", "runs/tiny-2"])
def test_an_unknown_run_is_looked_for_where_it_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("runs/tiny-1"), "r", created=1)
    with pytest.raises(UserError, match=r"^runs/tiny-2: no such run\n.*did you mean runs/tiny-1\?"):
        index.find(Path("runs"), name)
