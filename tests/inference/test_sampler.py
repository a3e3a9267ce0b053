"""What can be sampled, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from lumina.errors import UserError
from lumina.inference.sampler import Sampler


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 2},
    ],
)
def test_what_cannot_be_sampled_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        Sampler(**settings)  # type: ignore[arg-type]


def test_the_smallest_temperature_is_greedy_and_does_not_overflow() -> None:
    logits = torch.tensor([[1.0, 300.0, -5.0]])
    assert Sampler(temperature=1e-42).pick(logits, torch.Generator()).tolist() == [1]
