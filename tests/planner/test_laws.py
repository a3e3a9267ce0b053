"""Published laws: what their authors, and those who checked them, print; and what follows from the formula."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lumina.config.resolve import presets, resolve
from lumina.config.schema.model import KINDS, MoEConfig
from lumina.errors import UserError
from lumina.model.cost import count
from lumina.planner import laws
from lumina.planner.laws import (
    DEFAULT,
    LAWS,
    Law,
    beyond_moe,
    by_rule,
    expansion,
    law,
    moe_gain,
    moe_law,
    moe_loss,
    params_of,
)

BESIROGLU = LAWS["besiroglu"]


@pytest.fixture(autouse=True)
def _own_law_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMINA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("hoffmann-rounded", [26, 40, 63, 93]),
        ("hoffmann", [19, 28, 41, 59]),
        ("besiroglu", [26, 23, 20, 18]),
        ("muennighoff", [20, 20, 20, 20]),
    ],
)
def test_tokens_a_parameter_at_the_optimum(name: str, ratios: list[int]) -> None:
    best = [LAWS[name].optimum(flops) for flops in (1e18, 1e20, 1e22, 5.76e23)]
    assert [round(optimum.tokens / optimum.params) for optimum in best] == ratios
    assert [6 * optimum.params * optimum.tokens for optimum in best] == pytest.approx([1e18, 1e20, 1e22, 5.76e23])


@pytest.mark.parametrize("known", LAWS.values(), ids=list(LAWS))
def test_the_closed_form_is_the_least_loss(known: Law) -> None:
    for flops in (1e15, 1e21, 1e25):
        best = known.optimum(flops)
        params = best.params * np.geomspace(1e-2, 1e2, 4001)
        losses = [known.loss(n, flops / 6 / n) for n in params]
        assert known.loss(*best) <= min(losses) + 1e-12
        assert params[np.argmin(losses)] == pytest.approx(best.params, rel=2e-3)


@pytest.mark.parametrize("known", LAWS.values(), ids=list(LAWS))
def test_what_is_asked_backwards(known: Law) -> None:
    best = known.optimum(3e20)
    assert known.tokens_for(best.params) == pytest.approx(best.tokens)
    assert known.params_for(best.tokens) == pytest.approx(best.params)
    assert known.flops_to(known.loss(*best)) == pytest.approx(3e20)
    assert known.tokens_to(1e9, known.loss(1e9, 7e10)) == pytest.approx(7e10)
    assert known.tokens_to(1e9, known.loss(1e9, math.inf) - 1e-9) == math.inf
    assert known.flops_to(known.E) == math.inf


def test_the_default_is_not_the_rounded_one_which_says_why() -> None:
    assert law() is law(None) is LAWS[DEFAULT] is BESIROGLU
    chinchilla = LAWS["hoffmann-rounded"].optimum(5.76e23)
    assert (round(chinchilla.params / 1e9), round(chinchilla.tokens / 1e12)) == (32, 3)
    assert "93 tokens a parameter, 32B on 3T" in LAWS["hoffmann-rounded"].note
    assert all(known.source and known.counts == "total" for known in LAWS.values())


def test_a_law_that_is_not_known() -> None:
    with pytest.raises(UserError, match=r"chinchila: no such scaling law\n.*besiroglu, hoffmann.*, own"):
        law("chinchila")
    with pytest.raises(UserError, match="no scaling law of your own yet"):
        law("own")


# -- uncertainty ------------------------------------------------------------------------------------------------------


def test_the_draws_have_the_published_standard_errors() -> None:
    """Besiroglu et al. 2024: E ±.026, A ±125, B ±1293, α ±.015, β ±.021, β/(α+β) .513 ±.020; 95 % intervals."""
    columns = list(zip(*BESIROGLU.draws, strict=True))
    assert len(columns[0]) >= 200
    published = [0.0257, 124.5, 1293.3, 0.0154, 0.0206]
    for column, expected in zip(columns, published, strict=True):
        assert statistics.stdev(column) == pytest.approx(expected, rel=0.1)
    share = BESIROGLU.interval(lambda law: law.beta / (law.alpha + law.beta))
    assert share.mid == pytest.approx(0.513, abs=1e-3)
    assert share.high - share.low == pytest.approx(0.051, abs=0.005)  # its 80 %, published
    low, _, high = BESIROGLU.interval(lambda law: law.E, 0.95)
    assert (low, high) == pytest.approx((1.769, 1.871), abs=0.008)


def test_errors_taken_apart_would_be_wrong() -> None:
    columns = [list(column) for column in zip(*BESIROGLU.draws, strict=True)]
    assert np.corrcoef(columns[1], columns[3])[0, 1] > 0.95  # A, α
    assert np.corrcoef(columns[2], columns[4])[0, 1] > 0.85  # B, β
    shuffled = random.Random(0)
    for column in columns:
        shuffled.shuffle(column)
    apart = Law("apart", "", "total", 1.8172, 482.01, 2085.43, 0.3478, 0.3658, tuple(zip(*columns, strict=True)))  # type: ignore[arg-type]
    together, alone = (
        each.interval(lambda law: law.optimum(1e21).params) for each in (BESIROGLU, apart)
    )  # fmt: skip
    assert alone.high / alone.low > 8 * together.high / together.low


def test_an_interval_is_that_of_its_draws() -> None:
    draws = tuple((1.0 + i / 10, 400.0, 2000.0, 0.3, 0.3) for i in range(11))
    known = Law("x", "", "total", 1.42, 400.0, 2000.0, 0.3, 0.3, draws)
    assert known.interval(lambda law: law.E) == pytest.approx((1.1, 1.42, 1.9))
    assert known.interval(lambda law: law.E, 0.95) == pytest.approx((1.025, 1.42, 1.975))
    assert LAWS["hoffmann"].interval(lambda law: law.E) == (1.6934, 1.6934, 1.6934)


def test_extrapolation_is_told() -> None:
    assert BESIROGLU.outside(1e9, 2e10) == []
    small, few = BESIROGLU.outside(1e6, 2e7)
    assert small.startswith("1e+06 parameters lie outside of 5.73e+07 to 1.62e+10")
    assert few.startswith("2e+07 tokens lie outside")


# -- what is counted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", presets())
def test_a_dense_model_counts_all_but_its_norms(preset: str) -> None:
    for tied in ("true", "false"):
        cost = count(resolve(preset, ["model.kind=dense", f"model.tied={tied}"]).config.model)
        assert params_of(cost, BESIROGLU) == pytest.approx(cost.total, rel=5e-3)
        assert params_of(cost, BESIROGLU) <= cost.total
        assert params_of(cost, moe_law(1)) == cost.active


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
def test_a_sparse_model_counts_what_a_token_meets(kind: str) -> None:
    cost = count(resolve("b1", [f"model.kind={kind}"]).config.model)
    assert params_of(cost, moe_law(8)) == round(cost.active_mean)
    assert params_of(cost, BESIROGLU) == round(cost.active_mean) + cost.embedding  # b1 is not tied
    plain = Law("x", "", "non_embedding", 1, 1, 1, 1, 1)
    assert params_of(cost, plain) == round(cost.active_mean) - cost.embedding


def test_twenty_tokens_are_a_rule() -> None:
    chinchilla = by_rule(6 * 70e9 * 1.4e12)
    assert chinchilla == pytest.approx((70e9, 1.4e12))
    assert "rule" in (by_rule.__doc__ or "")


# -- mixtures of experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "active", "tokens", "ratio", "loss"),
    [(1, 1.73, 9.7, 5.6, 2.590), (8, 0.99, 16.8, 17, 2.529), (32, 0.67, 24.7, 37, 2.472), (64, 0.57, 29.1, 51, 2.444)],
)
def test_optima_of_the_joint_law_at_1e20(experts: int, active: float, tokens: float, ratio: float, loss: float) -> None:
    best = moe_law(experts).optimum(1e20)
    assert best.params / 1e9 == pytest.approx(active, abs=0.006)
    assert best.tokens / 1e9 == pytest.approx(tokens, abs=0.06)
    assert best.tokens / best.params == pytest.approx(ratio, rel=0.01)
    assert moe_loss(*best, experts) == pytest.approx(loss, abs=5e-4)


def test_a_moe_gains_over_dense_and_only_that_is_said() -> None:
    gains = [moe_gain(1e20, experts) for experts in (1, 2, 8, 32)]
    assert gains[0] == pytest.approx(1)
    assert gains == sorted(gains)
    dense, moe = moe_law(1), moe_law(8)
    same = moe.loss(*moe.optimum(1e20))
    assert dense.loss(*dense.optimum(gains[2] * 1e20)) == pytest.approx(same)
    assert "ludziejewski" not in LAWS  # not a law of losses beside the others
    with pytest.raises(UserError, match="0 experts"):
        moe_law(0)


@pytest.mark.parametrize(
    ("experts", "top_k", "shared", "expected"),
    [(32, 3, 1, 8.25), (8, 1, 0, 8), (4, 4, 0, 1), (4, 4, 2, 1), (16, 2, 0, 8)],
)
def test_experts_count_beside_those_that_a_token_takes(experts: int, top_k: int, shared: int, expected: float) -> None:
    """A mixture that takes all of its experts is a dense model, and gains nothing over one."""
    moe = MoEConfig(experts=experts, top_k=top_k, shared=shared, normalise=False)
    assert expansion(moe) == expected
    assert (moe_gain(1e20, expansion(moe)) == pytest.approx(1)) == (expected == 1)


def test_a_mixture_beyond_the_law_is_told() -> None:
    small, large = (count(resolve(preset, ["model.kind=moe"]).config.model) for preset in ("debug", "b7"))
    assert beyond_moe(small, 32) == []
    assert beyond_moe(large, 64) == [
        "64 experts for each one taken, beyond 32", "6.99e+09 active, beyond 2.7e+09", "4.5e+10 in all, beyond 5e+09",
    ]  # fmt: skip


# -- the user's own ---------------------------------------------------------------------------------------------------


def test_a_kept_law_comes_back_and_is_used() -> None:
    mine = Law("own", "three runs", "active", 1.5, 300.0, 900.0, 0.3, 0.31, ((1.4, 310.0, 910.0, 0.3, 0.3),) * 3)
    mine = replace(mine, traits=(("model.kind", "dense"), ("model.moe", "")))
    laws.own.write(laws.to_values(mine))
    assert law() == law("own") == mine
    assert law("besiroglu") is BESIROGLU
    assert laws.own.forget()
    assert not laws.own.forget()
    assert law() is BESIROGLU


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"version": 1', '"version": 9'),
        lambda text: text.replace('"alpha"', '"alfa"'),
        lambda text: text.replace("1.5", "-1.5"),
        lambda text: text.replace('"active"', '"all"'),
        lambda text: "[1]",
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_law_is_not_passed_over(damage: object) -> None:
    mine = Law("own", "three runs", "active", 1.5, 300.0, 900.0, 0.3, 0.31)
    path = laws.own.write(laws.to_values(mine))
    assert callable(damage)
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=r"law.json: (damaged|not a scaling law).*\n.*--forget"):
        law()
