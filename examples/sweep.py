"""Which learning rate? Trains with three of them and compares bits per byte on the same held-out text:

    python examples/sweep.py my.txt [train.steps=200 model.kind=dense …]

Interrupted, the same command goes on where it was: finished runs are found again and not repeated.
One seed each tells rates that are far apart; for a close call repeat it with train.seed=1 and train.seed=2.
"""

from __future__ import annotations

import sys

import lumina

RATES = (2e-3, 6e-3, 2e-2)


def last_bpb(text: str, rate: float, settings: tuple[str, ...]) -> float:
    """Bits per byte at the end of a run with this rate."""
    run = lumina.Trainer("debug", [f"train.lr={rate}", *settings], data=text, quiet=True).fit()
    return [float(event["bpb"]) for event in run.events() if event["t"] == "eval"][-1]


def main(text: str, *settings: str) -> None:
    results = {}
    for rate in RATES:
        results[rate] = last_bpb(text, rate, settings)
        print(f"train.lr={rate:g}  {results[rate]:.4f} bits per byte", flush=True)
    best = min(results, key=results.__getitem__)
    end = " (at the end of the range: try further)" if best in (RATES[0], RATES[-1]) else ""
    print(f"best: train.lr={best:g}{end}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except lumina.UserError as error:
        sys.exit(f"error: {error}")
