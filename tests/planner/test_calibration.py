"""What was measured is found again for the same shape on the same device, and for nothing else."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from lumina.config.resolve import resolve
from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.planner import calibration
from lumina.planner.calibration import load, record, shape_of


def config(**keys: Any) -> Config:
    return resolve("tiny", keys).config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "planner-1.json"


def test_the_same_shape_is_found_and_no_other(file: Path) -> None:
    record("H200", config(), 1, {"step": 0.5}, file)
    store = load(file)
    assert store.lookup("H200", config()) == {"step": 0.5}
    assert store.lookup("H100-SXM", config()) == {}
    assert store.lookup("H200", config(), processes=2) == {}
    for changed in (
        {"model.width": 128},
        {"train.batch_tokens": 1024},
        {"precision.mode": "bf16"},
        {"model.moe.ffn": 72},
    ):
        assert store.lookup("H200", config(**changed)) == {}, changed
    for same in ({"train.lr": 1e-2}, {"train.steps": 999}, {"train.seed": 3}, {"model.moe.bias_rate": 0}):
        assert store.lookup("H200", config(**same)) == {"step": 0.5}, same


def test_the_newest_figure_of_each_name_holds(file: Path) -> None:
    record("cpu", config(), 1, {"step": 1.0, "start": 5.0}, file)
    record("cpu", config(), 1, {"step": 2.0, "loss_residual": math.nan}, file)
    assert load(file).lookup("cpu", config()) == {"step": 2.0, "start": 5.0}  # what is no number was never measured


def test_compiled_steps_are_no_others(file: Path) -> None:
    record("cpu", config(), 1, {"step": 1.0, "compiled": 1.0}, file)
    store = load(file)
    assert store.lookup("cpu", config(**{"train.compile": "off"})) == {}
    assert store.lookup("cpu", config(**{"train.compile": "on"}))["step"] == 1.0
    assert store.lookup("cpu", config(**{"train.compile": "auto"}))["step"] == 1.0


def test_figures_of_other_shapes_are_listed_by_kind_and_precision(file: Path) -> None:
    record("cpu", config(), 1, {"ratio_launches": 1.2}, file)
    record("cpu", config(**{"model.width": 128}), 1, {"ratio_launches": 1.4}, file)
    record("cpu", config(**{"model.kind": "dense"}), 1, {"ratio_launches": 9.0}, file)
    store = load(file)
    assert store.figures("ratio_launches", "cpu", "hybrid", "fp32") == [1.2, 1.4]
    assert store.figures("ratio_launches", "cpu") == [1.2, 1.4, 9.0]
    assert store.figures("ratio_launches", "cpu", precision="bf16") == []


DAMAGED = {
    "no JSON": b"{",
    "a list": b"[]",
    "no entries": b"{}",
    "another entry": b'{"entries": [{"device": "x"}]}',
    "a text for a number": b'{"entries": [{"device": "x", "processes": 1, "kind": "dense", "precision": "fp32", '
    b'"shape": "s", "figures": {"step": "soon"}, "at": 0}]}',
    "a name that is none": b'{"entries": [{"device": 1, "processes": 1, "kind": "dense", "precision": "fp32", '
    b'"shape": "s", "figures": {}, "at": 0}]}',
    "deep": b"[" * 100_000,
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_passed_over_and_replaced(file: Path, content: bytes) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    store = load(file)
    assert (store.entries, "damaged" in store.problem, str(file) in store.problem) == ((), True, True)
    assert record("cpu", config(), 1, {"step": 1.0}, file).problem == ""
    assert load(file).lookup("cpu", config()) == {"step": 1.0}


def test_a_folder_in_its_place_is_said(file: Path) -> None:
    file.mkdir(parents=True)
    assert "not used" in load(file).problem
    with pytest.raises(UserError, match="cannot be kept"):
        record("cpu", config(), 1, {"step": 1.0}, file)


def test_no_file_is_no_problem(file: Path) -> None:
    assert load(file).problem == ""
    assert calibration.path() == Path(os.environ["LUMINA_CACHE"]) / "planner-1.json"


def test_it_does_not_grow_for_ever(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MOST", 3)
    for number in range(5):
        record("cpu", config(), 1, {"step": number + 1.0}, file)
    assert [entry["figures"]["step"] for entry in json.loads(file.read_text())["entries"]] == [3.0, 4.0, 5.0]
    assert len(shape_of(config())) == 16
