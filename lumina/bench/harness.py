"""Honest timing: arms take turns in one process, and are compared only inside a turn.

A machine's speed moves by half within minutes, and everything on it moves together. So every round runs each arm
once, in an order drawn anew (what ran before leaves its mark on caches), the machine's own limits (a square matmul, a
copy) among them, and a ratio is the median over the rounds of the ratio inside a round. Its interval is of order
statistics: it assumes nothing of how the ratios are distributed. Memory is measured for each arm in a process of its
own, for what one arm has taken the next one would find.

A *suite* is a function at the top of a module that returns arms: so a fresh process finds an arm by name.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lumina.progress import Tell, silent, tracked
from lumina.training.host import commit
from lumina.training.machine import MATMUL_SIZE, facts

CONFIDENCE = 0.95
COPY_BYTES = 1 << 27  # larger than caches
MATMUL, COPY = "matmul", "copy"
TOTAL = "total"

Parts = Mapping[str, float]  # seconds by name
Run = Callable[[], Parts]
Suite = Callable[..., "list[Arm]"]


@dataclass(frozen=True)
class Arm:
    """Something to be timed: `build` prepares it and returns what runs once, which says how long its parts took.

    `amount` of `unit` is what one run does (tokens, FLOP, bytes); `flops` of it are counted towards utilisation.
    """

    name: str
    build: Callable[[], Run]
    amount: float
    unit: str = "tok"
    flops: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)


class Watch:
    """Times the parts of one run: `watch("forward")` ends a part. Waits for the device each time."""

    def __init__(self, device: str) -> None:
        self.device, self.parts = device, dict[str, float]()
        self._wait()
        self.start = self.last = time.perf_counter()

    def __call__(self, part: str) -> None:
        self._wait()
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now

    def done(self) -> Parts:
        return self.parts | {TOTAL: self.last - self.start}

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        elif self.device == "mps":
            torch.mps.synchronize()


@dataclass(frozen=True)
class Ratio:
    """The median of a ratio over rounds, and the interval that holds it with `CONFIDENCE`."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measurement:
    """Seconds by arm, part and round, and what it takes to read them."""

    arms: Sequence[Arm]
    seconds: Mapping[str, Mapping[str, Sequence[float]]]
    memory: Mapping[str, int]  # bytes that an arm needs above an empty process; empty if not asked for
    about: Mapping[str, Any]

    def median(self, arm: str, part: str = TOTAL) -> float:
        return statistics.median(self.seconds[arm][part])

    def ratio(self, arm: str, to: str, part: str = TOTAL) -> Ratio:
        """How much longer `arm` takes than `to`."""
        return interval([a / b for a, b in zip(self.seconds[arm][part], self.seconds[to][part], strict=True)])

    def amount(self, arm: str) -> float:
        """What one run of it does, in its unit."""
        return self._arm(arm).amount

    def rate(self, arm: str) -> float:
        """Units a second, at the median."""
        return self.amount(arm) / self.median(arm)

    def utilisation(self, arm: str) -> Ratio:
        """Counted FLOPs over what the square matmul of the same round did in that time."""
        peak, flops = self._arm(MATMUL).amount, self._arm(arm).flops
        rounds = zip(self.seconds[arm][TOTAL], self.seconds[MATMUL][TOTAL], strict=True)
        return interval([flops / seconds / (peak / matmul) for seconds, matmul in rounds])

    def _arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def as_json(self) -> dict[str, Any]:
        arms = {
            arm.name: {"amount": arm.amount, "unit": arm.unit, "flops": arm.flops, **arm.facts, "seconds": seconds}
            for arm, seconds in ((arm, self.seconds[arm.name]) for arm in self.arms)
        }
        return {"about": self.about, "arms": arms, "memory_bytes": self.memory}


