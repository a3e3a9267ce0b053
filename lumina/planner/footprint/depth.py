"""Depth routing as sizes: `lumina.model.mod`, line by line.

Shapes: B sequences, S tokens of each, T = B·S, D width, C selected tokens of a sequence, P predictor width.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumina.model.cost import PREDICTOR_SHRINK
from lumina.planner.footprint.layers import Net, View, norm
from lumina.planner.footprint.operators import (
    FLAG,
    INDEX,
    WIDE,
    add,
    cast,
    detached,
    elementwise,
    linear,
    order,
    pick,
    product,
    rows,
)
from lumina.planner.footprint.tape import Tensor, record


@dataclass(frozen=True)
class Selection:
    """`mod.Selection`: places of the selected tokens, their weights, and the predictor's loss."""

    index: Tensor
    weight: Tensor
    loss: Tensor


def select(net: Net, x: Tensor, view: View, selected: int) -> Selection:
    """`mod.DepthRouter.select`; `selected` tokens of each sequence."""
    tape, T, BC = net.tape, view.tokens, view.batch * selected
    r = score(net, x, view)
    order(tape, T, WIDE)
    index = order(tape, BC, INDEX)
    target = tape.new(T, WIDE)
    logit = predict(net, x, view)
    loss = _entropy(logit, target)
    keep = tape.new(T, FLAG)
    for _ in range(2):  # the quantiles of the logits, and of r
        order(tape, T, WIDE)
    weight = pick(r, index, BC)
    del keep
    return Selection(index, weight, loss)


def score(net: Net, x: Tensor, view: View) -> Tensor:
    return product(cast(x, WIDE), cast(net.leaf(net.model.width).on(net.tape), WIDE), view.tokens, vector=True)


def predict(net: Net, x: Tensor, view: View) -> Tensor:
    """`mod.Predictor.forward`, on the detached input."""
    D, T = net.model.width, view.tokens
    P = D // PREDICTOR_SHRINK
    x = norm(net, detached(x), T, gain=False)
    h = elementwise(linear(x, net.leaf(P * D), T * P))
    logit = product(cast(h, WIDE), cast(net.leaf(P).on(net.tape), WIDE), T, vector=True)
    return elementwise(add(logit, net.leaf(1).on(net.tape)))


def _entropy(logit: Tensor, target: Tensor) -> Tensor:
    tape, numel = logit.tape, logit.numel
    out = tape.new(1, WIDE)
    record(out, [logit], [logit, target], lambda _: [tape.new(numel, WIDE)])
    return out


def take(net: Net, x: Tensor, view: View, index: Tensor, selected: int) -> tuple[Tensor, View]:
    """The selected tokens, and their view of each other."""
    taken = rows(x, net.tape.new(index.numel, INDEX), index.numel * net.model.width)
    return taken, View.of(net, view.batch, selected)


def put(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    """`x` with `y` in its place; the way back fills a copy of the gradient."""
    tape, whole, some, size = x.tape, x.numel, y.numel, x.size
    out = tape.new(whole, size)
    number = tape.new(index.numel, INDEX)
    record(out, [x, y], [number], lambda _: [tape.new(whole, size), tape.new(some, size)])
    return out
