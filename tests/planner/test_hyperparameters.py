"""Learning rate and batch by three laws, where they were checked against each other."""

from __future__ import annotations

import pytest

from lumina.planner import hyperparameters
from lumina.planner.hyperparameters import bands


@pytest.mark.parametrize(
    ("params", "tokens", "rates", "batches"),
    [
        (1e9, 2e10, (9.96e-4, 9.64e-4), (442e3, 1.08e6, 553e3)),
        (1.25e8, 2.5e9, (2.3e-3, 1.6e-3), (135e3, 277e3, 249e3)),
        (1e7, 2e8, (6.5e-3, 3.0e-3), (32e3, 53e3, 94.7e3)),
    ],
)
def test_agreement(params: float, tokens: float, rates: tuple[float, ...], batches: tuple[float, ...]) -> None:
    found = bands(params, tokens, 6 * params * tokens)
    assert [source for source, _, _ in found] == ["StepLaw", "DeepSeek LLM", "Power Lines"]
    assert [lr for _, lr, _ in found if lr is not None] == pytest.approx(rates, rel=0.02)
    assert [batch for _, _, batch in found] == pytest.approx(batches, rel=0.01)
    assert found[2].lr is None
    assert set(hyperparameters.SOURCES) == set(hyperparameters.RANGES) == {source for source, _, _ in found}


def test_they_disagree_by_more_than_2() -> None:
    found = bands(1e9, 2e10, 1.2e20)
    assert hyperparameters.disagreement([band.batch_tokens for band in found]) == pytest.approx(2.44, abs=0.01)
    assert hyperparameters.disagreement([0.1, 0.1]) == 1


def test_extrapolation_is_told_law_by_law() -> None:
    assert hyperparameters.outside(5e8, 1e10, 1e19) == []
    told = hyperparameters.outside(1e6, 2e7, 1.2e14)
    assert [line.split(" is extrapolated: ")[0] for line in told] == ["StepLaw", "DeepSeek LLM", "Power Lines"]
    assert "1e+06 parameters outside of 2.15e+08 to 1.07e+09, 2e+07 tokens outside" in told[0]


def test_weight_decay_has_the_best_timescale() -> None:
    decay = hyperparameters.weight_decay(1e9, 2e10, 5e5, 1e-3)
    assert 5e5 / (1e-3 * decay * 2e10) == pytest.approx(1.084 * 20**-0.527)
    assert hyperparameters.critical_batch(2e10) == pytest.approx(2048 * 0.0471 * 2e10**0.462)


def test_warm_up_by_the_optimizer_and_by_the_size() -> None:
    settle, spare = hyperparameters.warmup(1e9, 5e5, beta2=0.95)
    assert (settle.steps, spare.steps) == pytest.approx((40, 2000))
    assert "2/(1-β2)" in settle.source
    assert hyperparameters.warmup(1e9, 5e5, beta2=0.999)[0].steps == pytest.approx(2000)
