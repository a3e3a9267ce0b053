"""A preset is what its name says, counted where the model stands without memory; and what does not fit says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support import KINDS

import lumina
from lumina.cli import main
from lumina.config.resolve import presets, resolve, write
from lumina.errors import UserError
from lumina.model.cost import count, state_bytes
from lumina.model.transformer import Transformer
from lumina.parallel.world import ALONE
from lumina.planner import hardware
from lumina.run.folder import Run
from lumina.training import memory, setup
from lumina.training.optim import Optimizer
from lumina.training.precision import Precision
from lumina.training.trainer import resume

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


@pytest.mark.parametrize("name", NAMED)
def test_a_preset_says_what_it_is_for_and_its_bytes_are_true(name: str) -> None:
    first = (Path(lumina.__file__).parent / "config" / "presets" / f"{name}.yaml").read_text().splitlines()[0]
    said = re.fullmatch(r"# .+ Weights, gradients and moments: (\d+) GiB\.", first)
    assert said
    config = resolve(name).config
    assert int(said[1]) == round(state_bytes(config.model, config.train.optimizer, "fp32").total / 2**30)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16_pure"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_tensors(kind: str, optimizer: str, precision: str, tied: bool) -> None:
    keys = {"model.kind": kind, "train.optimizer": optimizer, "precision.mode": precision, "model.tied": tied}
    config = resolve("tiny", keys).config
    model = setup.build_model(config, Precision.of(config.precision, "cpu"), ALONE)
    counted = state_bytes(config.model, optimizer, precision)
    buffers = sum(model.tensors()[name].nbytes for name, _ in model.named_buffers() if name in model.tensors())
    assert counted.weights == counted.gradients == sum(t.nbytes for t in model.tensors().values()) - buffers
    assert counted.moments == sum(t.nbytes for t in Optimizer(model, config.train).tensors().values())


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
    assert "`lumina train debug_200m" in said
    assert all(re.search(rf"make .*{key}=.* smaller", said) for key in (a.split("=")[0] for a in arguments[1:]))
    assert list(tmp_path.iterdir()) == []


def refusal(source: str, memory_bytes: int, monkeypatch: pytest.MonkeyPatch, **keys: object) -> str:
    """What is said where this machine has so many bytes; `keys` with `__` for the dot."""
    monkeypatch.setattr(memory, "usable", lambda device="cpu": memory_bytes)
    with pytest.raises(UserError) as caught:
        memory.require(resolve(source, {key.replace("__", "."): value for key, value in keys.items()}))
    return str(caught.value)


def test_only_keys_that_enlarge_the_preset_are_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal("b300", 24 * 2**30, monkeypatch, model__layers=48, model__kv_heads=64, model__head_dim=128)
    assert "make model.kv_heads=64 smaller" in said
    assert "make" not in refusal("b300", 24 * 2**30, monkeypatch, model__layers=48)


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_that_is_named_fits_and_the_next_larger_does_not(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, object] = {"train__optimizer": "adamw", "precision__mode": "bf16_pure"}
    said = refusal("b300", 60 * 2**30, monkeypatch, model__kind=kind, **kept)  # in fp32 less fits
    command = re.search(r"`lumina train ([^`]+)` fits", said)
    assert command
    name, *settings = command[1].split()
    as_kept = [f"{key.replace('__', '.')}={value}" for key, value in kept.items()]
    assert settings[-2:] == as_kept  # typed as it is, the command keeps what the user asked for
    chosen = resolve(name, settings).config
    assert chosen.model.kind == kind
    assert memory.fits(chosen)
    larger = presets()[presets().index(name) + 1]
    assert not memory.fits(resolve(larger, [f"model.kind={kind}", *as_kept]).config)


def test_where_nothing_fits_no_preset_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal("tiny", 1000, monkeypatch)
    assert "lumina train" not in said
    assert "torchrun" in said


def test_a_run_that_came_from_a_larger_machine_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path, "b300")
    write(resolve("b300"), run.config)
    run.write_meta({"request": "", "data": "", "started_in": str(tmp_path)})
    before = {path: path.read_bytes() for path in run.path.iterdir()}
    monkeypatch.setattr(memory, "usable", lambda device="cpu": 24 * 2**30)
    monkeypatch.setattr(setup, "prepare", lambda **_: pytest.fail("too early"))
    with pytest.raises(UserError, match="does not fit"):
        resume(run)
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before


def test_processes_share_what_does_not_fit_one(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve("b1", {"model.kind": "dense"})
    whole = memory.needed(resolved.config).total
    monkeypatch.setattr(memory, "usable", lambda device="cpu": whole - 1)
    assert not memory.fits(resolved.config)
    assert not memory.fits(resolved.config, processes=2, local=2)  # one machine's memory is one
    assert memory.fits(resolved.config, processes=2, local=1)
    memory.require(resolved, processes=2)
    with pytest.raises(UserError, match="in each of 2 processes"):
        memory.require(resolved, processes=2, local=2)


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    free = memory.usable()
    limit.write_text("1000000\n")
    assert memory.usable() == hardware.free_memory() == 1000000
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 200000\ninactive_file 100000\nactive_file 50000\n")
    assert memory.usable() == 1000000
    assert hardware.free_memory() == 250000
    limit.write_text("max\n")
    assert memory.usable() == free
