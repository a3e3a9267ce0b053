"""What one unit of a model (the embedding, a block, the head) adds to memory, moment by moment.

Blocks of one sort are alike, so that each sort is walked once and a model of any depth is their sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from lumina.model.cost import chosen, dense_ffn
from lumina.planner.footprint import depth
from lumina.planner.footprint.experts import experts
from lumina.planner.footprint.layers import Net, View, attend, feed_forward, norm
from lumina.planner.footprint.operators import FLAG, WIDE, add, cast, detached, elementwise, mul
from lumina.planner.footprint.tape import ACTIVATIONS, GRADIENTS, Gradients, Node, Storage, Tape, Tensor, record

LOGITS = "logits"  # the part of the head's chunks and of the gradients that it forms in the forward pass
Bytes = Counter[str]  # by part
Compute = Callable[[Tensor], list[Tensor]]  # the input to the outputs that carry gradients, the first of them the main


@dataclass(frozen=True)
class Unit:
    """Bytes by part; of the forward pass those above the input."""

    forward: Bytes  # at the most in its forward pass
    held: Bytes  # when that is over, the output included
    stays: Bytes  # from the end of the whole forward pass to its turn in the backward pass, the input included
    backward: Bytes  # at the most in its backward pass, the gradients of output and input included
    gradients: int  # of weights, left behind by it


def walk(tape: Tape, compute: Compute, numel: float, size: int, learns: bool = True) -> Unit:
    """Forward and backward of `compute` for an input of `numel` elements, of which a gradient is wanted or not."""
    outs = compute(_input(tape, numel, size, learns))
    given = Bytes({ACTIVATIONS: round(numel * size)})
    forward = Bytes(tape.at_most) - given
    if not tape.recording:
        return Unit(forward, Bytes(tape.parts), Bytes(), Bytes(), 0)
    held = Bytes(tape.parts) - given  # the graph holds the input, too
    tape.casts.clear()
    ways = [(one.source, one.slot, one.numel, one.size) for one in outs]
    outs.clear()
    stays = Bytes(tape.parts)
    tape.reset()
    tape.backward([(source, slot, tape.new(n, bytes_)) for source, slot, n, bytes_ in ways])
    return Unit(forward, held, stays, Bytes(tape.at_most), tape.parts.get(GRADIENTS, 0))


def _input(tape: Tape, numel: float, size: int, learns: bool) -> Tensor:
    """A tensor whose gradient is a sum of what comes back, and is passed on to nobody."""
    x = tape.new(numel, size)
    if tape.recording and learns:
        x.source = Node(tape, [], [], lambda _: [])
    return x


# -- a block ----------------------------------------------------------------------------------------------------------


def block(net: Net, batch: int, length: int, routed: bool, moe: bool, recompute: str, learns: bool = True) -> Unit:
    """A training block (`transformer.Block.forward`); `learns`: whether anything before it does."""
    view = _outside(net, batch, length)

    def compute(x: Tensor) -> list[Tensor]:
        return _compute(net, x, view, routed, moe)

    def again(x: Tensor) -> list[Tensor]:
        return _recomputed(net.tape, compute, x)

    numel = view.tokens * net.model.width
    if recompute == "none":
        return walk(net.tape, compute, numel, net.size, learns)
    net.tape.selective = recompute == "selective"
    return walk(net.tape, again, numel, net.size)


def deciding(net: Net, batch: int, length: int, routed: bool, moe: bool) -> Unit:
    """The same block without gradients, as evaluation uses it (`transformer.Block.decode`)."""
    view = _outside(net, batch, length)

    def compute(x: Tensor) -> list[Tensor]:
        if not routed:
            return [add(x, _branch(net, x, view, moe, training=False)[0])]
        r = depth.score(net, x, view)
        keep = elementwise(depth.predict(net, x, view))
        visible = [net.tape.new(view.batch * view.length**2, FLAG) for _ in range(2)]
        y = add(x, mul(_branch(net, x, view, moe, training=False)[0], r))
        del visible, keep
        return [elementwise(cast(y, x.size))]

    net.tape.recording = False
    return walk(net.tape, compute, view.tokens * net.model.width, net.size)


def _outside(net: Net, batch: int, length: int) -> View:
    """A view whose bytes are counted by whoever made it."""
    cos, sin = (Tensor(batch * length * net.model.head_dim / 2, WIDE, Storage(net.tape, 0)) for _ in range(2))
    return View(batch, length, cos, sin)


def _compute(net: Net, x: Tensor, view: View, routed: bool, moe: bool) -> list[Tensor]:
    if not routed:
        y, losses = _branch(net, x, view, moe)
        return [add(x, y), *losses]
    assert net.model.mod is not None
    most = 1.0 if net.model.mod.anneal else net.model.mod.capacity  # a capacity that falls begins with every token
    selected = chosen(most, view.length)
    choice = depth.select(net, x, view, selected)
    x_C, view_C = depth.take(net, x, view, choice.index, selected)
    y_C, losses = _branch(net, x_C, view_C, moe)
    y_C = add(x_C, mul(y_C, choice.weight))
    return [depth.put(x, choice.index, cast(y_C, x.size)), *losses, choice.loss]


def _branch(net: Net, x: Tensor, view: View, moe: bool, training: bool = True) -> tuple[Tensor, list[Tensor]]:
    T = view.tokens
    a = attend(net, norm(net, x, T), view)
    h = norm(net, add(x, a), T)
    if moe:
        f, loss = experts(net, h, view, training)
        return add(a, f), [loss]
    return add(a, feed_forward(net, h, T, dense_ffn(net.model))), []


def _recomputed(tape: Tape, compute: Compute, x: Tensor) -> list[Tensor]:
    """`recompute.recomputed`: the input and what is kept stay; the way back begins with a forward pass."""
    numel, size = x.numel, x.size
    tape.recording, tape.keeping = False, []
    outs = compute(Tensor(numel, size, x.storage))
    tape.recording, kept, tape.keeping = True, tape.keeping, None

    def back(gradients: Gradients) -> list[Tensor]:
        again = Tensor(numel, size, Storage(tape, 0))
        again.source = Node(tape, [], [], lambda _: [])
        tape.given = kept
        outs = compute(again)
        tape.given = None
        tape.casts.clear()
        ways = [(one.source, one.slot) for one in outs]
        outs.clear()
        del again
        gradients.reverse()
        given = ((way, gradients.pop()) for way in ways)
        tape.backward([(*way, gradient) for way, gradient in given if gradient])
        return [tape.new(numel, size)]

    record(outs, [x], [x], back)
    return outs


# -- what stands before and after the blocks -----------------------------------------------------------------------


def embedding(net: Net, tokens: int) -> Unit:
    """The residual stream's beginning; the gradient of a tied one is added to the head's."""
    width = net.model.width * net.size
    stream, table = Bytes({ACTIVATIONS: tokens * width}), net.model.vocab * width
    if net.rank:
        return Unit(stream, stream, Bytes(), Bytes(), 0)
    stays = 0 if net.model.tied or net.later else table
    return Unit(stream, stream, Bytes(), stream + Bytes({GRADIENTS: table}), stays)


def head(net: Net, tokens: int) -> Unit:
    """The last norm and the loss in chunks (`lumina.model.head`)."""

    def compute(x: Tensor) -> list[Tensor]:
        return [_loss(net, norm(net, x, tokens), tokens, training=True)]

    return walk(net.tape, compute, tokens * net.model.width, net.size)


def deciding_head(net: Net, tokens: int) -> Unit:
    """The same for an evaluation, in which the residual stream is gone before the loss is computed."""
    net.tape.recording = False
    numel = tokens * net.model.width
    h = norm(net, net.tape.new(numel, net.size), tokens)
    _loss(net, h, tokens, training=False)
    forward = Bytes(net.tape.at_most)
    forward.subtract({ACTIVATIONS: numel * net.size})
    return Unit(forward, Bytes(), Bytes(), Bytes(), 0)


def _loss(net: Net, x: Tensor, tokens: int, training: bool) -> Tensor:
    tape, V, table = net.tape, net.model.vocab, net.model.vocab * net.model.width
    weight = net.leaf(table).on(tape)
    h = cast(x, tape.low or x.size)
    numel, size, learns = h.numel, h.size, weight.learns
    with tape.as_part(LOGITS):
        low = cast(detached(weight), size)
        g_h = tape.new(numel, size) if training else None
        g_w = tape.new(table, WIDE) if training and learns else None
        chunk = max(1, net.chunk // V)
        for _ in range(min(2, -(-tokens // chunk))):  # while a second is made, the first is still there
            logits = g = cast(tape.new(min(chunk, tokens) * V, size), WIDE)
            exponentials = tape.new(logits.numel, WIDE) if tape.device == "cuda" else None  # of logsumexp
            del exponentials
            if training:
                g = cast(logits, size)
                part = tape.new(table, size) if learns else None  # of the weight's gradient
                del part
        del logits, g
        out = tape.new(1, WIDE)

    def back(_: Gradients) -> list[Tensor | None]:
        return [tape.new(numel, size), tape.new(table, WIDE) if learns else None]

    record(out, [h, weight], [one for one in (g_h, g_w) if one], back)
    del low
    return out
