"""`lumina decisions --history`: what trials of all runs taught, also what lost, and what no run goes by any more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lumina.cli import main
from lumina.orchestrator.confidence import Verdict
from lumina.run import verdicts
from lumina.run.verdicts import keep

NOW, BEFORE = f"{verdicts.code()}-dense-muon-wsd", "00000000-dense-muon-wsd"


def packed(action: str, won: bool, gain: float, run: str) -> dict[str, Any]:
    return Verdict("learning rate (drift)", action, won, gain, gain - 0.01, 0.004, "dense", run, 100).pack()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    keep(tmp_path, NOW, [packed("lr.scale up", False, -0.3, "a"), packed("lr.scale up", False, -0.1, "b")])
    keep(tmp_path, NOW, [packed("lr.scale down", True, 0.02, "a")])
    keep(tmp_path, f"{verdicts.code()}-moe-sigmoid-muon-wsd", [packed("lr.scale down", False, 0.001, "c")])
    keep(tmp_path, BEFORE, [packed("lr.scale up", True, 0.5, "old")])
    return tmp_path


def test_a_table_of_what_won_and_what_lost(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decisions", "--history", "--root", str(root)]) == 0
    header, *rows, others = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "fault", "action", "tried", "won", "chance", "90", "%", "gain", "runs"]
    assert [row.split("  ")[0] for row in rows] == ["dense-muon-wsd", "dense-muon-wsd", "moe-sigmoid-muon-wsd"]
    down, up, moe = (row.split() for row in rows)
    assert " ".join(down[1:]) == "learning rate (drift) lr.scale down 1 1 0.75 0.23 - 1.00 +0.0200 1"
    assert " ".join(up[1:]) == "learning rate (drift) lr.scale up 2 0 0.17 0.00 - 0.57 -0.2000 2"
    assert moe[-1] == "1"
    assert others == "1 more of other versions of lumina, which no run goes by any more: --json"


def test_as_json_with_every_verdict(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decisions", "--history", "--root", str(root), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["architecture"], row["action"], row["used"]) for row in rows] == [
        ("dense-muon-wsd", "lr.scale down", True),
        ("dense-muon-wsd", "lr.scale up", True),
        ("moe-sigmoid-muon-wsd", "lr.scale down", True),
        ("dense-muon-wsd", "lr.scale up", False),
    ]
    assert rows[1]["runs"] == ["a", "b"]
    assert [one["gain"] for one in rows[1]["verdicts"]] == [-0.3, -0.1]


def test_where_nothing_was_tried_it_says_what_tries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for root in (tmp_path, tmp_path / "none"):
        assert main(["decisions", "--history", "--root", str(root)]) == 0
        assert "no trials" in (said := capsys.readouterr().out)
        assert "orchestrator.mode=act" in said
    assert main(["decisions", "--history", "--root", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("arguments", [[], ["a-run", "--history"]])
def test_it_is_of_one_run_or_of_all(arguments: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decisions", *arguments, "--root", str(root)]) == 2
    assert "--history" in capsys.readouterr().err


def test_a_store_that_cannot_be_read_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / verdicts.FOLDER / f"{NOW}.jsonl").mkdir(parents=True)
    assert main(["decisions", "--history", "--root", str(tmp_path)]) == 2
    assert "cannot be read: Is a directory" in capsys.readouterr().err