def measure(
    arms: Sequence[Arm], rounds: int, warm: int = 2, device: str = "cpu", dtype: torch.dtype = torch.float32,
    memory: Mapping[str, int] | None = None, progress: Tell = silent, **about: Any,
) -> Measurement:  # fmt: skip
    """Times all arms and the machine's ceilings in `rounds` turns, after `warm` turns that do not count."""
    arms = [*arms, *ceilings(device, dtype)]
    runs = [(arm.name, arm.build()) for arm in arms]
    seconds: dict[str, dict[str, list[float]]] = {arm.name: {} for arm in arms}
    order = random.Random(0)
    gc.collect()
    gc.disable()  # a collection falls on whichever arm is running
    try:
        for turn in tracked(range(-warm, rounds), "measuring", warm + rounds, progress):
            for name, run in order.sample(runs, len(runs)):
                parts = run()
                for part, value in parts.items():
                    if turn >= 0:
                        seconds[name].setdefault(part, []).append(value)
            gc.collect()
    finally:
        gc.enable()
    return Measurement(arms, seconds, memory or {}, circumstances(device) | about | {"rounds": rounds, "warm": warm})


def interval(values: Sequence[float]) -> Ratio:
    """Median and its distribution-free interval: the order statistics that enclose it with `CONFIDENCE`.

    With fewer than six values no two of them do; the extremes are given then.
    """
    ordered, n = sorted(values), len(values)
    k = 0
    while 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n <= 1 - CONFIDENCE:
        k += 1
    k = max(k, 1)
    return Ratio(statistics.median(ordered), ordered[k - 1], ordered[n - k])


def ceilings(device: str, dtype: torch.dtype) -> list[Arm]:
    """The machine's own limits as arms: a square matmul in `dtype` and a copy in memory."""
    size = MATMUL_SIZE[device]

    def multiply() -> Run:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        return timed(lambda: a @ b, device)

    def copy() -> Run:
        source = torch.ones(COPY_BYTES // 4, device=device)
        target = torch.empty_like(source)
        return timed(lambda: target.copy_(source), device)

    return [
        Arm(MATMUL, multiply, 2.0 * size**3, "FLOP", 2.0 * size**3),
        Arm(COPY, copy, 2.0 * COPY_BYTES, "B"),  # read and written
    ]


def timed(work: Callable[[], object], device: str) -> Run:
    """`work` as an arm's run of one part."""

    def run() -> Parts:
        watch = Watch(device)
        work()
        watch(TOTAL)
        return {TOTAL: watch.parts[TOTAL]}

    return run


def circumstances(device: str) -> dict[str, Any]:
    """Machine, versions and commit."""
    return facts(device) | {
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": platform.machine(),
    }


# -- memory ---------------------------------------------------------------------------------------------------


def memory_of(
    suite: Suite, names: Sequence[str], repeats: int = 2, progress: Tell = silent,
    environment: Mapping[str, str] | None = None, **settings: Any,
) -> dict[str, int]:  # fmt: skip
    """Bytes that each arm of `suite(**settings)` needs at its peak, each in a fresh process, above an empty one.

    `environment` is what such a process has besides ours.
    """
    found: dict[str, int] = {}
    for name in tracked(names, "measuring memory", len(names), progress):
        order = [suite.__module__, suite.__name__, name, repeats, settings]
        command = [sys.executable, "-c", f"from {__name__} import peak; peak()", json.dumps(order)]
        own = {**os.environ, **(environment or {})}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=own)
        found[name] = int(done.stdout.split()[-1])
    return found


def peak() -> None:
    """What `memory_of` runs in the fresh process: prints the bytes."""
    module, function, name, repeats, settings = json.loads(sys.argv[1])
    arms = getattr(importlib.import_module(module), function)(**settings)
    before = _most_resident()
    run = next(arm for arm in arms if arm.name == name).build()
    for _ in range(repeats):
        run()
    print(torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else _most_resident() - before)


def _most_resident() -> int:
    """Bytes of main memory that this process has held at most."""
    status = Path("/proc/self/status")
    if status.exists():  # what `getrusage` says begins with the memory of the process that started this one
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
