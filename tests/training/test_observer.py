"""What is told of routers: the steps that were taken, all of them, and none that the guard skipped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import settings

from lumina.config.resolve import resolve
from lumina.model.mod import SUMS
from lumina.orchestrator.protocol import Observation
from lumina.training import setup
from lumina.training.observer import Observer
from lumina.training.schedule import Part
from lumina.training.state import Progress
from lumina.training.step import METRICS


@dataclass
class Acted:
    """What acts in nine steps, of which the third begins a phase."""

    phases: list[Part]
    acted: dict[str, float]
    steps: int = 9

    def values(self, step: int) -> dict[str, float]:
        return self.acted

    def changed(self, step: int) -> str:
        return "phase" * (step == 3)


class Told:
    """An observer of a tiny hybrid of nine steps that tells every fourth, fed by hand."""

    def __init__(self, folder: Path) -> None:
        request = settings(folder) | {"train.steps": 9, "telemetry.log_every": 4}
        resolved = resolve("tiny", request)
        corpus = setup.load_data(resolved.config)
        parts = setup.build(setup.settle_all(resolved, corpus)[0].config, corpus)
        self.events: list[dict[str, Any]] = []
        acting = Acted(parts.phases, {"lr": 1e-3, "clip": 0.5, "skip": 0, "mod_capacity": 0.125})
        self.observer = Observer(parts, 1e9, self.tell, acting)
        self.moes, self.routers = len(parts.model.moes), len(parts.model.routers)
        self.progress, self.lost = Progress(step_seconds=1.0), 0

    def tell(self, type: str, **fields: Any) -> None:
        self.events.append({"t": type, **fields})

    def step(self, load: float, tokens: float, skipped: bool = False, **changes: float) -> Observation:
        figures = {"skipped": float(skipped), "optimizer_steps": self.progress.step + 1 - self.lost - skipped}
        metrics = dict.fromkeys(METRICS, 1.0) | figures | changes
        self.lost += skipped
        experts = [load, 100.0, 100.0, 100.0, *[50.0] * 5, *[1.0] * 4, 0.25]
        depth = [*({"tokens": tokens, "taken": 20.0}.get(name, 10.0) for name in SUMS), 0.5, -0.5]
        rows = experts * self.moes + depth * self.routers
        if skipped:
            rows = [math.nan] * len(rows)
        self.progress.step += 1
        return self.observer(self.progress, [*metrics.values(), *rows])

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["t"] == kind]


def test_windows_hold_every_step_that_was_taken_and_the_last_is_not_lost(tmp_path: Path) -> None:
    told = Told(tmp_path)
    for load in (300.0, 0.0, 0.0, 100.0, 100.0, 100.0, 100.0, 100.0, 500.0):
        told.step(load, tokens=100.0)
    assert [event["step"] for event in told.of("moe")] == [event["step"] for event in told.of("mod")] == [4, 8, 9]
    # 400 of 1,600, the mean; the mean again; 500 of 800.
    assert [event["load"][0][0] for event in told.of("moe")] == [1.0, 1.0, 2.5]
    assert [len(event["load"]) for event in told.of("moe")] == [told.moes] * 3
    assert [event["capacity"] for event in told.of("mod")] == [[0.1] * told.routers] * 3


@pytest.mark.parametrize("skipped", [2, 4])
def test_a_skipped_step_is_a_decision_and_in_no_window(skipped: int, tmp_path: Path) -> None:
    told = Told(tmp_path)
    for step in range(1, 5):
        told.step(100.0, tokens=50.0 * step, skipped=step == skipped)
    (moe,), (mod,), (decision,) = told.of("moe"), told.of("mod"), told.of("decision")
    assert moe["load"][0] == [1.0] * 4
    assert mod["capacity"][0] == pytest.approx(30 / (500 - 50 * skipped), abs=1e-5)
    assert (mod["quantile"][0], mod["threshold"][0]) == (0.5, -0.5)
    assert (decision["step"], decision["rule"], decision["action"]) == (skipped, "non_finite", "skip_step")


def test_a_window_of_skipped_steps_alone_says_nothing(tmp_path: Path) -> None:
    told = Told(tmp_path)
    for _ in range(4):
        told.step(100.0, tokens=100.0, skipped=True)
    assert told.of("moe") == told.of("mod") == []
    assert len(told.of("decision")) == 4


def test_an_observation_says_what_acted_and_what_the_routers_did(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.progress.batch, told.progress.content = 7, "abc"
    seen = told.step(300.0, tokens=100.0, count=4.0, square=36.0, grad_embed=0.25)
    assert (seen.step, seen.lr, seen.clip, seen.changed, seen.stage) == (1, 1e-3, 0.5, "", "warmup")
    assert (seen.batch, seen.content, seen.log_z, seen.grad_embed) == (7, "abc", 3.0, 0.25)
    assert (seen.grad_head, seen.grad_router) == (None, 1.0)  # tied
    assert seen.load == ((2.0, *[100 / 150] * 3),) * told.moes
    assert seen.balance == 2.0
    assert seen.entropy == pytest.approx([50 / 300 * math.log(4)] * told.moes)  # sums of 300 tokens of two experts
    assert seen.capacity == (0.2,) * told.routers  # what the causal rule takes
    assert seen.agreement == 0.1
    assert seen.loss_scale is None
    stages = [told.step(100.0, tokens=100.0) for _ in range(8)]
    assert [one.stage for one in stages] == ["stable"] * 4 + ["decay"] * 4
    assert [one.changed for one in stages] == ["", "phase", *[""] * 6]
    (event,) = [event for event in told.of("step") if event["step"] == 1]
    assert (event["log_z"], event["grad_embed"], event["grad_head"], event["batch"]) == (3.0, 0.25, None, 7)


def test_the_optimizer_s_steps_are_those_that_were_not_skipped(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.step(100.0, tokens=100.0)
    assert told.step(100.0, tokens=100.0, skipped=True).broken == ()
    assert told.step(100.0, tokens=100.0).broken == ()
    said = "optimizer step: the optimizer counts 1 steps after step 4, of which 1 were skipped"
    assert told.step(100.0, tokens=100.0, optimizer_steps=1.0).broken == (said,)  # as after a resume that lost it
    assert told.of("step")[-1]["broken"] == [said]
