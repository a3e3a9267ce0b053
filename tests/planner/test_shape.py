"""Models of a wanted size, in the proportions of the nearest preset."""

from __future__ import annotations

import pytest
from support import KINDS

from lumina.config.resolve import presets, resolve
from lumina.errors import UserError
from lumina.model.cost import count
from lumina.planner.shape import shape_of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [2e5, 3e7, 4e8, 2.5e10])
def test_the_size_is_met_and_the_configuration_is_valid(wanted: float, kind: str) -> None:
    shape = shape_of(wanted, lambda cost: cost.active, (f"model.kind={kind}",))
    model = resolve(shape.preset, {"model.kind": kind, **shape.changes}).config.model
    assert model == shape.model
    assert count(model).active == pytest.approx(wanted, rel=0.05) == shape.reached
    base = resolve(shape.preset, {"model.kind": kind}).config.model
    assert model.head_dim == base.head_dim
    assert model.width == model.heads * model.head_dim
    assert 1 / 2 < (model.width / model.layers) / (base.width / base.layers) < 2
    if wanted > 1e8:  # whole groups of heads
        assert model.heads // model.kv_heads == base.heads // base.kv_heads


def test_a_preset_of_that_size_is_taken_as_it_is() -> None:
    for name in presets():
        if name.startswith("b"):
            shape = shape_of(float(name[1:]) * 1e9, lambda cost: cost.active)
            assert (shape.preset, shape.changes) == (name, {})


def test_any_count_can_be_asked_for() -> None:
    shape = shape_of(3e9, lambda cost: cost.flops_per_token, ("model.kind=dense", "model.seq_len=512"))
    assert count(shape.model).flops_per_token == pytest.approx(3e9, rel=0.02)
    assert shape.model.seq_len == 512


def test_settings_of_the_model_hold() -> None:
    shape = shape_of(5e7, lambda cost: cost.active, ("model.vocab=8192", "model.kind=mod", "train.lr=1"))
    assert (shape.model.vocab, shape.model.kind) == (8192, "mod")
    assert "model.vocab" not in shape.changes


def test_no_model_is_smaller_than_its_vocabulary() -> None:
    with pytest.raises(UserError, match="no model of 5e\\+03 parameters") as caught:
        shape_of(5e3, lambda cost: cost.active)
    assert "smaller model.vocab" in caught.value.fix


def test_it_says_what_it_chose() -> None:
    said = shape_of(3e9, lambda cost: cost.active).why(3e9, "active parameters")
    assert said.startswith("preset b7, of all the nearest to 3e+09 active parameters, made 2")
    assert "nearest to 1e+09" in shape_of(1e9, lambda cost: cost.active).why(1e9, "active parameters")
