"""A dense block's layers as sizes, line by line beside `lumina.model`: what a variable holds there, it holds here.

Whoever changes one changes the other; `tests/planner/test_memory.py` compares them. Values of which there are only a
few a sequence are left out.

Shapes: B sequences, S tokens of each, T = B·S tokens, D width, H query heads, G key-value heads, K head dim, F
feed-forward.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumina.config.schema.model import ModelConfig
from lumina.planner.footprint.operators import (
    FLAG,
    WIDE,
    add,
    cast,
    cat,
    elementwise,
    kept,
    linear,
    mul,
    product,
    reduce,
    repeat,
    scale,
    split,
    square,
    sub,
)
from lumina.planner.footprint.tape import Leaf, Tape, Tensor, record


@dataclass(frozen=True)
class Net:
    """What every layer of a model knows: its shape, how its weights are stored, and who computes attention."""

    model: ModelConfig
    tape: Tape
    size: int  # bytes of a weight's element
    rank: int = 0  # of adapters; 0: everything learns
    later: bool = False  # whether weights have gradients already
    attention: str = "flash"
    wide_norms: bool = True  # whether autocast on CUDA computes RMSNorm in fp32
    chunk: int = 1 << 20  # logits that the head computes at once

    def leaf(self, numel: float, adapter: bool = False) -> Leaf:
        """A weight of so many elements; beside adapters all others are frozen."""
        return Leaf(numel, self.size, self.rank > 0 and not adapter, self.later)


@dataclass(frozen=True)
class View:
    """What attention knows of its rows: how many sequences of how many tokens, cosines and sines of each."""

    batch: int
    length: int
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, net: Net, batch: int, length: int) -> View:
        half = batch * length * net.model.head_dim / 2
        return cls(batch, length, net.tape.new(half, WIDE), net.tape.new(half, WIDE))

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def norm(net: Net, x: Tensor, rows: float, gain: bool = True) -> Tensor:
    """RMSNorm of so many rows. On a CPU PyTorch makes it of operators, on CUDA one saves its input and their norms."""
    if net.tape.device == "cuda":
        return _fused_norm(net, cast(x, WIDE) if net.tape.low and net.wide_norms else x, rows, gain)
    wide = cast(x, WIDE)
    rstd = elementwise(reduce(square(wide), rows), saves="output")
    y = mul(wide, rstd)
    if gain:
        y = mul(y, net.leaf(x.numel / rows).on(net.tape))
    return cast(y, x.size)


def _fused_norm(net: Net, x: Tensor, rows: float, gain: bool) -> Tensor:
    tape, numel, size = net.tape, x.numel, x.size
    out, rstd = tape.new(numel, size), tape.new(rows, WIDE)
    weight = Leaf(numel / rows, net.size, not gain or net.rank > 0, net.later).on(tape)
    wants = [(one.numel, one.learns) for one in (x, weight)]
    record(out, [x, weight], [x, rstd], lambda _: [tape.new(n, size) if learns else None for n, learns in wants])
    return out


def project(net: Net, x: Tensor, rows: float, inputs: int, parts: tuple[int, ...]) -> Tensor:
    """A fused linear map (`lora.Adaptable.linear`) of `rows` vectors to all `parts`, with an adapter of each."""
    y = linear(x, net.leaf(inputs * sum(parts)), rows * sum(parts))
    if not net.rank:
        return y
    return add(y, scale(cat([_adapter(net, x, rows, inputs, part) for part in parts])))


def _adapter(net: Net, x: Tensor, rows: float, inputs: int, outputs: int) -> Tensor:
    low = linear(x, net.leaf(net.rank * inputs, adapter=True), rows * net.rank)
    return linear(low, net.leaf(net.rank * outputs, adapter=True), rows * outputs)


def attend(net: Net, x: Tensor, view: View) -> Tensor:
    """`attention.Attention.forward`."""
    model, T = net.model, view.tokens
    parts = (model.heads * model.head_dim, model.kv_heads * model.head_dim, model.kv_heads * model.head_dim)
    q, k, v = split(project(net, x, T, model.width, parts), [T * part for part in parts])
    q = cast(rotate(norm(net, q, T * model.heads), view), v.size)
    k = cast(rotate(norm(net, k, T * model.kv_heads), view), v.size)
    y = _math(net, q, k, v, view) if net.attention == "math" else _fused(net, q, k, v, view)
    return project(net, y, T, parts[0], (model.width,))


def rotate(x: Tensor, view: View) -> Tensor:
    a, b = split(x, [x.numel / 2] * 2)
    return cat((sub(mul(a, view.cos), mul(b, view.sin)), add(mul(b, view.cos), mul(a, view.sin))))


def _fused(net: Net, q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
    """A kernel that never holds the square: inputs, output, its rows' logsumexp, and the mask in their format stay."""
    tape = net.tape
    mask = tape.new(view.batch * view.length**2, q.size)
    y, lse = kept(tape, [(q.numel, q.size), (view.tokens * net.model.heads, WIDE)])
    wants = [(one.numel, one.size) for one in (q, k, v)]
    record(y, [q, k, v], [q, k, v, mask, y, lse], lambda _: [tape.new(*want) for want in wants])
    return y


def _math(net: Net, q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
    """Products and a softmax in fp32, where no kernel takes a mask with fewer key heads: the square stays."""
    tape, size, numel = net.tape, q.size, q.numel
    H, squares = net.model.heads, view.batch * view.length**2
    mask = tape.new(squares, size)
    q, k, v = (cast(one, WIDE) for one in (q, k, v))
    k, v = repeat(k, numel), repeat(v, numel)
    weights = _safe_softmax(product(scale(q), scale(k), squares * H))
    del mask
    return cast(product(weights, v, numel), size)


def _safe_softmax(x: Tensor) -> Tensor:
    """Softmax, the rows of which all is masked found and set to zero where they are."""
    tape, numel, size = x.tape, x.numel, x.size
    out, masked = tape.new(numel, size), tape.new(numel, FLAG)
    del masked
    record(out, [x], [out], lambda _: [tape.new(numel, size)])
    return out


def feed_forward(net: Net, x: Tensor, rows: float, ffn: int) -> Tensor:
    """`feedforward.FeedForward.forward`."""
    D = net.model.width
    return project(net, swiglu(project(net, x, rows, D, (ffn, ffn))), rows, ffn, (D,))


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = split(gate_up, [gate_up.numel / 2] * 2)
    return mul(elementwise(gate), up)
