"""Learning rates at the corners of both schedules."""

from __future__ import annotations

from itertools import pairwise

import pytest

from lumina.config.resolve import resolve
from lumina.config.schema.model import MoDConfig
from lumina.training.schedule import decay_start, depth_capacity, depth_stages, learning_rate


def rates(steps: int = 100, **keys: object) -> list[float]:
    train = resolve(
        "tiny", {"train.lr": 1.0, "train.steps": steps, **{f"train.{k}": v for k, v in keys.items()}}
    ).config.train
    return [learning_rate(train, step, steps) for step in range(1, steps + 1)]


def test_wsd() -> None:
    lr = rates(schedule="wsd", warmup=0.1, decay=0.4)
    assert lr[0] == pytest.approx(0.1)
    assert lr[9:60] == [1.0] * 51
    assert lr[60] < 1
    assert lr[-1] == pytest.approx(1 / 41)
    falls = [a - b for a, b in pairwise(lr[9:])]
    assert falls == pytest.approx([0] * 50 + [1 / 41] * 40)


def test_lengths_in_steps_equal_shares() -> None:
    assert rates(warmup=10, decay=40) == rates(warmup=0.1, decay=0.4)
    assert rates(warmup=0, decay=0) == [1.0] * 100


def test_cosine() -> None:
    lr = rates(schedule="cosine", warmup=0.1)
    assert lr[9] == 1.0
    assert lr[10] == 1.0
    assert lr[55] == pytest.approx(0.5, abs=0.02)
    assert 0 < lr[-1] < 0.001


def test_router_biases_freeze_when_the_decay_starts() -> None:
    train = resolve("tiny", {"train.decay": 0.4}).config.train
    assert decay_start(train, 100) == 60


@pytest.mark.parametrize(
    ("mod", "stages"),
    [
        (MoDConfig(capacity=0.125), [(0.125, 100)]),
        (MoDConfig(capacity=0.125, anneal=0.3), [(1.0, 10), (0.5, 10), (0.25, 10), (0.125, 70)]),
        (MoDConfig(capacity=0.125, anneal=50), [(1.0, 16), (0.5, 17), (0.25, 17), (0.125, 50)]),
        (MoDConfig(capacity=0.3, anneal=10), [(1.0, 5), (0.5, 5), (0.3, 90)]),
        (MoDConfig(capacity=0.75, anneal=10), [(1.0, 10), (0.75, 90)]),
        (MoDConfig(capacity=0.125, anneal=1), [(1.0, 0), (0.5, 0), (0.25, 1), (0.125, 99)]),
        (MoDConfig(capacity=1.0), [(1.0, 100)]),
    ],
)
def test_depth_falls_by_halves(mod: MoDConfig, stages: list[tuple[float, int]]) -> None:
    assert depth_stages(mod, 100) == stages
    each = [capacity for capacity, n in stages for _ in range(n)]
    assert [depth_capacity(mod, step, 100) for step in range(1, 101)] == each
