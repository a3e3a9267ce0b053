"""A mixture of experts as sizes: `lumina.model.router` and `lumina.model.moe`, line by line.

Shapes: T tokens, D width, E expert slots, A active experts, F feed-forward width of one, R = T·A rows.
"""

from __future__ import annotations

from typing import NamedTuple

from lumina.config.schema.model import MoEConfig
from lumina.planner.footprint.layers import Net, View, feed_forward, swiglu
from lumina.planner.footprint.operators import (
    FLAG,
    INDEX,
    WIDE,
    add,
    cast,
    detached,
    elementwise,
    kept,
    mul,
    order,
    pick,
    product,
    reduce,
    rows,
    scale,
    total,
)
from lumina.planner.footprint.tape import CASTS, Leaf, Tape, Tensor, record

EXPERTS = "experts"  # the part of what there would not be without them


def experts(net: Net, x: Tensor, view: View, training: bool) -> tuple[Tensor, Tensor]:
    """`moe.MoE.forward`: the layer's output, and the router's loss."""
    with net.tape.as_part(EXPERTS):
        return _experts(net, x, view, training)


def _experts(net: Net, x: Tensor, view: View, training: bool) -> tuple[Tensor, Tensor]:
    moe, tape, T = net.model.moe, net.tape, view.tokens
    assert moe is not None
    D, R, slots = net.model.width, T * moe.top_k, moe.experts + moe.spare
    routed = _route(net, moe, x, view, training)
    places = order(tape, R, INDEX)
    row = tape.new(R, INDEX)
    x_RD = rows(x, row, R * D)
    h_RF = swiglu(_grouped(x_RD, net.leaf(slots * 2 * moe.ffn * D), R * 2 * moe.ffn))
    y_RD = _grouped(h_RF, net.leaf(slots * moe.ffn * D), R * D)
    y = _combine(y_RD, routed.gate, places, row, T * D)
    if moe.shared:
        y = add(y, feed_forward(net, x, T, moe.shared * moe.ffn))
    return y, routed.loss


class _Routed(NamedTuple):
    """`router.Routed`."""

    expert: Tensor
    gate: Tensor
    loss: Tensor


def _route(net: Net, moe: MoEConfig, x: Tensor, view: View, training: bool) -> _Routed:
    """`router.Router.forward`."""
    tape, T, E, A = net.tape, view.tokens, moe.experts + moe.spare, moe.top_k
    logit = product(cast(x, WIDE), cast(net.leaf(E * net.model.width).on(tape), WIDE), T * E)
    if moe.temperature != 1:
        logit = scale(logit)
    if moe.spare:
        logit = mul(logit, tape.new(E, FLAG))
    score = elementwise(logit, saves="output")
    chosen = _choose(tape, moe, score, training)
    gate = pick(score, chosen, T * A)
    mass = total(gate, T)
    if moe.normalise:
        gate = mul(gate, scale(mass))
    limit = None
    if moe.capacity and training:
        limit = _within_capacity(tape, T * A, E)
        gate = mul(gate, limit)
    return _Routed(chosen, gate, _statistics(tape, moe, logit, score, view))


def _choose(tape: Tape, moe: MoEConfig, score: Tensor, training: bool) -> Tensor:
    choice = scale(detached(score))
    if moe.dropout and training:
        noise = [tape.new(score.numel, INDEX) for _ in range(3)]  # the hash and what it is made of
        choice = scale(choice)
        del noise
    if moe.spare:
        choice = scale(choice)
    rows_, E = score.numel / (moe.experts + moe.spare), moe.top_k
    return kept(tape, [(rows_ * E, WIDE), (rows_ * E, INDEX)], choice=True)[1]


def _within_capacity(tape: Tape, R: float, E: int) -> Tensor:
    """A running count of every expert in whole numbers, twice: the largest thing a capacity costs."""
    order(tape, R, WIDE)
    counts = [tape.new(R * E, INDEX) for _ in range(2)]
    del counts
    return tape.new(R, FLAG)


def _statistics(tape: Tape, moe: MoEConfig, logit: Tensor, score: Tensor, view: View) -> Tensor:
    """Router losses, and what is counted for the events."""
    T, E = view.tokens, moe.experts + moe.spare
    sums = total(score, T)
    p = mul(score, scale(sums)) if moe.score == "sigmoid" else score
    lse = reduce(logit, T, saves=True)
    loss = tape.new(1, WIDE)
    if moe.balance or moe.seq_balance:
        mean = reduce(p, view.batch * E)
        loss = total(mul(mean, tape.new(view.batch * E, WIDE)), 1)
        if moe.seq_balance:
            best = kept(tape, [(T * moe.top_k, WIDE), (T * moe.top_k, INDEX)], choice=True)[1]
            del best
    if moe.z_loss:
        loss = add(loss, total(mul(lse, detached(lse)), 1))
    entropy = scale(detached(p))
    del entropy
    return loss


def _grouped(x: Tensor, leaf: Leaf, outputs: float) -> Tensor:
    """`grouped.grouped_linear`: it casts on its own, so that autocast keeps no copy of these weights."""
    tape = x.tape
    low = tape.low or x.size
    x = cast(x, low)
    with tape.as_part(CASTS):
        w = cast(leaf.on(tape), low)
    return product(x, w, outputs, guarded=tape.device == "cuda")


def _combine(y_RD: Tensor, gate: Tensor, places: Tensor, row: Tensor, numel: float) -> Tensor:
    """`moe._Combine`."""
    tape, size, R, RD = y_RD.tape, y_RD.size, gate.numel, y_RD.numel
    low = tape.new(R, size)
    out = _sum_of_rows(y_RD, numel)
    del low

    def back(_: list[Tensor | None]) -> list[Tensor]:
        g_RD = tape.new(RD, size)
        weighted = tape.new(RD, size)
        del weighted
        g_gate = tape.new(R, WIDE)
        return [_after(g_RD, tape.new(RD, size)), g_gate]

    record(out, [y_RD, gate], [y_RD, gate, places, row], back)
    return out


def _sum_of_rows(y: Tensor, numel: float) -> Tensor:
    """On a CPU `embedding_bag`, without a copy of the rows."""
    copy = y.tape.new(y.numel, y.size) if y.tape.device != "cpu" else None
    out = y.tape.new(numel, y.size)
    del copy
    return out


def _after(_: Tensor, made: Tensor) -> Tensor:
    return made
