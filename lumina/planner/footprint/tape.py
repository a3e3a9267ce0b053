"""Tensors that are only sizes, and an autograd that is only lifetimes: what a model holds in memory, without torch.

A storage counts its bytes while something refers to it, as a tensor's memory does: Python's reference counts end a
forward's variables where they end in the model itself. A node keeps what PyTorch's would save for the backward pass,
which runs nodes in the reverse order of their making, as PyTorch's engine does, and lets go of each one's storages
when it has run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

ACTIVATIONS, CASTS, GRADIENTS = "activations", "low-precision copies", "gradients"  # parts of what is held
Gradients = list["Tensor | None"]  # of a node's outputs, or of its inputs
Backward = Callable[[Gradients], Sequence["Tensor | None"]]


class Tape:
    """Bytes that are alive now and were at the most, by part; and the graph of what was computed."""

    def __init__(self, low: int | None = None, device: str = "cpu") -> None:
        """`low`: bytes of an element that autocast multiplies in, None without it."""
        self.low, self.device = low, device
        self.part, self.parts = ACTIVATIONS, dict[str, int]()
        self.now = self.most = self._order = 0
        self.at_most: dict[str, int] = {}
        self.recording = True
        self.casts: dict[Leaf, Tensor] = {}  # autocast's own cache of weights
        self.gradients: list[Storage] = []  # of weights
        self.selective = False  # whether recomputation keeps products, too, or choices only
        self.keeping: list[Storage] | None = None  # what a region that is recomputed keeps
        self.given: list[Storage] | None = None  # the same, when it is computed again

    def count(self, part: str, change: int) -> None:
        self.parts[part] = self.parts.get(part, 0) + change
        self.now += change
        if self.now > self.most:
            self.most, self.at_most = self.now, dict(self.parts)

    def reset(self) -> None:
        """From here on the most is looked for anew."""
        self.most, self.at_most = self.now, dict(self.parts)

    @contextmanager
    def as_part(self, part: str) -> Iterator[None]:
        """Storages made inside belong to `part`."""
        before, self.part = self.part, part
        yield
        self.part = before

    def new(self, numel: float, size: int) -> Tensor:
        return Tensor(numel, size, Storage(self, round(numel * size)))

    def next(self) -> int:
        self._order += 1
        return self._order

    def backward(self, roots: list[tuple[Source, int, Tensor]]) -> None:
        """Runs the graph of `roots`, given with their gradients, in reverse; every node and root is used up."""
        waiting: dict[Node, Gradients] = {}
        heap: list[tuple[int, Node]] = []

        def pass_on(source: Source, slot: int, gradient: Tensor) -> None:
            if isinstance(source, Leaf):
                source.accumulate(gradient)
            elif source is not None:
                if source not in waiting:
                    waiting[source] = [None] * source.outputs
                    heapq.heappush(heap, (-source.order, source))
                if waiting[source][slot] is None:  # else it is added to the first in place
                    waiting[source][slot] = gradient

        while roots:
            pass_on(*roots.pop())
        while heap:
            _, node = heapq.heappop(heap)
            made = list(node.run(waiting.pop(node)))
            for source, slot in reversed(node.inputs):
                one = made.pop()
                if one is not None:
                    pass_on(source, slot, one)
                del one


class Storage:
    """Bytes that count as long as somebody refers to them."""

    __slots__ = ("bytes", "part", "tape")

    def __init__(self, tape: Tape, bytes: int) -> None:
        self.tape, self.bytes, self.part = tape, bytes, tape.part
        tape.count(self.part, bytes)

    def __del__(self) -> None:
        self.tape.count(self.part, -self.bytes)

    def belong(self, part: str) -> None:
        self.tape.count(self.part, -self.bytes)
        self.part = part
        self.tape.count(part, self.bytes)


class Tensor:
    """`numel` elements of `size` bytes in a storage, and which node made them; a view shares its storage."""

    __slots__ = ("numel", "size", "slot", "source", "storage")

    def __init__(self, numel: float, size: int, storage: Storage, source: Source = None, slot: int = 0) -> None:
        self.numel, self.size, self.storage, self.source, self.slot = numel, size, storage, source, slot

    @property
    def tape(self) -> Tape:
        return self.storage.tape

    @property
    def learns(self) -> bool:
        """Whether a gradient is wanted of it."""
        return self.source is not None


class Leaf:
    """A weight, whose own bytes are counted elsewhere. Its first gradient stays, a later one is added to that."""

    __slots__ = ("__weakref__", "frozen", "later", "numel", "size")

    def __init__(self, numel: float, size: int, frozen: bool = False, later: bool = False) -> None:
        """`later`: there is a gradient already, also counted elsewhere."""
        self.numel, self.size, self.frozen, self.later = numel, size, frozen, later

    def on(self, tape: Tape) -> Tensor:
        return Tensor(self.numel, self.size, Storage(tape, 0), None if self.frozen else self)

    def accumulate(self, gradient: Tensor) -> None:
        if not self.later:
            gradient.storage.belong(GRADIENTS)
            gradient.tape.gradients.append(gradient.storage)
            self.later = True


class Node:
    """One operation's way back: from its outputs' gradients to its inputs'."""

    __slots__ = ("backward", "inputs", "order", "outputs", "saved")

    def __init__(
        self, tape: Tape, inputs: Sequence[Tensor], saved: Sequence[Tensor], backward: Backward, outputs: int = 1
    ) -> None:
        """`backward` must hold no tensor: what it needs later is `saved`."""
        self.order, self.outputs, self.backward = tape.next(), outputs, backward
        self.inputs = [(one.source, one.slot) for one in inputs]
        self.saved: Sequence[Storage] = [one.storage for one in saved]

    def run(self, gradients: Gradients) -> Sequence[Tensor | None]:
        made = self.backward(gradients)
        self.saved = ()
        return made


Source = Node | Leaf | None


def record(
    out: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], saved: Sequence[Tensor], backward: Backward
) -> None:
    """Makes `out` the outputs of a node, if gradients are wanted of any input."""
    outs = [out] if isinstance(out, Tensor) else out
    tape = outs[0].tape
    if tape.recording and any(one.learns for one in inputs):
        node = Node(tape, inputs, saved, backward, len(outs))
        for slot, one in enumerate(outs):
            one.source, one.slot = node, slot
