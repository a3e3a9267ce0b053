"""`lumina presets`."""

from __future__ import annotations

import json

import pytest

from lumina.cli import main
from lumina.config.resolve import presets


def test_every_preset_is_listed_smallest_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[1 : len(presets()) + 1]} == set(presets())
    assert [line.split()[0] for line in lines[1:4]] == ["tiny", "debug", "debug_200m"]
    assert lines[-1].startswith("fits: into the")


def test_one_preset_is_listed_in_all_kinds_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "b7", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["kind"] for row in rows} == {"dense", "moe", "mod", "hybrid"}
    dense = next(row for row in rows if row["kind"] == "dense")
    assert dense["weights"] == dense["gradients"] == 4 * dense["total"]
    assert dense["moments"] == 4 * (2 * dense["total"] - dense["matrices"])
    assert dense["kv_bytes"] == 36 * 2 * 8 * 128 * 4 * 4096


def test_a_kind_is_shown_with_what_it_has_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "b7", "--json", "--kind", "moe"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["kind"] == row["model"]["kind"] == "moe"
    assert row["model"]["moe.experts"] == 32
    assert not {"ffn", "mod.capacity"} & set(row["model"])
    assert main(["presets", "b7"]) == 0
    shapes = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shapes[0] == ["model.", "dense", "moe", "mod", "hybrid"]
    assert ["ffn", "11776", "-", "11776", "-"] in shapes
    assert ["moe.experts", "-", "32", "-", "32"] in shapes


def test_every_preset_as_one_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "--kind", "dense", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["preset"] for row in rows] == presets()
    assert {row["kind"] for row in rows} == {"dense"}


def test_wrong_names_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "b8"]) == 2
    assert "unknown preset 'b8'" in capsys.readouterr().err
    assert main(["presets", "--kind", "sparse"]) == 2
    assert "model.kind=sparse" in capsys.readouterr().err
