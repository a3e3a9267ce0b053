"""Files of earlier versions are read as if they were written today, and it is said what changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lumina.config import migrations
from lumina.config.resolve import read, resolve, write
from lumina.errors import UserError


def rename(values: dict[str, Any]) -> list[str]:
    """Version 1 called train.lr train.rate."""
    if "train.rate" not in values:
        return []
    values["train.lr"] = values.pop("train.rate")
    return ["train.rate is now train.lr"]


def double(values: dict[str, Any]) -> list[str]:
    """Version 2 counted clip in halves."""
    if "train.clip" not in values:
        return []
    values["train.clip"] *= 2
    return ["train.clip is twice as large"]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(migrations, "MIGRATIONS", {1: rename, 2: double})
    path = tmp_path / "old.yaml"
    path.write_text("schema_version: 1\nextends: tiny\ntrain: {rate: 0.5, clip: 2}\n")
    return path


def test_an_old_file_goes_through_every_version(old: Path) -> None:
    resolved = resolve(old)
    assert (resolved.config.train.lr, resolved.config.train.clip) == (0.5, 4.0)
    assert resolved.notes == (f"{old}: train.rate is now train.lr", f"{old}: train.clip is twice as large")
    assert resolved.origins["train.lr"] == f"file {old}, migrated from version 1"


def test_a_file_without_version_is_current(old: Path) -> None:
    old.write_text("extends: tiny\ntrain: {lr: 0.5}\n")
    assert resolve(old).notes == ()
    old.write_text("train: {rate: 0.5}\n")
    with pytest.raises(UserError, match=r"train\.rate.*unknown key"):
        resolve(old)


def test_what_is_written_is_current_and_a_run_is_migrated_too(old: Path, tmp_path: Path) -> None:
    write(resolve("tiny"), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith("schema_version: 3\n")
    (tmp_path / "config.yaml").write_text(
        text.replace("schema_version: 3", "schema_version: 1").replace("  lr:", "  rate:")
    )
    again = read(tmp_path / "config.yaml")
    assert again.config.train.lr == resolve("tiny").config.train.lr
    assert any("train.rate is now train.lr" in note for note in again.notes)
    assert again.origins["train.lr"] == f"file {tmp_path / 'config.yaml'}, migrated from version 1"
    assert again.origins["train.eps"] == "preset tiny"


@pytest.mark.parametrize("version", [0, 2, 99, "1", "new", True, 1.0])
def test_an_unknown_version_is_refused(version: Any, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"schema_version: {version!r}\n".replace("True", "true"))
    with pytest.raises(UserError, match="schema_version is") as error:
        resolve(path)
    assert "use the version that wrote the file" in error.value.fix
