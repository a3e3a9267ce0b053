"""The learning rate as a pure function of the step, so that resuming and skipping steps need no state."""

from __future__ import annotations

import math

from lumina.config.schema.train import TrainConfig


def span(value: float, steps: int) -> int:
    """A length given as a share of the run (below 1) or in steps (1 and above), in steps."""
    return round(value * steps) if value < 1 else int(value)


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
