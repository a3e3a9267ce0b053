"""Grouped products on a CPU: the kernel of `lumina.model.grouped` against `F.grouped_mm`, in alternating processes.

python benchmarks/grouped/run.py > benchmarks/grouped/DATE.log

Each process multiplies bf16 rows of new random loads (4 experts, 192 x 512), forward and both gradients, and prints
the median time in ms of its last half and how much its resident memory grew, in MiB.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import psutil
import torch
from torch import Tensor

from lumina.model import grouped

EXPERTS, WIDTH, FFN, ROWS, REPEATS, ROUNDS = 4, 192, 512, (8192, 2048), 150, 2
ARMS = {
    "native": (grouped.native_rows, grouped.native_weights),
    "ours": (grouped._cpu_rows, grouped._cpu_weights),
}


def loads(rows: int) -> Tensor:
    """Running counts of rows per expert, as an unbalanced router gives them."""
    share_E = torch.softmax(0.4 * torch.randn(EXPERTS), 0)
    return torch.multinomial(share_E, rows, replacement=True).bincount(minlength=EXPERTS).cumsum(0).to(torch.int32)


def measure(arm: str) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    rows_of, weights_of = ARMS[arm]
    w = torch.randn(EXPERTS, FFN, WIDTH).bfloat16()
    data = {rows: (torch.randn(rows, WIDTH).bfloat16(), torch.randn(rows, FFN).bfloat16()) for rows in ROWS}
    process, times = psutil.Process(), {rows: list[float]() for rows in ROWS}
    before = process.memory_info().rss
    for _ in range(REPEATS):
        for rows, (x, g) in data.items():
            offs = loads(rows)
            start = time.perf_counter()
            rows_of(x, w.transpose(-1, -2), offs), rows_of(g, w, offs), weights_of(g, x, offs)
            times[rows].append(time.perf_counter() - start)
    medians = ", ".join(f"{rows} rows {1e3 * statistics.median(t[REPEATS // 2 :]):.2f} ms" for rows, t in times.items())
    print(f"{arm:7} {medians}, memory +{(process.memory_info().rss - before) / 2**20:.0f} MiB", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        print(f"torch {torch.__version__}", flush=True)
        for arm in [*ARMS] * ROUNDS:
            subprocess.run([sys.executable, __file__, arm], check=True)
