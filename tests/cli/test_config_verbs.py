"""`lumina config show | check | schema | reference`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import settings

from lumina.cli import main
from lumina.config.resolve import flatten, resolve
from lumina.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_show_prints_what_would_run_and_reads_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", "show", "tiny", "train.lr=1e-3"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert flatten(resolve(tmp_path / "again.yaml").config) == flatten(resolve("tiny", ["train.lr=1e-3"]).config)


def test_origins_are_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("extends: tiny\ntrain: {clip: 0.5}\n")
    assert main(["config", "show", "my.yaml", "train.lr=1e-3", "--origins"]) == 0
    said = {line.split(":")[0]: line.rpartition("  # ")[2] for line in capsys.readouterr().out.splitlines()}
    assert said["train.lr"] == "command line"
    assert said["train.clip"] == "file my.yaml"
    assert said["train.eps"] == "preset tiny"
    assert main(["config", "show", "my.yaml", "--origins", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train.clip"] == {"value": 0.5, "origin": "file my.yaml"}


def test_a_run_shows_what_it_was_and_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = Trainer("tiny", settings(tmp_path, train__steps=2, precision__mode="auto")).fit()
    for name in (str(run.path), run.path.name):
        assert main(["config", "show", name, "--origins"]) == 0
        said = capsys.readouterr().out
        assert "# resolved: as in training" in said
        assert "# preset tiny" in said
    assert main(["config", "show", run.path.name, "train.lr=1"]) == 2
    assert "leave out key=value" in capsys.readouterr().err


def test_check_says_all_that_is_wrong_in_all_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("train: {steps: 3}")
    (tmp_path / "one.yaml").write_text("train: {stepz: 3}")
    (tmp_path / "two.yaml").write_text("model: {heads: 7, kv_heads: 2}\ntrain: {lr: -1}")
    assert main(["config", "check", "good.yaml"]) == 0
    assert capsys.readouterr().out == "good.yaml: fine\n"
    assert main(["config", "check", "good.yaml", "one.yaml", "two.yaml", "none.yaml"]) == 2
    said = capsys.readouterr().err
    for needle in ("train.stepz", "model.heads=7", "train.lr=-1", "none.yaml: cannot be read"):
        assert needle in said


def test_schema_and_reference_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "LuminaAI configuration"
    assert main(["config", "reference"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("# Configuration\n")
    assert main(["config", "schema", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "LuminaAI configuration"
    assert main(["config", "reference", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"markdown": page}
