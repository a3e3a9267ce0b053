"""Each invariant holds in a sound run of every kind, and a fault that breaks it is told in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import STEPS, request, trained
from support import KINDS

from lumina.data.loader import Batch, Loader
from lumina.run.folder import Run
from lumina.training import invariants
from lumina.training.controls import SessionControls
from lumina.training.course import Course
from lumina.training.optim import Optimizer
from lumina.training.trainer import Trainer

Plant = Callable[[SessionControls], object]
BATCH, STEP = Loader.batch, Optimizer.step


def told(run: Run) -> dict[int, list[str]]:
    """What was broken, by step; a look's and a step's."""
    found: dict[int, list[str]] = {}
    for event in run.events():
        if event["t"] in ("step", "probe"):
            found.setdefault(event["step"], []).extend(event.get("broken", ()))
    return {step: said for step, said in found.items() if said}


VARIANTS: list[dict[str, Any]] = [
    *({"kind": kind} for kind in KINDS),
    {"kind": "moe", "train__optimizer": "adamw", "model__moe__score": "softmax", "model__tied": False},
    {"kind": "hybrid", "precision__mode": "bf16_pure", "model__mod__routing": "random", "model__mod__anneal": 6},
    {"kind": "dense", "data__mode": "hybrid_sequential", "data__base_ratio": 0.5, "train__schedule": "cosine"},
    {"kind": "mod", "train__lora__rank": 4},
    {"kind": "hybrid", "precision__mode": "fp16"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(str(x) for x in v.values()))
def test_a_sound_run_breaks_none(variant: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumina.training.precision.FIRST_SCALE", 2.0**22)  # fp16 overflows in some steps
    run = Trainer("tiny", root=tmp_path / "runs", **request(tmp_path, **variant)).fit()
    assert told(run) == {}
    assert [event["step"] for event in run.events() if event["t"] == "probe"] == [2, 4, 6, 8]


def faulty(loader: Loader, i: int, *how: Any) -> Batch:
    return BATCH(loader, 5 + i % 2 if i > 6 else i, *how)


def stale(loader: Loader, i: int, *how: Any) -> Batch:
    """Says that it is the planned one, and holds what an earlier one held."""
    batch = BATCH(loader, i, *how)
    return replace(batch, ids_BS=BATCH(loader, 5).ids_BS) if i == 8 else batch


def shifted(loader: Loader, i: int, *how: Any) -> Batch:
    batch = BATCH(loader, i, *how)
    return replace(batch, targets_BS=batch.targets_BS.roll(1, 1))


def times(factor: float) -> Any:
    return lambda optimizer, lr, skip: STEP(optimizer, lr * factor, skip)


def set_group(name: str, value: Any) -> Plant:
    def plant(controls: SessionControls) -> None:
        for group in controls.course.parts.optimizer.adamw.param_groups:
            group[name] = value

    return plant


def decay(controls: SessionControls, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(optimizer: Optimizer, lr: float, skip: torch.Tensor) -> None:
        optimizer.weight_decay *= 300
        STEP(optimizer, lr, skip)

    monkeypatch.setattr(Optimizer, "step", step)


def rest(controls: SessionControls) -> None:
    """A parameter that the optimizer has lost."""
    muon = controls.course.parts.optimizer.muon
    muon.matrices = {name: w for name, w in muon.matrices.items() if name != "blocks.1.attn.w_out"}


def push(controls: SessionControls) -> None:
    controls.course.parts.model.moes[0].router.bias_E.sub_(5.0)


def blow(controls: SessionControls) -> None:
    """An expert that gets no token any more: no loss meets it."""
    moe = controls.course.parts.model.moes[0]
    with torch.no_grad():
        moe.w_down[0, 0, 0] = float("inf")
        moe.router.bias_E[0] = -50.0


def edit(controls: SessionControls) -> None:
    controls.course.config.train.__dict__["clip"] = 7.0


def lose_steps(controls: SessionControls) -> None:
    controls.course.parts.optimizer.steps_taken = 0


PLANTED: dict[str, tuple[Callable[[SessionControls, pytest.MonkeyPatch], object], int, str]] = {
    "lr": (lambda c, m: m.setattr(Optimizer, "step", times(100)), 7, "schedule: the optimizer moved at lr 0.3, "),
    "weight decay": (decay, 7, "config: the optimizer decays weights by 30, 30, 0, planned is 0.1"),
    "eps": (lambda c, m: set_group("eps", 1e-2)(c), 7, "config: the optimizer has eps 0.01, the run's configuration"),
    "betas": (lambda c, m: set_group("betas", (0.5, 0.5))(c), 7, "config: the optimizer has betas (0.5, 0.5)"),
    "steps": (lambda c, m: lose_steps(c), 7, "optimizer step: the optimizer counts 1 steps after step 7"),
    "samples": (lambda c, m: m.setattr(Loader, "batch", faulty), 8, "batch: step 8 read other samples than those"),
    "content": (lambda c, m: m.setattr(Loader, "batch", stale), 9, "batch: what step 9 read is what step 6 read"),
    "targets": (lambda c, m: m.setattr(Loader, "batch", shifted), 8, "data: the first batch of the run, read again"),
    "config": (lambda c, m: edit(c), 8, "config: the configuration in memory is not the one"),
    "still": (lambda c, m: rest(c), 8, "weights: no step since the last look moved blocks.1.attn.w_out"),
    "infinite": (lambda c, m: blow(c), 8, "finite: blocks.0.ffn.w_down holds what is not finite"),
    "bias": (lambda c, m: push(c), 8, "router bias: the mean of blocks.0.ffn.router.bias_E moved by 5"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_is_told_at_once_or_at_the_next_look(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted behind step 6, at whose look all was well."""
    plant, step, said = PLANTED[fault]
    keys = request(tmp_path, "moe", train__decay=2, orchestrator__mode="advise")
    run = trained(tmp_path, keys, monkeypatch, {6: lambda c: plant(c, monkeypatch)})
    found = told(run)
    assert min(found) == step
    assert found[step][0].startswith(said)


