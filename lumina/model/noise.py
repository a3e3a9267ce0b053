"""Noise without state: a hash of what it is for (seed, step, sample, position, layer, …), in integer tensor operations.

Any split into micro-batches or processes, a fork, and a recomputed forward draw the same numbers, and a full graph
can trace them, which it cannot with a `torch.Generator`. The hash is SplitMix64's finaliser (Steele et al., 2014).

Shapes: B sequences, any shape `*`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64's constants as signed 64-bit numbers.
STRIDE, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def keys(seed: int, step: int, sample_ids_B: Tensor) -> Tensor:
    """A key (int64) for each sequence of a step's batch."""
    start = torch.full((1,), seed, dtype=torch.int64, device=sample_ids_B.device)  # `tensor` would wait for the device
    return fold(fold(start, step), sample_ids_B)


def fold(key: Tensor, counter: Tensor | int) -> Tensor:
    """Another key, for the `counter`-th of something that `key` has; broadcasts."""
    offset = STRIDE * (counter + 1)
    return _mix(key + (_signed(offset) if isinstance(offset, int) else offset))


def uniform(key: Tensor) -> Tensor:
    """A number in [0, 1) for each key, float32 with 24 random bits."""
    return _shift(key, 40).float() * 2.0**-24


def _signed(number: int) -> int:
    """As 64-bit integers wrap around, which Python's do not."""
    return (number + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, filling up with zeros; torch's own fills up with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
