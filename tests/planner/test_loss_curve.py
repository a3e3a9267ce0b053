"""The learning rates and losses of a run, as forecasts see them: functions of what counts of its history."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lumina.config.resolve import resolve
from lumina.events import merged
from lumina.planner.curve import BINS, Recorder, width_for
from lumina.planner.schedule import Part, Schedule
from lumina.training.schedule import parts, rate

WSD = Schedule("wsd", (Part(0, 100, 1e-3, 10, 40),))


def step(number: int, loss: float | None = None, attempt: int = 0, lr: float | None = None) -> dict[str, Any]:
    planned = 1e-3 * float(WSD.rates(np.array([float(number)]))[0])
    value = 5 - number / 100 if loss is None else loss
    return {"t": "step", "attempt": attempt, "step": number, "loss": value, "lr": planned if lr is None else lr}


def went_on(attempt: int, parent: int, reason: str = "resume") -> dict[str, Any]:
    return {"t": "run", "attempt": attempt, "step": parent, "parent_step": parent, "reason": reason}


@pytest.mark.parametrize(
    "keys",
    [
        {"train.warmup": 0.1, "train.decay": 0.4},
        {"train.schedule": "cosine", "train.warmup": 7},
        {"train.warmup": 0, "train.decay": 0},
        {"train.phases": [{"at": 0, "lr": 1e-3}, {"at": 0.5, "lr": 4e-3, "warmup": 5}], "train.decay": 0.2},
    ],
)
def test_the_rates_are_those_that_train(keys: dict[str, Any]) -> None:
    config = resolve("tiny", keys | {"train.steps": 90}).config
    planned = parts(config.train, config.data, 90)
    schedule = Schedule.of(config.train.schedule, [vars(part) for part in planned])
    expected = [rate(planned, config.train.schedule, n) / planned[-1].lr for n in range(1, 91)]
    assert schedule.rates(np.arange(1.0, 91.0)) == pytest.approx(expected)
    assert schedule.area(np.array([90.0]))[0] == pytest.approx(sum(expected))


def test_an_area_of_millions_of_steps_is_added_up_on_a_grid() -> None:
    long = Schedule("wsd", (Part(0, 5_000_000, 1e-3, 250_000, 2_000_000),))
    exact = 250_000 / 2 + 2_750_000 + 2_000_000 / 2
    assert long.area(np.array([5e6]))[0] == pytest.approx(exact, rel=1e-3)


def test_what_has_fallen_begins_behind_the_warm_up() -> None:
    fallen = WSD.fallen(np.array([1.0, 10.0, 60.0, 61.0, 100.0]))
    assert fallen == pytest.approx([0, 0, 0, 1 / 41, 40 / 41])
    sooner = WSD.decayed_after(30)
    assert (sooner.steps, sooner.decay_begins) == (70, 30)


def test_a_run_has_at_most_so_many_bins_however_long_it_is() -> None:
    assert [width_for(steps) for steps in (1, 200, 201, 10**6)] == [1, 1, 2, 5000]
    recorder = Recorder(Schedule("wsd", (Part(0, 1001, 1e-3, 10, 40),)))
    for number in range(1, 1002):
        recorder.hear({"t": "step", "attempt": 0, "step": number, "loss": float(number), "lr": math.nan})
    curve = recorder.curve
    assert len(curve.steps) <= BINS
    assert (curve.steps[0], curve.losses[0], curve.counts[0]) == (6, 3.5, 6)
    assert (curve.steps[-1], curve.losses[-1], curve.counts[-1]) == (1001, 999, 5)


def test_a_resumed_run_has_the_curve_of_the_one_that_never_stopped() -> None:
    whole = Recorder.of(WSD, [step(n) for n in range(1, 61)])
    log = [step(n) for n in range(1, 45)] + [went_on(1, 30)] + [step(n, attempt=1) for n in range(30, 61)]
    live, read = Recorder(WSD), Recorder.of(WSD, merged(log))
    for event in log:
        live.hear(event)
    for recorder in (live, read):
        assert np.array_equal(recorder.curve.losses, whole.curve.losses)
        assert recorder.curve.changes == ()


def test_a_run_that_went_back_forgets_what_was_undone_and_knows_that_it_did() -> None:
    one = {"t": "eval", "attempt": 0, "split": "heldout", "comparable": True, "loss": 9.0}
    evals = [one | {"step": 20}, one | {"step": 40}]
    log = [*(step(n, 9.0) for n in range(1, 51)), *evals, went_on(1, 30, "rollback"), step(31, 4.0, 1)]
    recorder = Recorder(WSD)
    for event in log:
        recorder.hear(event)
    curve = recorder.curve
    assert (curve.now, curve.losses[-1], [one.step for one in curve.heldout]) == (31, 4.0, [20])
    assert [change.step for change in curve.changes] == [30]


@pytest.mark.parametrize(
    ("event", "where", "why"),
    [
        (step(21, math.nan), 21, "not finite"),
        (step(21, lr=5e-4), 20, "0.5 of the planned"),
        ({"t": "decision", "attempt": 0, "step": 20, "action": "lift", "overlays": []}, 20, "lift"),
        ({"t": "phase", "attempt": 0, "step": 21, "phase": 2}, 20, "phase 2"),
    ],
)
def test_what_changes_a_run_is_known(event: dict[str, Any], where: int, why: str) -> None:
    recorder = Recorder.of(WSD, [*(step(n) for n in range(1, 21)), event])
    ((at, said),) = recorder.curve.changes
    assert at == where
    assert why in said
    assert np.isfinite(recorder.curve.losses).all()


def test_a_skipped_step_is_a_decision_that_changes_nothing() -> None:
    event = {"t": "decision", "attempt": 0, "step": 3, "action": "skip_step", "rule": "overflow"}
    assert Recorder.of(WSD, [*(step(n) for n in range(1, 6)), event]).curve.changes == ()
