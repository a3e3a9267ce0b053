"""What finished runs tell of one that has not: how losses fall, what decays gain, how far forecasts are off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

EXPONENTS: Array = np.array([0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.3])


@dataclass(frozen=True)
class Prior:
    """`exponents` are the weights of `EXPONENTS`. Shares are of the loss that the run has when it is asked.

    A decay to 0 gains the share `gain`, give or take `gain_spread`; in a whole run the held-out loss parts from the
    training loss by `drift`; an evaluation is `wobble` off the form (all standard deviations). A forecast is off by
    `ahead` of what the loss was still to fall, beyond what its points leave open. `runs` were measured.
    """

    exponents: tuple[float, ...]
    gain: float
    gain_spread: float
    drift: float
    wobble: float
    ahead: float
    runs: int


# Of the runs in benchmarks/planner/curves.json that its README names for it; a test computes it again.
SHIPPED = Prior(
    exponents=(0.36, 0.16, 0.13, 0.11, 0.06, 0.03, 0.03, 0.03, 0.03, 0.03, 0.03),
    gain=0.056,
    gain_spread=0.011,
    drift=0.035,
    wobble=0.01,
    ahead=0.3,
    runs=10,
)
