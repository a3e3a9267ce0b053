"""The Python interface that the README shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import write_text

import lumina


def test_train_load_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path)
    run = lumina.Trainer("tiny", data=str(text), root=tmp_path / "runs", **{"train.steps": 3}).fit()
    assert isinstance(run, lumina.Run)
    assert "[Step 3]" in capsys.readouterr().out
    steps = [event for event in run.events() if event["t"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3]
    assert all(event["loss"] > 0 for event in steps)
    model = lumina.load(run)
    text_of_run = model.generate("line", max_tokens=8, temperature=0.0)
    assert text_of_run == "".join(lumina.load(str(run.path)).stream("line", max_tokens=8, temperature=0.0))


def test_quiet_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lumina.Trainer("tiny", data=str(write_text(tmp_path)), root=tmp_path, quiet=True, **{"train.steps": 2}).fit()
    assert capsys.readouterr().out == ""
    with pytest.raises(lumina.UserError, match=r"train\.steps"):
        lumina.Trainer("tiny", **{"train.step": 3})
    with pytest.raises(AttributeError):
        _ = lumina.nothing  # type: ignore[attr-defined]
