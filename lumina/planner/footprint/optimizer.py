"""What an optimizer step holds for a while: Muon's directions and iterations (`lumina.training.optim`).

Fused AdamW moves everything in place, and so do clipping and the scale of fp16.

Shapes: N matrices of I rows and J columns, or stacks of E of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from lumina.config.schema.model import ModelConfig
from lumina.model.cost import dense_ffn, has_experts

PORTION = 1 << 27  # elements of Muon's matrices that are put together at once: memory beside each process's share
LOW = 2  # bytes of bf16, in which matrices are orthogonalised


@dataclass(frozen=True, order=True)
class Matrix:
    """A weight that Muon moves: its shape, and the rows of the maps that are fused in it."""

    shape: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def numel(self) -> int:
        numel = 1
        for side in self.shape:
            numel *= side
        return numel


def matrices(model: ModelConfig) -> list[Matrix]:
    """Every one of a model, those of one shape side by side."""
    D, moe = model.width, model.moe
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    found = []
    for layer in range(model.layers):
        found += [Matrix((queries + 2 * keys, D), (queries, keys, keys)), Matrix((D, queries), (D,))]
        networks = [dense_ffn(model)]
        if moe and has_experts(model, layer):
            slots = moe.experts + moe.spare
            found += [Matrix((slots, 2 * moe.ffn, D), (moe.ffn, moe.ffn)), Matrix((slots, D, moe.ffn), (D,))]
            networks = [moe.shared * moe.ffn] if moe.shared else []
        for ffn in networks:
            found += [Matrix((2 * ffn, D), (ffn, ffn)), Matrix((D, ffn), (D,))]
    return sorted(found, key=lambda one: one.shape)


def muon(model: ModelConfig, size: int, processes: int) -> int:
    """Bytes at the most beside weights, gradients and moments, whose elements have `size` bytes."""
    return max((_portion(tuple(portion), size, processes) for portion in _portions(model)), default=0)


def _portions(model: ModelConfig) -> Iterator[list[Matrix]]:
    portion: list[Matrix] = []
    elements = 0
    for matrix in matrices(model):
        if portion and elements + matrix.numel > PORTION:
            yield portion
            portion, elements = [], 0
        portion.append(matrix)
        elements += matrix.numel
    if portion:
        yield portion


@cache
def _portion(portion: tuple[Matrix, ...], size: int, processes: int) -> int:
    """`optim.Muon._move`: directions of all, then each group of maps of one shape through the iterations."""
    own = sum(one.numel for one in portion) * size // processes  # directions
    most = own
    stacked = [one for one in portion if len(one.shape) == 3]
    if stacked:
        most += max(one.numel for one in stacked) // processes  # which elements are not zero, one byte each
    whole = [one.numel for one in portion if len(one.shape) == 2]
    held = own
    if processes > 1 and whole:
        parts = sum(whole) * LOW // processes
        held += sum(whole) * LOW  # whole matrices, out of rows that were sent side by side
        most = max(most, own + 2 * parts + sum(whole) * LOW, held + sum(whole) * LOW)
    before = 0  # updates of the group before
    for (n, columns, ndim), numel in _groups(portion).items():
        each = LOW if processes > 1 and ndim == 2 else size
        local = numel // processes if ndim == 3 else numel
        computed = numel // processes  # of matrices that all have, each process takes a share
        square = computed // max(n, columns) * min(n, columns)
        put_together = local * each
        if ndim == 2 and processes > 1:
            put_together += local * LOW  # padded
        iterations = 2 * computed * LOW + 2 * square * LOW
        if processes > 1 and ndim == 2:
            iterations = max(iterations, 2 * computed * LOW + numel * LOW)  # the shares of all, when they are done
        most = max(most, held + before + put_together + iterations)
        before = local * LOW
        largest = max(one.numel for one in portion)
        most = max(most, held + before + largest // processes * (4 if ndim == 3 else LOW))  # a scaled update
    return most


def _groups(portion: tuple[Matrix, ...]) -> dict[tuple[int, int, int], int]:
    """Elements by rows, columns, and whether they are stacks."""
    groups: dict[tuple[int, int, int], int] = defaultdict(int)
    for one in portion:
        columns = one.shape[-1]
        stack = one.shape[0] if len(one.shape) == 3 else 1
        for rows in one.rows:
            groups[rows, columns, len(one.shape)] += stack * rows * columns
    return groups
