"""The shape of a model of a wanted size: the nearest preset, wider and deeper in proportion.

Width and depth grow together: each layer count near the preset's is tried with the number of heads that comes
nearest, and the one whose width-to-depth ratio is nearest to the preset's wins among those of the right size. The
feed-forward width makes up for what whole heads and layers leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from lumina.config.resolve import presets, resolve
from lumina.config.schema.model import ROW, ModelConfig
from lumina.errors import UserError
from lumina.model.cost import Cost, count

NEAR = 0.05  # a preset this near to the wanted size is taken as it is: as near as presets are to their names
MOST_LAYERS, MOST_HEADS = 512, 4096
TRIED = 12  # numbers of layers, about
ASPECT = 0.1  # what a width-to-depth ratio off by a factor of e weighs, against a size off by one
Size = Callable[[Cost], float]


@dataclass(frozen=True)
class Shape:
    """A preset and the keys of `model` that differ from it; `reached` is its size as it was asked for."""

    preset: str
    changes: dict[str, Any]
    reached: float
    model: ModelConfig

    def why(self, wanted: float, what: str) -> str:
        """One sentence: what was chosen."""
        if not self.changes:
            return f"preset {self.preset}: its {self.reached:.3g} {what} are nearest to {wanted:.3g}"
        width, layers = self.model.width, self.model.layers
        return (
            f"preset {self.preset}, of all the nearest to {wanted:.3g} {what}, made {layers} layers of width {width} "
            f"in its proportions: {self.reached:.3g}"
        )


def shape_of(wanted: float, size: Size, settings: tuple[str, ...] = ()) -> Shape:
    """A model whose `size` is near `wanted`, with `settings` over its preset; of the preset's own kind by default.

    Raises `UserError` if no model is so small or so large.
    """
    sized = {name: _model(name, settings) for name in presets()}
    distance = {name: abs(math.log(size(count(model)) / wanted)) for name, model in sized.items()}
    name = min(distance, key=distance.__getitem__)
    base = sized[name]
    if distance[name] <= NEAR:
        return Shape(name, {}, size(count(base)), base)
    made = min(_candidates(base, wanted, size), key=lambda model: _badness(model, base, wanted, size), default=None)
    if made is None or abs(math.log(size(count(made)) / wanted)) > 4 * NEAR:
        small, large = (size(count(_scaled(base, *ends))) for ends in ((1, 1), (MOST_LAYERS, MOST_HEADS)))
        raise UserError(
            f"no model of {wanted:.3g} parameters can be made of the preset {name}",
            fix=f"it goes from {small:.2g} to {large:.2g}; a smaller model needs a smaller model.vocab",
        )
    return Shape(name, _changes(base, made), size(count(made)), made)


@cache
def _model(name: str, settings: tuple[str, ...]) -> ModelConfig:
    """Raises `UserError` if the settings do not go with the preset: they would not with its proportions either."""
    return resolve(name, _of_the_model(settings)).config.model


def _of_the_model(settings: tuple[str, ...]) -> list[str]:
    """Others are for the run, and may not go with the preset that it is not made of."""
    return [setting for setting in settings if setting.lstrip().startswith("model.")]


def _candidates(base: ModelConfig, wanted: float, size: Size) -> Iterator[ModelConfig]:
    """For each number of layers that is not far from the proportion the model that comes nearest."""
    scale = (wanted / size(count(base))) ** (1 / 3)
    least = max(1, base.mod.every if base.mod else 1, (base.moe.dense_layers + 1) if base.moe else 1)
    first = max(least, round(base.layers * scale / 2))
    last = min(MOST_LAYERS, max(first, round(2 * base.layers * scale)))
    group = base.heads // base.kv_heads
    step = group if base.heads * scale >= 2 * group else 1  # that of small models need not be the preset's
    most = min(MOST_HEADS, math.ceil(4 * base.heads * scale)) // step
    for layers in range(first, last + 1, max(1, (last - first) // TRIED)):
        steps = _largest(partial(_at_most, base, wanted, size, layers, step), 1, most)
        for number in (steps, steps + 1):
            yield _filled(_scaled(base, layers, number * step), wanted, size)


def _at_most(base: ModelConfig, wanted: float, size: Size, layers: int, step: int, steps: int) -> bool:
    """Whether a model with `steps` times `step` heads is no larger than wanted."""
    return size(count(_scaled(base, layers, steps * step))) <= wanted


def _scaled(base: ModelConfig, layers: int, heads: int) -> ModelConfig:
    """The base with so many layers and heads, and everything that follows from the width in its proportions."""
    width = heads * base.head_dim
    share = heads * base.kv_heads / base.heads
    kv = min((n for n in range(1, heads + 1) if heads % n == 0), key=lambda n: abs(math.log(n / max(share, 0.5))))
    changes: dict[str, Any] = {"layers": layers, "heads": heads, "kv_heads": kv, "width": width}
    return _with_ffn(base.model_copy(update=changes), _expert_ffn(base) * width / base.width)


def _filled(model: ModelConfig, wanted: float, size: Size) -> ModelConfig:
    """With the feed-forward width that brings the size nearest, at most a quarter off the proportion."""
    now, step = _expert_ffn(model), _ffn_step(model)
    low, high = max(1, math.ceil(0.75 * now / step)), max(1, int(1.25 * now / step))
    below = _largest(lambda n: size(count(_with_ffn(model, n * step))) <= wanted, low, high)
    near = {min(max(n, low), high) for n in (below, below + 1)}
    return min((_with_ffn(model, n * step) for n in near), key=lambda made: abs(math.log(size(count(made)) / wanted)))


def _with_ffn(model: ModelConfig, ffn: float) -> ModelConfig:
    """With networks (of each expert, if there are any) about so wide."""
    step = _ffn_step(model)
    width = max(step, round(ffn / step) * step)
    if model.moe is None:
        return model.model_copy(update={"ffn": width})
    return model.model_copy(update={"moe": model.moe.model_copy(update={"ffn": width})})


def _expert_ffn(model: ModelConfig) -> int:
    return model.moe.ffn if model.moe else model.ffn


def _ffn_step(model: ModelConfig) -> int:
    """Widths are round for the hardware where they are large."""
    return 64 if _expert_ffn(model) >= 512 else ROW


def _badness(model: ModelConfig, base: ModelConfig, wanted: float, size: Size) -> float:
    aspect = math.log(model.width / model.layers) - math.log(base.width / base.layers)
    return abs(math.log(size(count(model)) / wanted)) + ASPECT * abs(aspect)


def _changes(base: ModelConfig, made: ModelConfig) -> dict[str, Any]:
    keys = ("width", "layers", "heads", "kv_heads", *(() if made.moe else ("ffn",)))
    changes: dict[str, Any] = {
        f"model.{key}": getattr(made, key) for key in keys if getattr(made, key) != getattr(base, key)
    }
    if made.moe and base.moe and made.moe.ffn != base.moe.ffn:
        changes["model.moe.ffn"] = made.moe.ffn
    return changes


def _largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest whole number from `low` to `high` for which it holds; `low` if it does for none."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
