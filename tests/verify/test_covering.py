"""Covering arrays, and the one that resuming is verified with."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.config.resolve import resolve
from lumina.errors import UserError
from lumina.verify import configurations
from lumina.verify.covering import broken, cover, feasible, pairs

FACTORS = st.lists(st.integers(1, 4), min_size=2, max_size=4).map(
    lambda sizes: {f"f{i}": [f"l{k}" for k in range(size)] for i, size in enumerate(sizes)}
)


@given(FACTORS)
def test_every_two_levels_meet(factors: dict[str, list[str]]) -> None:
    rows = cover(factors, {})
    met = {pair for row in rows for pair in pairs(row)}
    assert met == {
        ((a, x), (b, y)) for a, b in itertools.combinations(factors, 2) for x in factors[a] for y in factors[b]
    }
    assert rows == cover(factors, {})
    assert len(rows) <= len(list(feasible(factors, {})))


def test_what_is_ruled_out_is_in_no_row_and_nothing_else_is_missed() -> None:
    factors = {"a": "123", "b": "123", "c": "12"}
    rules = {
        "a is not b": lambda row: row["a"] != row["b"],
        "c follows a": lambda row: row["c"] == "2" or row["a"] < "3",
    }
    rows = cover(factors, rules)
    assert not [broken(row, rules) for row in rows if broken(row, rules)]
    met = {pair for row in rows for pair in pairs(row)}
    assert met == {pair for row in feasible(factors, rules) for pair in pairs(row)}
    assert (("a", "3"), ("c", "1")) not in met
    assert broken({"a": "3", "b": "3", "c": "1"}, rules) == list(rules)


def test_the_array_of_the_tiny_preset() -> None:
    array = configurations.array("tiny")
    met = {pair for row in array.values() for pair in pairs(row)}
    levels = [len(levels) for levels in configurations.FACTORS.values()]
    assert len(met) == sum(a * b for a, b in itertools.combinations(levels, 2))  # nothing is ruled out
    assert max(levels) ** 2 <= len(array) <= 20


def test_every_configuration_is_one_that_can_be_trained(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("data")
    for name, row in configurations.array("tiny").items():
        config = resolve("tiny", configurations.settings("tiny", row, folder)).config
        assert name.startswith(f"{config.model.kind}-{config.train.optimizer}-{config.precision.mode}")
        sequences = config.train.batch_tokens // config.model.seq_len
        assert row["micro-batches"] == f"x{sequences // int(config.train.micro_batch)}"


@pytest.mark.parametrize("name", ["hybrid", "hybrid-muon-fp32-x3-inline-base", "hybrid-muon-fp32-x2-inline-base-more"])
def test_an_unknown_configuration_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="no such configuration") as caught:
        configurations.named("tiny", name)
    assert "dense|moe|mod|hybrid" in caught.value.fix


def test_what_a_preset_cannot_be_split_into_is_named() -> None:
    row = dict(zip(configurations.FACTORS, ("dense", "muon", "fp32", "x3", "inline", "base"), strict=True))
    assert broken(row, configurations.constraints("tiny")) == [
        "micro-batches have to divide the 8 sequences of a batch"
    ]