def test_what_is_frozen_and_moves_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(controls: SessionControls) -> None:
        with torch.no_grad():
            controls.course.parts.model.embed.weight.add_(1.0)

    keys = request(tmp_path, "dense", train__lora__rank=4)
    found = told(trained(tmp_path, keys, monkeypatch, {6: move}))
    assert found == {8: ["weights: embed.weight moved, though frozen"]}


def test_text_that_repeats_itself_is_no_fault_of_the_loader(tmp_path: Path) -> None:
    keys = request(tmp_path, "dense")
    Path(keys["data.train"]).write_text("".join("abcdefgh" * 8 for _ in range(400)))
    assert told(Trainer("tiny", root=tmp_path / "runs", **keys).fit()) == {}


def test_examples_that_are_copies_are_no_fault_of_the_loader(tmp_path: Path) -> None:
    """Of three texts two make six batches: other samples, that were read before."""
    keys = request(tmp_path, "dense", train__batch_tokens=128, train__steps=24)
    texts = [(letters * 22)[:64] for letters in ("abc", "defg", "hijkl")]
    Path(keys["data.train"]).write_text("".join(texts * 200))
    run = Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    assert told(run) == {}
    assert not [event for event in run.events() if event["t"] == "decision"]


def test_sums_of_large_weights_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariants, "PIECE", 5)
    values = torch.arange(12.0).reshape(3, 4) / 7
    wide = values.double()
    torch.testing.assert_close(invariants._sums_of(values), torch.stack([wide.sum(), wide.square().sum()]))


def test_nobody_looks_where_the_orchestrator_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = request(tmp_path, "dense", orchestrator__mode="off")
    run = trained(tmp_path, keys, monkeypatch, {6: lambda c: set_group("eps", 1e-2)(c)})
    assert told(run) == {}
    assert len([event for event in run.events() if event["t"] == "step"]) == STEPS


def test_a_number_that_does_not_go_on_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(course: Course, step: int) -> None:
        course.state.progress.batch = 50

    keys = request(tmp_path, "dense", orchestrator__mode="advise")
    found = told(trained(tmp_path, keys, monkeypatch, {6: lambda c: again(c.course, 6)}))
    assert found == {7: ["batch: number 6 comes after 50"]}
