"""How often the intervals of `lumina.planner.fit` hold the truth: laws fitted to simulated runs of a known one.

    python benchmarks/planner/coverage.py            # about 4 minutes on one core

Points are those of the default law, sizes and tokens a parameter each 4 times the one before (from 1M parameters and
5 tokens a parameter), the logarithm of their loss off by normal noise. A line a design: in how many of the sets the
80 and the 95 % interval held the truth of E, α, β, and of the best size and its loss at 100 times the most compute.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from lumina.planner.fit import fit
from lumina.planner.laws import LAWS, Law
from lumina.planner.points import Point

TRUE = LAWS["besiroglu"]
SETS, DRAWS = 400, 300


def quantities(flops: float) -> dict[str, object]:
    return {
        "E": lambda law: law.E,
        "alpha": lambda law: law.alpha,
        "beta": lambda law: law.beta,
        "params": lambda law: law.optimum(flops).params,
        "loss": lambda law: law.loss(*law.optimum(flops)),
    }


def main() -> None:
    print(f"python {sys.version.split()[0]}, numpy {np.__version__}; {SETS} sets of runs, {DRAWS} draws each")
    for sizes, horizons, noise in ((3, 3, 0.002), (4, 4, 0.002), (4, 4, 0.01), (6, 6, 0.002), (8, 8, 0.002)):
        where = [(1e6 * 4**i, 5e6 * 4 ** (i + j)) for i in range(sizes) for j in range(horizons)]
        asked = quantities(100 * 6 * where[-1][0] * where[-1][1])
        random, held, start = np.random.default_rng(0), {}, time.perf_counter()
        refused = 0
        for seed in range(SETS):
            points = [Point(n, d, TRUE.loss(n, d) * float(np.exp(noise * random.standard_normal()))) for n, d in where]
            try:
                law: Law = fit(points, DRAWS, seed)
            except Exception as error:
                refused += 1
                print(f"  refused: {error}".splitlines()[0])
                continue
            for name, f in asked.items():
                for level in (0.8, 0.95):
                    low, _, high = law.interval(f, level)  # type: ignore[arg-type]
                    held.setdefault((name, level), []).append(low <= f(TRUE) <= high)  # type: ignore[operator]
        shares = "  ".join(f"{name} {np.mean(held[name, 0.8]):.0%}/{np.mean(held[name, 0.95]):.0%}" for name in asked)
        seconds = time.perf_counter() - start
        print(f"{sizes} sizes x {horizons} tokens, noise {noise:.1%}: {shares}  ({refused} refused, {seconds:.0f} s)")


if __name__ == "__main__":
    main()
