"""What compiling and recomputing cost and save: the debug preset with each option, in alternating processes.

    python benchmarks/options/run.py [repeats]

Prints for each repeat and arm the median step time, its ratio to the plain arm, the largest resident memory, and the
seconds that the first step took (which is where compiling happens, each time from scratch).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

STEPS, WARM = 40, 10
ARMS = {
    "plain": [],
    "compile": ["train.compile=on"],
    "selective": ["train.recompute=selective"],
    "full": ["train.recompute=full"],
    "compile+selective": ["train.compile=on", "train.recompute=selective"],
}


def measure(keys: list[str], folder: Path) -> tuple[float, float, float]:
    """Seconds of the first step, median seconds of those after the warm-up, largest memory in MiB."""
    fixed = ["train.compile=off", f"train.steps={STEPS}", "train.eval_every=0", "checkpoint.every=0"]
    settings = dict(setting.split("=") for setting in [*fixed, *keys])
    command = [sys.executable, "-m", "lumina", "train", "debug", *(f"{k}={v}" for k, v in settings.items())]
    cold = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    subprocess.run([*command, "--root", str(folder), "--fresh"], check=True, capture_output=True, env=cold)
    (log,) = folder.glob("*/events.jsonl")
    steps = [event for event in map(json.loads, log.read_text().splitlines()) if event["t"] == "step"]
    seconds = [after["wall"] - before["wall"] for before, after in pairwise(steps)]
    return steps[0]["wall"], statistics.median(seconds[WARM:]), max(step["mem"] for step in steps) / 2**20


def main(repeats: int) -> None:
    for repeat in range(repeats):
        plain = 0.0
        for name, keys in ARMS.items():
            with tempfile.TemporaryDirectory() as folder:
                first, median, memory = measure(keys, Path(folder))
            plain = plain or median
            figures = f"step {median:.3f}s  ratio {median / plain:.3f}  {memory:5.0f} MiB  first {first:.1f}s"
            print(f"{repeat} {name:17} {figures}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
