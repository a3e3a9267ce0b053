"""Repeated text, as Muennighoff et al. 2023 have it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lumina.planner import repeated
from lumina.planner.laws import LAWS

LAW = LAWS["muennighoff"]


@pytest.mark.parametrize(("epochs", "value"), [(1, 100), (2, 98), (4, 93), (8, 83), (16, 66), (40, 38)])
def test_the_published_value_of_epochs(epochs: int, value: int) -> None:
    assert round(100 * repeated.epoch_value(epochs)) == value
    assert repeated.effective_tokens(1e9, epochs * 1e9) == pytest.approx(epochs * repeated.epoch_value(epochs) * 1e9)


def test_each_further_epoch_is_worth_less_and_they_add_up() -> None:
    values = [repeated.next_epoch_value(epochs) for epochs in range(60)]
    assert values == sorted(values, reverse=True)
    assert values[0] == 1
    assert sum(values[:8]) == pytest.approx(8 * repeated.epoch_value(8))
    assert sum(values) < 1 + 15.387756  # no number of epochs is worth more than that of fresh text


def test_text_read_once_is_the_plain_law() -> None:
    assert repeated.loss(1e8, 1e11, 1e10) == LAW.loss(1e8, 1e10)
    assert repeated.effective_params(1e9, 1e12) == 1e9
    assert repeated.loss(1e8, 1e9, 8e9) > LAW.loss(1e8, 8e9)


def test_parameters_beyond_the_optimum_of_the_text_count_less() -> None:
    useful = LAW.params_for(1e9)
    assert repeated.effective_params(2 * useful, 1e9) / useful == pytest.approx(
        1 + 5.309743 * (1 - math.exp(-1 / 5.309743))
    )
    assert repeated.effective_params(1e4 * useful, 1e9) / useful == pytest.approx(1 + 5.309743)


@pytest.mark.parametrize("unique", [1e7, 1e9, 1e10])
def test_the_best_split_is_the_least_loss(unique: float) -> None:
    best = repeated.best_split(1e20, unique)
    assert 6 * best.params * best.tokens == pytest.approx(1e20)
    assert best.epochs == pytest.approx(best.tokens / unique)
    assert best.loss == repeated.loss(best.params, unique, best.tokens)
    others = best.params * np.geomspace(1e-2, 1e2, 2001)
    assert best.loss <= min(repeated.loss(n, unique, 1e20 / 6 / n) for n in others) + 1e-12


def test_with_text_enough_it_is_that_of_the_law() -> None:
    assert repeated.best_split(1e20, 1e13)[:2] == pytest.approx(LAW.optimum(1e20), rel=1e-4)


def test_more_parameters_more_data_or_more_epochs() -> None:
    fresh = repeated.next_best(1e9, 1e12, 2e10)
    assert fresh.epochs > fresh.data  # twice the steps on the same text is never as good as twice the text
    starved = repeated.next_best(2e9, 1e8, 4e9)
    assert starved.best() == "data"
    assert starved.data < starved.epochs
    assert starved.best(data=False) == ("params" if starved.params < starved.epochs else "epochs")
    small = repeated.next_best(1e7, 1e10, 4e10)
    assert small.best() == small.best(data=False) == "params"
    assert small.params == repeated.loss(2e7, 1e10, 4e10)


def test_warnings_begin_after_4_and_grow_after_16_epochs() -> None:
    assert repeated.warnings(1e9, 4e9) == []
    (some,) = repeated.warnings(1e9, 5e9)
    assert some.startswith("5.0 epochs: a token is worth 90% of a fresh one, one of another epoch 75%")
    assert "up to 4 epochs it is 93%" in some
    (many,) = repeated.warnings(1e9, 17e9)
    assert "after 16 epochs another is worth 37%" in many
