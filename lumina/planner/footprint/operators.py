"""PyTorch's operators as sizes: what each makes, what it saves, and what its way back makes.

Seen in PyTorch 2.13's own traces on a CPU (`TorchDispatchMode` and `saved_tensors_hooks`) and in its sources for CUDA.
Where the two differ, `Tape.device` says which is meant. Only sizes count, so a reshape is no operation.
"""

from __future__ import annotations

from collections.abc import Sequence

from lumina.planner.footprint.tape import CASTS, Gradients, Leaf, Tape, Tensor, record

WIDE, INDEX, FLAG = 4, 8, 1  # bytes of fp32, of int64, of bool


def cast(x: Tensor, size: int) -> Tensor:
    """`x.to(dtype)`: the same tensor where it is that already."""
    if x.size == size:
        return x
    tape, numel, own = x.tape, x.numel, x.size
    out = tape.new(numel, size)
    record(out, [x], [], lambda _: [tape.new(numel, own)])
    return out


def detached(x: Tensor) -> Tensor:
    """The same memory, without a way back."""
    return Tensor(x.numel, x.size, x.storage)


def split(x: Tensor, parts: Sequence[float]) -> list[Tensor]:
    """Views of so many elements; the way back puts their gradients side by side."""
    tape, numel, size = x.tape, x.numel, x.size
    outs = [Tensor(part, size, x.storage) for part in parts]
    record(outs, [x], [], lambda _: [tape.new(numel, size)])
    return outs


def cat(parts: Sequence[Tensor]) -> Tensor:
    """The way back gives views of its gradient."""
    tape, sizes = parts[0].tape, [(part.numel, part.size) for part in parts]
    out = tape.new(sum(part.numel for part in parts), max(part.size for part in parts))

    def back(gradients: Gradients) -> list[Tensor]:
        g = _only(gradients)
        return [Tensor(numel, g.size, g.storage) if size == g.size else tape.new(numel, size) for numel, size in sizes]

    record(out, parts, [], back)
    return out


def add(a: Tensor, b: Tensor) -> Tensor:
    """Also a difference: its second gradient is another tensor, `sub`."""
    return _sum(a, b, negated=False)


def sub(a: Tensor, b: Tensor) -> Tensor:
    return _sum(a, b, negated=True)


def _sum(a: Tensor, b: Tensor, negated: bool) -> Tensor:
    tape = a.tape
    out = tape.new(max(a.numel, b.numel), max(a.size, b.size))
    wants = [(one.numel, one.size, one.learns, negated and one is b) for one in (a, b)]

    def back(gradients: Gradients) -> list[Tensor | None]:
        g = _only(gradients)
        made = []
        for numel, size, learns, other in wants:
            one = tape.new(g.numel, g.size) if other and learns else g
            made.append(_fit(one, numel, size) if learns else None)
        return made

    record(out, [a, b], [], back)
    return out


def mul(a: Tensor, b: Tensor) -> Tensor:
    """Also a quotient; the smaller one is repeated, its gradient summed."""
    tape = a.tape
    out = tape.new(max(a.numel, b.numel), max(a.size, b.size))
    wants = [(one.numel, one.size, one.learns, other.size) for one, other in ((a, b), (b, a))]

    def back(gradients: Gradients) -> list[Tensor | None]:
        g = _only(gradients)
        full = [tape.new(g.numel, max(g.size, other)) if learns else None for _, _, learns, other in wants]
        return [_fit(one, numel, size) if one else None for one, (numel, size, _, _) in zip(full, wants, strict=True)]

    record(out, [a, b], [other for one, other in ((a, b), (b, a)) if one.learns], back)
    return out


def scale(x: Tensor) -> Tensor:
    """By a number: nothing is saved."""
    tape, numel, size = x.tape, x.numel, x.size
    out = tape.new(numel, size)
    record(out, [x], [], lambda _: [tape.new(numel, size)])
    return out


def elementwise(x: Tensor, saves: str = "input") -> Tensor:
    """A function of each element, such as silu (saves its input) or sigmoid and softmax (their `output`)."""
    tape, numel, size = x.tape, x.numel, x.size
    out = tape.new(numel, size)
    record(out, [x], [out if saves == "output" else x], lambda _: [tape.new(numel, size)])
    return out


def square(x: Tensor) -> Tensor:
    """`x.pow(2)`, whose way back makes x, 2x and their product."""
    tape, numel, size = x.tape, x.numel, x.size
    out = tape.new(numel, size)

    def back(gradients: Gradients) -> list[Tensor]:
        power = tape.new(numel, size)
        doubled = tape.new(numel, size)
        del power
        return [_with(doubled, tape.new(numel, size))]

    record(out, [x], [x], back)
    return out


