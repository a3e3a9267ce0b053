"""Choices that depend on the machine, its processes and the length of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import settings

from lumina.config.resolve import read, resolve
from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.parallel.world import ALONE, World
from lumina.telemetry.console import Console
from lumina.training import machine, setup
from lumina.training.trainer import Trainer


def config(**keys: Any) -> Config:
    return resolve("tiny", {"parallel.threads": "auto", **keys}).config


@pytest.mark.parametrize(("processes", "threads"), [(1, 8), (2, 4), (3, 2), (16, 1)])
def test_processes_of_one_machine_share_its_cores(
    processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    keys = config(**{"train.batch_tokens": 64 * 48})
    assert machine.choose(keys, World(0, processes, 0, processes))["parallel.threads"][0] == threads


@pytest.mark.parametrize(("processes", "limit", "sequences"), [(1, 8, 8), (2, 8, 4), (4, 8, 2), (8, 8, 1), (2, 3, 2)])
def test_a_micro_batch_divides_a_process_part(processes: int, limit: int, sequences: int) -> None:
    assert machine.micro_batch(config(), World(0, processes, 0, processes), limit) == sequences


def test_a_batch_that_does_not_divide_names_what_would() -> None:
    with pytest.raises(UserError, match="8 sequences do not divide among 3 processes") as error:
        machine.micro_batch(config(), World(0, 3, 0, 3), 8)
    assert "start 2 or 4 processes" in error.value.fix


def test_compiling_is_for_long_runs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "compiler_missing", lambda device: None)
    flops = 1e6 * config().train.batch_tokens  # of one step at a million a token
    pays = machine.COMPILE_SECONDS / machine.COMPILE_SAVES
    short, long = (machine.choose_compile(config(), steps, 1e6, flops) for steps in (int(pays) - 1, int(pays) + 1))
    assert (short[0], long[0]) == ("off", "on")
    assert f"{pays:.0f}s" in short[1]
    assert f"{pays:.0f}s" in long[1]
    monkeypatch.setattr(machine, "compiler_missing", lambda device: "a C++ compiler")
    assert machine.choose_compile(config(), 10**9, 1e6, flops) == ("off", "there is no C++ compiler here")
    assert machine.choose(config(), ALONE).keys().isdisjoint({"train.compile"})


def test_the_decision_to_compile_is_printed_and_stored(tmp_path: Path) -> None:
    said: list[str] = []
    keys = settings(tmp_path) | {"train.compile": "auto", "train.steps": 2, "checkpoint.every": 0}
    run = Trainer("tiny", root=tmp_path / "runs", listeners=[Console(show=said.append)], **keys).fit()
    (started,) = [event for event in run.events() if event["t"] == "run"]
    why = started["choices"]["train.compile"]
    assert started["compile"] == "off"
    assert "compiling pays from" in why
    assert f"       compile off: {why}" in said
    assert f"  compile: off  # resolved: {why}" in run.config.read_text()
    assert read(run.config).origins["train.compile"] == f"resolved: {why}"


def test_a_run_that_goes_on_with_more_processes_takes_no_more_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "usable_cores", lambda: 8)
    settled = config(**{"parallel.threads": 8})
    threads = [setup.adapt(settled, World(0, n, 0, n)).parallel.threads for n in (1, 2, 16)]
    assert threads == [8, 4, 1]
    assert setup.adapt(config(**{"parallel.threads": 2}), World(0, 2, 0, 2)).parallel.threads == 2


def test_a_step_has_as_many_micro_batches_as_were_asked_for(tmp_path: Path) -> None:
    resolved = resolve("tiny", settings(tmp_path, train__micro_batch=2))
    corpus = setup.load_data(resolved.config)
    settled = setup.settle_all(resolved, corpus)[0].config
    assert setup.build(settled, corpus).plan.micro_batches == 4  # of two sequences each
