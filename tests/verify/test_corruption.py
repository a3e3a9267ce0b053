"""Every kind of damage is seen and said; and the verifier sees it when it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import write_text

from lumina.checkpoint import store
from lumina.cli import main
from lumina.run.exit_codes import BUG
from lumina.training.trainer import Trainer
from lumina.verify import corruption
from lumina.verify.damage import Damage, damages


def test_every_kind_of_damage_is_passed_over_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["verify", "corruption", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["damage"] for row in told["damages"]] == [damage.name for damage in damages()]
    assert all(row["said"] and not row["problem"] for row in told["damages"])
    assert sum(row["resumed"] for row in told["damages"]) >= 8
    assert not list(tmp_path.glob("lumina-verify-*"))


verify = store.verify
BLIND: dict[str, Callable[..., list[str]]] = {
    "sees nothing": lambda *_: [],
    "sees sizes only": lambda *given: [problem for problem in verify(*given) if "bytes than were" not in problem],
}


@pytest.mark.parametrize("blindness", BLIND)
def test_a_store_that_sees_less_is_found_out(
    blindness: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    few = [damage for damage in damages() if damage.name == "weights: last bit flipped"]
    monkeypatch.setattr(corruption, "damages", lambda: few)
    monkeypatch.setattr(store, "verify", BLIND[blindness])
    assert main(["verify", "corruption"]) == BUG
    said = capsys.readouterr().out
    assert "the newest checkpoint found is 6, not 4" in said
    assert "1 kinds of damage, 1 met in the wrong way" in said
    (kept,) = tmp_path.glob("lumina-verify-*")
    assert str(kept) in said


def test_a_failure_that_nobody_foresaw_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    harmless = Damage("none", lambda *_: None, left=6, resumed=True)
    monkeypatch.setattr(corruption, "damages", lambda: [harmless])
    ((finding,), _) = corruption.verify()
    assert finding.problem == "nothing is said of what is passed over"
    run = Trainer("tiny", data=str(write_text(tmp_path)), root=tmp_path / "runs").fit()
    monkeypatch.setattr(store, "newest", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(corruption, "_runs", lambda _: (run, run))
    ((finding,), _) = corruption.verify()
    assert finding.problem.startswith("ZeroDivisionError")
