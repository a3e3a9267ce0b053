"""What torch.compile costs and saves: the debug preset, compiled and not, in alternating processes.

    python benchmarks/compile/run.py [repeats]

Prints, for each pair, the median step times, their ratio, and the seconds that the first step took longer.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

STEPS, WARM = 40, 10


def arm(compile: str, folder: Path) -> tuple[float, float]:
    """Seconds of the first step, and the median of those after the warm-up."""
    keys = [f"train.compile={compile}", f"train.steps={STEPS}", "train.eval_every=0", "checkpoint.every=0"]
    command = [sys.executable, "-m", "lumina", "train", "debug", *keys, "--root", str(folder), "--fresh"]
    subprocess.run(command, check=True, capture_output=True)
    (log,) = folder.glob("*/events.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    walls = [event["wall"] for event in events if event["t"] == "step"]
    steps = [after - before for before, after in pairwise(walls)]
    return walls[0], statistics.median(steps[WARM:])


def main(repeats: int) -> None:
    for _ in range(repeats):
        figures = {}
        for compile in ("off", "on"):
            with tempfile.TemporaryDirectory() as folder:
                figures[compile] = arm(compile, Path(folder))
        (first_off, off), (first_on, on) = figures["off"], figures["on"]
        print(
            f"off {off:.3f}s  on {on:.3f}s a step  ratio {on / off:.3f}  compiling {first_on - first_off:.0f}s",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
