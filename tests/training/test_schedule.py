"""Learning rates at the corners of both schedules."""

from __future__ import annotations

from itertools import pairwise

import pytest

from lumina.config.resolve import resolve
from lumina.training.schedule import decay_start, learning_rate


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
