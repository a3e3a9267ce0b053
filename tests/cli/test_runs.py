"""`lumina runs`: every run's state, as its folder tells it."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
from support import settings

from lumina.cli import main
from lumina.errors import UserError
from lumina.run.lock import RunLock, is_held
from lumina.training.endings import Stopped
from lumina.training.trainer import Trainer


def listed(capsys: pytest.CaptureFixture[str], root: Path) -> dict[str, dict[str, Any]]:
    assert main(["runs", "--root", str(root), "--json"]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def test_every_state_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, keys = tmp_path / "runs", settings(tmp_path) | {"train.steps": 4, "train.eval_every": 2}
    finished = Trainer("tiny", root=root, **keys).fit()

    def stop(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == 3:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    def crash(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == 2:
            raise RuntimeError("power cut")

    with pytest.raises(Stopped) as stopped:
        Trainer("tiny", root=root, fresh=True, listeners=[stop], **keys).fit()
    with pytest.raises(RuntimeError):
        Trainer("tiny", root=root, fresh=True, listeners=[crash], **keys).fit()
    (root / "half").mkdir()
    (root / "half" / "config.yaml").touch()
    rows = listed(capsys, root)
    states = {row["state"] for row in rows.values()}
    assert states == {"finished", "stopped", "interrupted", "damaged"}
    done, half = rows[finished.path.name], rows["half"]
    assert (done["step"], done["steps"], done["kind"]) == (4, 4, "hybrid")
    steps = [event for event in finished.events() if event["t"] == "step"]
    assert done["loss"] == steps[-1]["loss"]
    assert done["tokens"] == steps[-1]["tokens"]
    assert "meta.json" in half["problem"]
    assert rows[stopped.value.run.path.name]["state"] == "stopped"

    with RunLock(finished.lock):
        assert listed(capsys, root)[finished.path.name]["state"] == "training"
    log = finished.event_log
    log.write_bytes(log.read_bytes() + b'{"t":"step","v":1,"st')  # torn
    assert listed(capsys, root)[finished.path.name]["step"] == 4

    assert main(["runs", "--root", str(root)]) == 0
    said = capsys.readouterr().out
    assert "! half is damaged" in said
    assert "4/4" in said


def test_no_runs_says_how_to_start_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--root", str(tmp_path / "none")]) == 0
    assert "lumina train" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert main(["runs", "--root", str(tmp_path / "file")]) == 2
    assert "not a folder" in capsys.readouterr().err


def test_looking_does_not_keep_a_trainer_from_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    path.touch()
    assert not is_held(path)
    assert not is_held(tmp_path / "none")
    looking = path.open()
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("lumina.run.lock.time.sleep", lambda seconds: looking.close())  # while it waits
    with RunLock(path):
        assert looking.closed
        assert is_held(path)
        with pytest.raises(UserError, match="in use"), RunLock(path):
            pass
