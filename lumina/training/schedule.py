"""Learning rate and depth capacity as pure functions of the step: resuming and skipping steps need no state."""

from __future__ import annotations

import math
from itertools import pairwise

from lumina.config.schema.model import MoDConfig
from lumina.config.schema.train import TrainConfig
from lumina.config.units import span


def decay_start(train: TrainConfig, steps: int) -> int:
    """The last step before the final decay; router biases are frozen after it."""
    return steps - span(train.decay, steps)


def learning_rate(train: TrainConfig, step: int, steps: int) -> float:
    """The rate of step `step`, counted from 1, of a run of `steps`.

    `wsd`: linear warm-up, constant, linear decay towards 0 (Hägele et al. 2024, 2405.18392). `cosine`: linear
    warm-up, then half a cosine towards 0.
    """
    warmup = span(train.warmup, steps)
    if step <= warmup:
        return train.lr * step / warmup
    if train.schedule == "cosine":
        progress = (step - 1 - warmup) / max(1, steps - warmup)
        return train.lr * 0.5 * (1 + math.cos(math.pi * progress))
    start = decay_start(train, steps)
    if step <= start:
        return train.lr
    return train.lr * (steps - step + 1) / (steps - start + 1)


def depth_stages(mod: MoDConfig, steps: int) -> list[tuple[float, int]]:
    """The capacities of a run of `steps`, in order, each with the number of its steps.

    With `mod.anneal` the capacity begins at 1, the dense model, and is halved in stages of equal length. Few sizes, not
    many: each is a graph to compile, and on a CPU kernels to generate.
    """
    length = min(steps, span(mod.anneal, steps))
    halvings = math.ceil(-math.log2(mod.capacity) - 1e-9)
    ends = [length * (k + 1) // halvings for k in range(halvings)] if length else []
    stages = [(2.0**-k, end - start) for k, (start, end) in enumerate(pairwise([0, *ends]))]
    return [*stages, (mod.capacity, steps - sum(n for _, n in stages))]


def depth_capacity(mod: MoDConfig, step: int, steps: int) -> float:
    """The share of a sequence that routed blocks compute in step `step`, counted from 1."""
    end = 0
    for capacity, length in depth_stages(mod, steps):
        end += length
        if step <= end:
            return capacity
    return mod.capacity
