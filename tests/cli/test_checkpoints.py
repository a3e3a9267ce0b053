"""`lumina checkpoints`: listed, verified, pruned, compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import contents, settings

from lumina.checkpoint import retention, store
from lumina.checkpoint.difference import difference
from lumina.cli import main
from lumina.run.folder import Run
from lumina.run.lock import RunLock
from lumina.training.trainer import Trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("made")
    keys = settings(here, "dense", train__eval_every=4, checkpoint__keep_last=3, train__steps=8)
    Trainer("tiny", root=here / "runs", **keys).fit().path.rename(here / "run")
    return here / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Run:
    shutil.copytree(made, tmp_path / "run", symlinks=True)
    return Run(tmp_path / "run")


def ask(run: Run, *options: str) -> list[str]:
    return ["checkpoints", str(run.path), *options]


def listed(run: Run, capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> dict[int, dict[str, Any]]:
    assert main(ask(run, "--json", *options)) == code
    return {row["step"]: row for row in json.loads(capsys.readouterr().out)}


def flip(run: Run, step: int) -> None:
    (path,) = (store.folder(run.checkpoints, step) / "model").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def steps(run: Run) -> list[int]:
    return sorted(map(store.step_of, store.checkpoints(run.checkpoints)))


def test_each_is_listed_with_what_keeps_it_also_while_the_run_trains(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (store.folder(run.checkpoints, 6) / "state.json").unlink()
    retention.pin(run.checkpoints, {4: "before decision 1"})
    before = contents(run.path)
    losses = {event["step"]: event["loss"] for event in run.events() if event["t"] == "eval"}
    with RunLock(run.lock):
        rows = listed(run, capsys)
    assert contents(run.path) == before
    assert list(rows) == [8, 6, 4]
    assert {step: row["state"] for step, row in rows.items()} == {8: "complete", 6: "incomplete", 4: "complete"}
    assert {step: row["heldout_loss"] for step, row in rows.items()} == {8: losses[8], 6: None, 4: losses[4]}
    assert rows[8]["kept_by"] == ["newest", "best", "link latest", "link best"]
    assert rows[4]["kept_by"] == ["newest", "pinned: before decision 1"]
    assert rows[6]["kept_by"] is None
    files = [file for file in store.folder(run.checkpoints, 8).rglob("*") if file.is_file()]
    assert rows[8]["bytes"] == sum(file.stat().st_size for file in files if file.name != "COMPLETE")
    assert rows[8]["problems"] is None
    assert main(ask(run)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["step", "state", "kept", "by", "attempt", "loss", "size", "age"]
    assert "pinned: before decision 1" in said[3]


def test_verifying_reads_every_byte(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert {row["state"] for row in listed(run, capsys, "--verify").values()} == {"verified"}
    flip(run, 6)
    assert listed(run, capsys)[6]["state"] == "complete"  # nothing was read
    rows = listed(run, capsys, "--verify", code=2)
    assert (rows[6]["state"], rows[8]["state"]) == ("damaged", "verified")
    assert main(ask(run, "--verify")) == 2
    said = capsys.readouterr().out
    assert "! step-000006: model/" in said
    assert "has other bytes than were saved" in said


def test_pruning_says_what_it_would_do_and_does_it_when_told(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run, 8)
    aside = run.checkpoints / "step-000002.damaged"
    shutil.copytree(store.folder(run.checkpoints, 4), aside)
    before = contents(run.path)
    assert main(ask(run, "--prune", "--keep-last", "1")) == 0
    said = capsys.readouterr().out
    assert "would delete step-000008: damaged: model/" in said
    assert "would delete step-000002.damaged: damaged: it was set aside" in said
    assert "would delete step-000004" not in said  # it is the best of what is sound
    assert "step-000006" not in said
    assert contents(run.path) == before
    assert main(ask(run, "--prune", "--keep-last", "1", "--yes", "--json")) == 0
    done = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in done["checkpoints"]} == {"step-000008", "step-000002.damaged"}
    assert steps(run) == [4, 6]
    assert not aside.exists()
    assert (run.checkpoints / "latest").resolve().name == "step-000006"
    assert not (run.checkpoints / "best").is_symlink()
    assert main(ask(run, "--prune")) == 0
    assert capsys.readouterr().out == "nothing to delete\n"


def test_a_sound_one_is_always_left(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (4, 6, 8):
        flip(run, step)
    assert main(ask(run, "--prune", "--yes")) == 2
    assert "nothing would be left" in capsys.readouterr().err
    assert steps(run) == [4, 6, 8]


def test_what_trains_is_not_pruned_from_outside(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(run.lock):
        assert main(ask(run, "--prune", "--yes")) == 2
    assert "in use by process" in capsys.readouterr().err


def test_the_difference_is_that_of_the_tensors(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ask(run, "--diff", "4", "latest", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    old, new = (
        {name: tensor for file in (store.folder(run.checkpoints, step) / "model").iterdir()
         for name, tensor in load_file(file).items()}
        for step in (4, 8)
    )  # fmt: skip
    told = {t["name"]: t for t in found["tensors"] if t["name"].startswith("model/")}
    assert told.keys() == {f"model/{name}" for name in old if not torch.equal(old[name], new[name])}
    name = "blocks.0.attn.w_qkv"
    moved = new[name].double() - old[name].double()
    assert told[f"model/{name}"]["relative"] == pytest.approx((moved.norm() / old[name].double().norm()).item())
    assert told[f"model/{name}"]["largest"] == moved.abs().max().item()
    relative = [t["relative"] for t in found["tensors"]]
    assert relative == sorted(relative, reverse=True)
    assert found["values"]["progress.step"] == [4, 8]
    assert (found["unlike"], found["only_before"], found["only_after"]) == ([], [], [])
    assert main(ask(run, "--diff", "4", "step-000008")) == 0
    said = capsys.readouterr().out
    assert said.startswith("step-000004 -> step-000008: ")
    assert "progress.step: 4 -> 8" in said
    assert main(ask(run, "--diff", "8", "8", "--json")) == 0
    same = json.loads(capsys.readouterr().out)
    assert (same["tensors"], same["values"]) == ([], {})
    assert same["equal"] > len(old)


def test_tensors_of_one_only_and_of_other_shapes_are_named(tmp_path: Path) -> None:
    old = {"a": torch.ones(2), "b": torch.ones(3), "z": torch.zeros(2), "h": torch.ones(2, dtype=torch.bfloat16)}
    new = {"a": torch.ones(2, 1), "c": torch.ones(3), "z": torch.ones(2), "h": torch.full((2,), 3.0).bfloat16()}
    store.save(tmp_path, 1, old, {}, {"x": 1, "deep": {"y": float("nan")}})
    store.save(tmp_path, 2, new, {}, {"deep": {"y": float("nan"), "z": [1]}})
    found = difference(*(store.read(store.folder(tmp_path, step)) for step in (1, 2)))
    assert found["unlike"] == [{"name": "model/a", "before": "float32 [2]", "after": "float32 [2, 1]"}]
    assert (found["only_before"], found["only_after"]) == (["model/b"], ["model/c"])
    assert found["tensors"] == [
        {"name": "model/z", "shape": [2], "relative": float("inf"), "largest": 1.0},
        {"name": "model/h", "shape": [2], "relative": 2.0, "largest": 2.0},
    ]
    assert found["values"] == {"deep.z": [None, [1]], "x": [1, None]}


def test_rows_of_several_processes_are_put_together(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    for step in (1, 2):
        store.save(tmp_path, step, {"w": whole}, {}, {})
    folder = store.folder(tmp_path, 2) / "model"
    shutil.rmtree(folder)
    write_pieces(folder, whole)
    found = difference(store.read(store.folder(tmp_path, 1)), store.Checkpoint(store.folder(tmp_path, 2), 2, {}))
    assert (found["equal"], found["tensors"]) == (1, [])


def write_pieces(folder: Path, whole: torch.Tensor) -> None:
    """Two files, as two processes write them, the later rows first by name."""
    from safetensors.torch import save_file

    folder.mkdir()
    for name, rows in (("a", slice(3, 4)), ("b", slice(0, 3))):
        placed = json.dumps({"w": {"saved_offsets": [rows.start, 0]}})
        meta = {"DCP_SHARDING_INFO": placed}
        save_file({"w": whole[rows].contiguous()}, folder / f"{name}.safetensors", metadata=meta)
