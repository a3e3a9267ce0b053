"""Choices that depend on the machine, its processes and the length of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import settings

from lumina.config.resolve import read, resolve, settle
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


def test_a_run_that_goes_on_with_another_number_of_processes_shares_the_cores_among_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    worlds = [World(0, n, 0, n) for n in (1, 2, 4, 8)]
    asked = {"model.seq_len": 64, "train.batch_tokens": 64 * 8, "train.micro_batch": 4}

    chosen = resolve("tiny", asked | {"parallel.threads": "auto"})
    settled = settle(chosen, machine.choose(chosen.config, World(0, 2, 0, 2)))
    adapted = [setup.adapt(settled, 2, world) for world in worlds]
    assert [config.parallel.threads for config in adapted] == [8, 4, 2, 1]
    assert [config.train.micro_batch for config in adapted] == [4, 4, 2, 1]
    assert adapted[1] == settled.config

    own = resolve("tiny", asked | {"parallel.threads": 3})
    assert [setup.adapt(own, 2, world).parallel.threads for world in worlds] == [3, 3, 2, 1]


def test_the_users_micro_batch_is_never_changed_silently() -> None:
    with pytest.raises(UserError, match=r"micro_batch=3 does not divide .* 4 sequences") as error:
        machine.require_micro_batch(
            config(**{"train.batch_tokens": 64 * 12, "train.micro_batch": 3}), World(0, 3, 0, 3)
        )
    assert "use 2 or 4" in error.value.fix


def test_each_process_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    machine.require_gpus("cuda", World(0, 2, 0, 2))
    machine.require_gpus("cuda", World(0, 16, 0, 2))
    machine.require_gpus("cpu", World(0, 8, 0, 8))
    with pytest.raises(UserError, match="4 processes on this machine, which has 2 GPUs") as error:
        machine.require_gpus("cuda", World(0, 4, 0, 4))
    assert "--nproc-per-node 2" in error.value.fix


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_recomputation_is_what_was_asked_for(mode: str, tmp_path: Path) -> None:
    resolved = resolve("tiny", settings(tmp_path, train__recompute=mode))
    corpus = setup.load_data(resolved.config)
    settled = setup.settle_all(resolved, corpus)[0].config
    assert {block.recompute for block in setup.build(settled, corpus).model.units} == {mode}


def test_a_step_has_as_many_micro_batches_as_were_asked_for(tmp_path: Path) -> None:
    resolved = resolve("tiny", settings(tmp_path, train__micro_batch=2))
    corpus = setup.load_data(resolved.config)
    settled = setup.settle_all(resolved, corpus)[0].config
    assert setup.build(settled, corpus).plan.micro_batches == 4  # of two sequences each
