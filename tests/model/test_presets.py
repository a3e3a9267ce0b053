"""A preset is what its name says, counted where the model stands without memory; and what does not fit says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support import KINDS, settings

from lumina.cli import main
from lumina.config.resolve import presets, resolve
from lumina.model.cost import count, state_bytes
from lumina.model.transformer import Transformer
from lumina.training import memory, setup
from lumina.training.optim import Optimizer

UNITS = {"b": 10**9, "debug_": 10**6}
NAMED = [name for name in presets() if re.search(r"\d", name)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMED)
def test_a_preset_is_as_large_as_its_name_says(name: str, kind: str) -> None:
    config = resolve(name, {"model.kind": kind}).config.model
    match = re.fullmatch(r"(b|debug_)(\d+)m?", name)
    assert match
    assert count(config).active == pytest.approx(UNITS[match[1]] * int(match[2]), rel=0.05)
    with torch.device("meta"):
        model = Transformer(config)
    parameters = list(model.parameters())
    assert count(config).total == sum(p.numel() for p in parameters)
    assert all(p.is_meta for p in parameters)


@pytest.mark.parametrize("name", NAMED)
def test_shapes_are_what_hardware_likes(name: str) -> None:
    config = resolve(name).config.model
    assert config.moe is not None
    assert config.head_dim in (64, 128)
    assert config.width == config.heads * config.head_dim
    assert config.ffn % 64 == config.moe.ffn % 64 == config.vocab % 64 == 0
    assert config.moe.experts >= 8


@pytest.mark.parametrize("precision", ["fp32", "bf16_pure"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_tensors(kind: str, optimizer: str, precision: str, tmp_path: Path) -> None:
    keys = {"train.optimizer": optimizer, "precision.mode": precision, "model.tied": False, "checkpoint.every": 0}
    resolved = resolve("tiny", settings(tmp_path, kind) | keys)
    corpus = setup.load_data(resolved.config)
    parts = setup.build(setup.settle_all(resolved, corpus)[0].config, corpus)
    assert isinstance(parts.optimizer, Optimizer)
    counted = state_bytes(resolved.config.model, optimizer, precision)
    assert counted.weights == counted.gradients == sum(p.nbytes for p in parts.model.parameters())
    assert counted.moments == sum(t.nbytes for t in parts.optimizer.tensors().values())


@pytest.mark.parametrize(
    "arguments",
    [["b300"], ["tiny", "model.layers=4096", "model.width=131072"], ["debug", "model.vocab=16M", "model.width=8k"]],
)
def test_what_cannot_fit_says_so_before_anything_is_made(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("too early")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "usable", lambda device="cpu": 24 * 2**30)
    for place in ("prepare", "Transformer"):
        monkeypatch.setattr(setup, place, never)
    assert main(["train", *arguments]) == 2
    said = capsys.readouterr().err
    assert "does not fit" in said
    assert "here are 24.0 GiB" in said
    assert re.search(r"train the preset (b1|debug_200m), which fits", said)
    assert all(argument in said for argument in arguments[1:2] if "vocab" not in argument)
    assert list(tmp_path.iterdir()) == []


def test_processes_share_what_does_not_fit_one(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve("b1", {"model.kind": "dense"})
    whole = memory.needed(resolved.config).total
    monkeypatch.setattr(memory, "usable", lambda device="cpu": whole - 1)
    assert not memory.fits(resolved.config)
    assert not memory.fits(resolved.config, processes=2, local=2)  # one machine's memory is one
    assert memory.fits(resolved.config, processes=2, local=1)
    memory.require(resolved, processes=2)


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_LIMIT", limit)
    free = memory.usable()
    limit.write_text("1000000\n")
    assert memory.usable() == 1000000
    limit.write_text("max\n")
    assert memory.usable() == free