def reduce(x: Tensor, numel: float, saves: bool = False) -> Tensor:
    """Mean (the way back repeats it as large as `x`); with `saves` logsumexp."""
    tape, whole, size = x.tape, x.numel, x.size
    out = tape.new(numel, size)
    record(out, [x], [x, out] if saves else [], lambda _: [tape.new(whole, size)])
    return out


def total(x: Tensor, numel: float) -> Tensor:
    """Sum: the way back is a view that repeats it."""
    whole, size = x.numel, x.size
    out = x.tape.new(numel, size)

    def back(gradients: Gradients) -> list[Tensor]:
        g = _only(gradients)
        return [Tensor(whole, size, g.storage)]

    record(out, [x], [], back)
    return out


def pick(x: Tensor, index: Tensor, numel: float) -> Tensor:
    """`gather`: the way back scatters into zeros."""
    tape, whole, size = x.tape, x.numel, x.size
    out = tape.new(numel, size)

    def back(gradients: Gradients) -> list[Tensor]:
        zeros = tape.new(whole, size)
        return [_with(zeros, tape.new(whole, size))]

    record(out, [x], [index], back)
    return out


def repeat(x: Tensor, numel: float) -> Tensor:
    """`repeat_interleave` to so many elements, or the same tensor where it has them."""
    if x.numel == numel:
        return x
    tape, whole, size = x.tape, x.numel, x.size
    out = tape.new(numel, size)
    record(out, [x], [], lambda _: [tape.new(whole, size)])
    return out


def rows(x: Tensor, number: Tensor, numel: float) -> Tensor:
    """`x[number]` into `numel` elements, whose way back adds rows up, or puts them among zeros."""
    tape, whole, size = x.tape, x.numel, x.size
    out = tape.new(numel, size)
    record(out, [x], [number], lambda _: [tape.new(whole, size)])
    return out


def weight(tape: Tape, leaf: Leaf) -> Tensor:
    """A weight as a product takes it: under autocast a copy in its format, made once a forward pass if it learns."""
    if tape.low is None or leaf.size == tape.low:
        return leaf.on(tape)
    if leaf in tape.casts:
        return tape.casts[leaf]
    with tape.as_part(CASTS):
        copy = cast(leaf.on(tape), tape.low)
    if not leaf.frozen:
        tape.casts[leaf] = copy
    return copy


def linear(x: Tensor, leaf: Leaf, outputs: float) -> Tensor:
    """`F.linear` to so many outputs a row of `leaf`'s columns, under autocast in its format."""
    w = weight(x.tape, leaf)
    return product(cast(x, x.tape.low or x.size), w, outputs)


def product(x: Tensor, w: Tensor, outputs: float, vector: bool = False, guarded: bool = False) -> Tensor:
    """A matrix product of `outputs` elements in all; recomputation makes one with a `vector` again in every mode.

    `guarded`: the weight's gradient is made, then copied where it is sound (`grouped.native_weights`).
    """
    tape = x.tape
    out = tape.new(outputs, x.size) if vector else kept(tape, [(outputs, x.size)])[0]
    wants = [(one.numel, one.size, one.learns) for one in (w, x)]

    def back(_: Gradients) -> list[Tensor | None]:
        made = [tape.new(numel, size) if learns else None for numel, size, learns in wants]
        if guarded and made[0]:
            made[0] = tape.new(*wants[0][:2])
        return made

    record(out, [w, x], [other for one, other in ((w, x), (x, w)) if one.learns], back)
    return out


def kept(tape: Tape, sizes: Sequence[tuple[float, int]], choice: bool = False) -> list[Tensor]:
    """The outputs of an operator that recomputation keeps: `choice`, in every mode; else in `selective` only."""
    if tape.given is not None and (choice or tape.selective):
        return [Tensor(numel, size, tape.given.pop(0)) for numel, size in sizes]
    made = [tape.new(numel, size) for numel, size in sizes]
    if tape.keeping is not None and (choice or tape.selective):
        tape.keeping += [one.storage for one in made]
    return made


def order(tape: Tape, numel: float, size: int) -> Tensor:
    """Sorts `numel` elements of `size` bytes; the places they come from. Recomputation keeps both outputs."""
    return kept(tape, [(numel, size), (numel, INDEX)], choice=True)[1]


def _only(gradients: Gradients) -> Tensor:
    (one,) = gradients
    assert one is not None  # nodes run when they have a gradient
    return one


def _fit(gradient: Tensor, numel: float, size: int) -> Tensor:
    """Summed to `numel` elements and cast, as the engine does before it passes a gradient on."""
    if gradient.numel > numel:
        gradient = gradient.tape.new(numel, gradient.size)
    return gradient if gradient.size == size else gradient.tape.new(numel, size)


def _with(_: Tensor, made: Tensor) -> Tensor:
    """`made`, which was computed from the other while that was there."""
    return made
