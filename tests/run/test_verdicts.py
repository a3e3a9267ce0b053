"""The store of verdicts: nothing twice, nothing lost to a torn line, versions apart, a run's own copy as it began."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

import pytest

import lumina
from lumina.config.resolve import resolve
from lumina.config.schema.config import Config
from lumina.errors import DiskRefused
from lumina.orchestrator.confidence import Verdict
from lumina.run import index, verdicts
from lumina.run.folder import Run
from lumina.run.overview import overview
from lumina.run.verdicts import copy_into, keep, known, stores, version


def verdict(step: int, won: bool = True, run: str = "a") -> dict[str, Any]:
    return Verdict("drift", "lr.scale down", won, 0.01, 0.001, 0.004, "dense", run, step, f"id of {run}").pack()


def config(**keys: Any) -> Config:
    return resolve("tiny", keys).config


def lines(root: Path, version: str = "v") -> list[bytes]:
    return (root / verdicts.FOLDER / f"{version}.jsonl").read_bytes().splitlines()


def test_what_is_brought_again_is_not_kept_again(tmp_path: Path) -> None:
    assert keep(tmp_path, "v", []) == 0
    assert not any(tmp_path.iterdir())  # no folder for nothing
    assert keep(tmp_path, "v", [verdict(1)]) == 1
    assert keep(tmp_path, "v", [verdict(1), verdict(2)]) == 1
    assert keep(tmp_path, "v", [verdict(1), verdict(2)]) == 0
    assert stores(tmp_path) == {"v": [verdict(1), verdict(2)]}


def test_a_later_word_on_the_same_is_kept_also_if_it_was_the_first(tmp_path: Path) -> None:
    for won in (True, False, True):
        assert keep(tmp_path, "v", [verdict(1, won)]) == 1
    assert [one["won"] for one in stores(tmp_path)["v"]] == [True, False, True]


@pytest.mark.parametrize("torn", [b'{"fault":"dri', b"\xff\xfe", b"[1]", b"[" * 100_000, b"\n\n"])
def test_a_line_that_is_none_costs_only_itself(torn: bytes, tmp_path: Path) -> None:
    keep(tmp_path, "v", [verdict(1)])
    with (tmp_path / verdicts.FOLDER / "v.jsonl").open("ab") as file:
        file.write(torn)
    assert stores(tmp_path)["v"] == [verdict(1)]
    assert keep(tmp_path, "v", [verdict(1), verdict(2)]) == 1
    assert stores(tmp_path)["v"] == [verdict(1), verdict(2)]


def test_a_disk_that_takes_half_costs_that_and_no_more(tmp_path: Path) -> None:
    keep(tmp_path, "v", [verdict(1)])
    size, (soft, hard) = len(lines(tmp_path)[0]) + 1, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, hard))
    try:
        with pytest.raises(DiskRefused, match="no room left"):
            keep(tmp_path, "v", [verdict(2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(lines(tmp_path)) == 2  # the second one torn
    assert keep(tmp_path, "v", [verdict(2)]) == 1
    assert stores(tmp_path)["v"] == [verdict(1), verdict(2)]


def test_a_store_that_cannot_be_written_or_read_says_so(tmp_path: Path) -> None:
    (tmp_path / verdicts.FOLDER).write_text("")
    with pytest.raises(DiskRefused, match="cannot be read: Not a directory"):
        keep(tmp_path, "v", [verdict(1)])
    os.unlink(tmp_path / verdicts.FOLDER)
    (tmp_path / verdicts.FOLDER / "v.jsonl").mkdir(parents=True)
    with pytest.raises(DiskRefused, match="cannot be read: Is a directory"):
        stores(tmp_path)


def _keep_many(root: Path, name: str) -> None:
    for step in range(50):
        keep(root, "v", [verdict(step, run=name)])


def test_runs_that_keep_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [multiprocessing.get_context("fork").Process(target=_keep_many, args=(tmp_path, str(i))) for i in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {(one["run"], one["step"]) for one in map(json.loads, lines(tmp_path))} == {
        (str(i), step) for i in (1, 2) for step in range(50)
    }


def test_a_run_knows_what_was_known_when_it_began(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "tiny")
    copy_into(run, "v")
    assert list(run.path.iterdir()) == []  # nothing was known
    assert known(run) == []
    keep(tmp_path, "v", [verdict(1)])
    keep(tmp_path, "other", [verdict(2)])
    copy_into(run, "v")
    keep(tmp_path, "v", [verdict(3)])
    assert known(run) == [verdict(1)]


def test_the_store_is_no_run(tmp_path: Path) -> None:
    keep(tmp_path, "v", [verdict(1)])
    assert index.runs(tmp_path) == overview(tmp_path) == []


@pytest.mark.parametrize(
    ("keys", "ends"),
    [
        ({"model.kind": "dense"}, "-dense-muon-wsd"),
        ({"model.kind": "moe", "train.optimizer": "adamw"}, "-moe-sigmoid-adamw-wsd"),
        ({"model.kind": "mod", "train.schedule": "cosine"}, "-mod-learned-predictor-muon-cosine"),
        ({"model.kind": "hybrid"}, "-hybrid-sigmoid-learned-predictor-muon-wsd"),
        ({"model.kind": "dense", "train.lora.rank": 4}, "-dense-muon-wsd-adapters"),
    ],
)
def test_a_version_is_of_the_code_and_the_architecture(keys: dict[str, Any], ends: str) -> None:
    assert version(config(**keys)) == verdicts.code() + ends


def test_sizes_data_and_rates_are_of_the_same_version() -> None:
    other = {"model.layers": 2, "train.lr": 1e-4, "train.batch_tokens": 256, "train.seed": 7}
    assert version(config(**other)) == version(config())


def test_the_code_that_decides_is_there_and_what_only_tells_is_none_of_it() -> None:
    package = Path(lumina.__file__).parent
    found = {
        file.relative_to(package).as_posix() for name in verdicts.DECIDES for file in verdicts._sources(package / name)
    }
    assert {
        "orchestrator/policy.py",
        "orchestrator/detectors/spike.py",
        "training/arms.py",
        "config/overlay.py",
    } <= found
    assert all((package / name).exists() for name in verdicts.DECIDES)
    assert all((package / "orchestrator" / name).exists() for name in verdicts.TELLS)
    assert not {name.rpartition("/")[2] for name in found} & set(verdicts.TELLS)
