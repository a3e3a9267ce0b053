"""Edits of the state: what each changes, what it leaves alone, and that it is a pure function."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import WHY, request, trained
from torch import Tensor

from lumina.config.overlay import Overlay, Value
from lumina.errors import UserError
from lumina.training import edits
from lumina.training.controls import SessionControls
from lumina.training.probe import Probe


def changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Value, kind: str = "hybrid"
) -> tuple[dict[str, Tensor], dict[str, Tensor], SessionControls]:
    """The state of a run behind step 4, before and after an edit, which is made twice from the same: equally."""
    found: list[Any] = []

    def edit(controls: SessionControls) -> None:
        course = controls.course
        one, point = Overlay("", key, value, 5, 5), course.take()
        before = {name: tensor.clone() for name, tensor in course.state.tensors().items()}
        edits.make(one, course.parts, course.probe)
        after = {name: tensor.clone() for name, tensor in course.state.tensors().items()}
        found.extend((before, after, controls))
        course.return_to(point)
        edits.make(one, course.parts, course.probe)
        assert all(torch.equal(tensor, after[name]) for name, tensor in course.state.tensors().items())

    trained(folder, request(folder, kind, train__steps=5), monkeypatch, {4: edit})
    return found[0], found[1], found[2]


def others(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def test_the_optimizer_is_as_new_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, controls = changed(tmp_path, monkeypatch, "optimizer.reset", 1)
    moments = [name for name in before if name.endswith((".momentum", ".exp_avg", ".exp_avg_sq", ".step"))]
    assert set(others(before, after)) <= set(moments)
    assert not any(after[name].any() for name in moments)
    assert any(before[name].any() for name in moments)
    assert all(before[name] == 4 for name in moments if name.endswith(".step"))
    assert controls.course.parts.optimizer.steps_taken == 1  # of the step that followed


def test_qk_clip_makes_the_largest_logit_tau_and_touches_gains_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the layers above it; the others stay as they are, to the bit."""
    seen: list[list[float]] = []
    make = edits.clip_logits

    def watched(model: Any, probe: Probe, tau: float) -> None:
        seen.append(probe.attention())
        make(model, probe, tau)
        seen.append(probe.attention())

    monkeypatch.setattr(edits, "clip_logits", watched)
    before, after, _ = changed(tmp_path, monkeypatch, "qk_clip", 3.0, "dense")
    assert max(seen[0]) > 3
    assert seen[1][0] == pytest.approx(3.0, rel=1e-5)  # nothing comes before it
    names = others(before, after)
    assert names
    assert all(name.endswith(("q_norm.weight", "k_norm.weight")) for name in names)
    scale = after["blocks.0.attn.q_norm.weight"] / before["blocks.0.attn.q_norm.weight"]
    assert scale.tolist() == pytest.approx([math.sqrt(3 / seen[0][0])] * len(scale))
    (tmp_path / "high").mkdir()
    assert others(*changed(tmp_path / "high", monkeypatch, "qk_clip", 900.0, "dense")[:2]) == []


def test_a_router_row_is_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, _ = changed(tmp_path, monkeypatch, "router.reset", [1, 2], "moe")
    router = "blocks.1.ffn.router"
    assert set(others(before, after)) == {
        f"{router}.weight", f"{router}.bias_E", f"{router}.weight.exp_avg", f"{router}.weight.exp_avg_sq"
    }  # fmt: skip
    for name in others(before, after):
        rest = [i for i in range(len(before[name])) if i != 2]
        assert torch.equal(before[name][rest], after[name][rest])
    row = after[f"{router}.weight"][2]
    assert 0.5 < row.std() / 0.02 < 1.5
    assert abs(row.mean()) < 0.01
    assert after[f"{router}.bias_E"][2] == 0
    assert not after[f"{router}.weight.exp_avg"][2].any()


def test_an_expert_becomes_the_most_loaded_one_with_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, _ = changed(tmp_path, monkeypatch, "expert.reseed", [0, 1], "moe")
    ffn = "blocks.0.ffn"
    hottest = int(before[f"{ffn}.router.fraction_E"].argmax())
    assert hottest != 1
    for leaf in ("w_gate_up", "w_down", "router.weight"):
        old, new = before[f"{ffn}.{leaf}"], after[f"{ffn}.{leaf}"]
        assert torch.equal(old[[0, 2, 3]], new[[0, 2, 3]])
        noise = new[1] - old[hottest]
        assert noise.square().mean().sqrt() / old[hottest].square().mean().sqrt() == pytest.approx(0.01, rel=0.3)
    assert after[f"{ffn}.router.bias_E"][1] == before[f"{ffn}.router.bias_E"][hottest]
    assert not after[f"{ffn}.w_down.momentum"][1].any()
    assert before[f"{ffn}.w_down.momentum"][1].any()
    assert all(name.startswith(ffn) for name in others(before, after))


def test_what_is_not_there_and_what_rests_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(controls: SessionControls) -> None:
        for value in ([2, 0], [0, 4]):
            with pytest.raises(UserError, match="no such expert"):
                controls.overlay(WHY, "router.reset", value)

    def rests(controls: SessionControls) -> None:
        for key, value in (("qk_clip", 100.0), ("bias_rate", 1e-3), ("expert.reseed", [0, 1])):
            with pytest.raises(UserError, match="adapters alone are trained"):
                controls.overlay(WHY, key, value)

    trained(tmp_path, request(tmp_path, "moe", train__steps=5), monkeypatch, {4: refused})
    adapters = request(tmp_path, "moe", train__steps=5, train__lora__rank=2)
    trained(tmp_path / "lora", adapters, monkeypatch, {4: rests})
