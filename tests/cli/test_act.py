"""`lumina act`, `undo` and `decisions`: asked, done, told, undone; and what is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import same_tensors, settings, write_text

from lumina.byhand import table
from lumina.cli import main
from lumina.run.folder import Run
from lumina.training.session import Session
from lumina.training.trainer import Trainer

KEYS = {"model.layers": 2, "train.batch_tokens": 256, "train.warmup": 1, "train.decay": 1}


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A tiny dense run that was killed behind step 3 of 6; checkpoints every second step."""
    step = Session._step

    def killed(session: Session) -> None:
        step(session)
        if session.state.progress.step == 3:
            raise RuntimeError("power cut")

    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_step", killed)
        with pytest.raises(RuntimeError, match="power cut"):
            Trainer("tiny", root=tmp_path / "runs", **settings(tmp_path, "dense") | KEYS).fit()
    return Run(next((tmp_path / "runs").iterdir()))


def test_asked_while_it_rests_done_when_it_goes_on_told_and_undone(
    stopped: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = stopped.path.name
    assert main(["act", name, "lr.scale=0.5", "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "asked: lr.scale=0.5 for 2 steps; the run is not running" in said
    assert f"lumina resume runs/{name}" in said
    assert main(["resume", name]) == 0
    capsys.readouterr()
    assert main(["decisions", name]) == 0
    told = capsys.readouterr().out
    assert "step 2, attempt 1: hand -> lr.scale=0.5 for 2 steps (by hand)" in told
    assert "undo      lr.scale=0.5@3" in told
    assert main(["undo", name, "lr.scale"]) == 0
    assert main(["resume", name]) == 0
    assert "nothing to go on with" not in capsys.readouterr().out
    assert main(["resume", name]) == 0
    assert "nothing to go on with" in capsys.readouterr().out
    assert main(["decisions", name, "--json"]) == 0
    first, back = json.loads(capsys.readouterr().out)
    assert (first["state"], first["undo"], back["action"]) == ("undone", [], "undo=lr.scale")
    plain = Trainer("tiny", root=tmp_path / "plain", **settings(tmp_path, "dense") | KEYS).fit()
    assert same_tensors(plain, stopped)


def test_what_there_is_to_do(stopped: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["act", stopped.path.name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [row[0] for row in table()]
    assert main(["act", stopped.path.name, "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == {row[0] for row in table()}
    assert main(["decisions", stopped.path.name]) == 0
    assert "nothing was decided" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["act", "RUN", "lr.scale=900"], "out of bounds"),
        (["act", "RUN", "lr.scal=0.5"], "did you mean lr.scale"),
        (["act", "RUN", "expert_dropout=0.1"], "a dense model has no experts"),
        (["act", "RUN", "predictor=0"], "a dense model has no depth routing"),
        (["act", "RUN", "rewind=99999"], "possible are steps 0 to 1, or -1 to -2"),
        (["act", "RUN", "rewind=2"], "has come to step 2"),  # what step 3 did was not told yet
        (["act", "RUN", "rewind=-1000"], "has come to step 2"),
        (["act", "RUN", "stop"], "is not running"),
        (["act", "RUN", "save", "--skip"], "leave --skip out"),
        (["undo", "RUN", "nothing"], "no such overlay"),
        (["act", "nobody", "save"], "no such run"),
    ],
)
def test_what_is_refused(command: list[str], says: str, stopped: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([stopped.path.name if word == "RUN" else word for word in command]) == 2
    assert says in capsys.readouterr().err
    assert not (stopped.path / "inbox").exists()


def test_the_page_says_what_there_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "orchestrator.md").read_text(encoding="utf-8")
    for name, values, does, _ in table():
        assert f"| `{name}` | {values} | {does} |" in page
