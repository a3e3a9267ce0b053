"""Number formats: which one is chosen where, what each keeps in which dtype, and how fp16 survives an overflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import settings

import lumina
from lumina.config.resolve import read, resolve
from lumina.errors import UserError
from lumina.run.folder import Run
from lumina.telemetry.console import Console
from lumina.training import machine, setup
from lumina.training.precision import FIRST_SCALE, GROWTH_INTERVAL, LossScale, Precision
from lumina.training.trainer import Trainer


def train(folder: Path, **keys: Any) -> Run:
    return Trainer("tiny", root=folder / "runs", fresh=True, **(settings(folder) | {"train.steps": 8} | keys)).fit()


def losses(run: Run, kind: str = "step") -> list[float]:
    return [event["loss"] for event in run.events() if event["t"] == kind]


@pytest.mark.parametrize(
    ("device", "features", "mode"),
    [
        ("cpu", {"cpu_has_fast_bf16": True}, "bf16"),
        ("cpu", {"cpu_has_fast_bf16": False}, "fp32"),
        ("mps", {"mps_has_bf16": True}, "bf16"),
        ("mps", {"mps_has_bf16": False}, "fp32"),
        ("cuda", {"capability": (9, 0)}, "bf16"),
        ("cuda", {"capability": (8, 0)}, "bf16"),
        ("cuda", {"capability": (7, 5)}, "fp16"),
    ],
)
def test_auto_takes_what_the_hardware_multiplies(
    device: str, features: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability = features.pop("capability", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for name, value in features.items():
        monkeypatch.setattr(machine, name, lambda value=value: value)
    chosen, why = machine.choose_precision(device)
    assert chosen == mode
    assert why


def test_an_asked_for_format_is_never_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_has_fast_bf16", lambda: False)
    for mode in ("fp32", "bf16", "fp16", "bf16_pure"):
        choices = machine.choose(resolve("tiny", {"precision.mode": mode}).config)
        assert "precision.mode" not in choices
        assert choices["precision.eval"][0] == mode.removesuffix("_pure")
    monkeypatch.setattr(machine, "mps_has_bf16", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UserError, match="does not multiply bf16"):
        machine.choose(resolve("tiny", {"precision.mode": "bf16", "parallel.device": "mps"}).config)


@pytest.mark.parametrize("mode", ["bf16", "fp16", "bf16_pure"])
def test_every_format_learns_as_fp32_does_and_its_model_writes(mode: str, tmp_path: Path) -> None:
    want, run = losses(train(tmp_path)), train(tmp_path, **{"precision.mode": mode})
    got = losses(run)
    assert got != want
    assert got[-1] == pytest.approx(want[-1], abs=0.1)
    assert got[-1] < got[0] - 0.5
    assert isinstance(lumina.load(run).generate("line", max_tokens=5), str)


@pytest.mark.parametrize(
    ("mode", "dtype"), [("bf16", torch.float32), ("fp16", torch.float32), ("bf16_pure", torch.bfloat16)]
)
def test_weights_and_moments_have_the_formats_of_the_table(mode: str, dtype: torch.dtype, tmp_path: Path) -> None:
    resolved = resolve("tiny", settings(tmp_path) | {"precision.mode": mode})
    corpus = setup.load_data(resolved.config)
    parts = setup.build(setup.settle_all(resolved, corpus)[0].config, corpus)
    assert {p.dtype for p in parts.model.parameters()} == {dtype}
    assert {b.dtype for b in parts.model.buffers() if b.is_floating_point()} == {torch.float32}
    moments = {name: t.dtype for name, t in parts.optimizer.tensors().items() if not name.startswith("loss_scale")}
    assert set(moments.values()) == {dtype}
    assert (parts.optimizer.loss_scale is not None) == (mode == "fp16")
    saved = {"loss_scale", "loss_scale.good_steps"} & parts.optimizer.tensors().keys()
    assert len(saved) == (2 if mode == "fp16" else 0)


def test_evaluation_has_its_own_format(tmp_path: Path) -> None:
    same, other = train(tmp_path), train(tmp_path, **{"precision.eval": "bf16"})
    assert losses(same) == losses(other)
    assert losses(same, "eval") != losses(other, "eval")
    assert losses(same, "eval") == pytest.approx(losses(other, "eval"), abs=0.02)
    assert read(same.config).config.precision.eval == "fp32"  # settled and stored


def test_the_loss_scale_halves_on_an_overflow_and_grows_after_good_steps() -> None:
    scale = LossScale("cpu")
    scale.update(torch.ones(()))
    assert scale.scale.item() == FIRST_SCALE / 2
    for _ in range(GROWTH_INTERVAL):
        scale.update(torch.zeros(()))
    assert scale.scale.item() == FIRST_SCALE
    gradient = torch.full((3,), 2.0)
    scale.unscale([gradient])
    assert gradient.tolist() == [2.0 / FIRST_SCALE] * 3


def test_an_overflow_moves_nothing_halves_the_scale_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lumina.training.precision.FIRST_SCALE", 2.0**40)  # overflows in any fp16 backward pass
    said: list[str] = []
    keys = settings(tmp_path, "dense") | {"train.steps": 3, "precision.mode": "fp16"}
    listener = Console(1, said.append)
    run = Trainer("tiny", root=tmp_path / "runs", listeners=[listener], **keys).fit()
    decisions = [event for event in run.events() if event["t"] == "decision"]
    assert [event["rule"] for event in decisions] == ["overflow"] * 3
    assert [event["evidence"]["halved_to"] for event in decisions] == [2.0**39, 2.0**38, 2.0**37]
    assert any("fp16 gradients overflowed; no weight was moved" in line for line in said)
    steps = [event for event in run.events() if event["t"] == "step"]
    assert all(event["loss"] < 6 for event in steps)


def test_pure_bf16_is_not_evaluated_in_another_format() -> None:
    with pytest.raises(UserError, match="evaluated in bf16"):
        resolve("tiny", {"precision.mode": "bf16_pure", "precision.eval": "fp32"})
    assert not torch.is_autocast_enabled("cpu")
    with Precision("bf16", "fp32", "cpu").evaluating():
        assert not torch.is_autocast_enabled("cpu")
    with Precision("bf16", "fp32", "cpu").training():
        assert torch.is_autocast_enabled("cpu")
