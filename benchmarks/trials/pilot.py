"""The pilot of trials: whether a short forked trial has the sign of what an intervention does by the end of the run.

    python benchmarks/trials/pilot.py run 0.15M muon 0 FILE.jsonl     # one healthy dense run, forked; --help for more
    python benchmarks/trials/pilot.py report NAME FILE.jsonl ...      # NAME.md beside this file, from raw files

A run trains to the fork. From there on a control and each candidate go h steps on the same batches. The difference of
their held-out losses, candidate less control, is taken three times: at once (naive), after a probe of m more steps in
which the rate falls linearly to 0 (probed), and where both went on to the end of the run and its planned decay (truth).
Pairs are data orders: pair 1 is the run's own, and only it has a truth.

What matters most comes first: the truth, then (h, m) in the order of `Size.worth`, each in all pairs. A process whose
time is over stops; each row that it wrote is valid. With `--only` it is one (h, m) and no truth: another process of the
same run, on a machine like it, told that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch

from lumina.checkpoint.snapshot import Snapshot
from lumina.config.overlay import Overlay, check
from lumina.data.loader import Batch
from lumina.training.course import Course
from lumina.training.evaluate import evaluate
from lumina.training.trainer import stand
from lumina.verify.report import about

BEGAN = time.monotonic()
CONTROL = "control"
CANDIDATES: dict[str, tuple[str, float]] = {
    "lr x0.25": ("lr.scale", 0.25),
    "lr x0.5": ("lr.scale", 0.5),
    "lr x2": ("lr.scale", 2.0),
    "clip halved": ("clip", 0.5),
    "weight decay x3": ("weight_decay", 0.3),
}
PIECE = 2048  # tokens of a piece of held-out text; arms are compared on pieces evenly spread
KEYS: dict[str, Any] = {
    "model.kind": "dense", "train.schedule": "wsd", "train.warmup": 0.05, "train.decay": 0.2, "train.clip": 1.0,
    "train.weight_decay": 0.1, "train.eval_every": 0, "checkpoint.every": 0, "orchestrator.mode": "off",
    "orchestrator.probe_every": 0, "data.train": ["sample"],
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A healthy run and how it is tried."""

    steps: int
    fork: int  # the step after which it is left
    tokens: int  # a step
    sample: int  # held-out tokens that arms are compared on; the truth is told on all of them, too
    pairs: int
    worth: tuple[tuple[int, int], ...]  # h and m
    lr: float = 3e-3
    keys: dict[str, Any] = field(default_factory=dict)


FEW = ((100, 100), (100, 25), (200, 50), (50, 12))
SWEEP = (
    (100, 25), (100, 100), (50, 100), (200, 100), (100, 50), (25, 100), (50, 50), (200, 200), (200, 50), (300, 150),
    (50, 25), (50, 12), (25, 25), (300, 75), (100, 12), (25, 12), (25, 6), (200, 25), (300, 37), (50, 6), (25, 3),
)  # fmt: skip
SIZES = {
    "0.15M": Size(1200, 500, 512, 32_768, 4, SWEEP),
    "1M": Size(
        600, 250, 512, 16_384, 3, FEW,
        keys={"model.width": 128, "model.layers": 5, "model.ffn": 384, "model.head_dim": 32, "model.seq_len": 128},
    ),
    "10M": Size(
        800, 350, 8192, 65_536, 3, FEW[:3],
        keys={"model.width": 384, "model.layers": 6, "model.heads": 6, "model.head_dim": 64, "model.ffn": 1024,
              "model.seq_len": 256},
    ),
}  # fmt: skip


class LateError(Exception):
    """The time of this process is over."""


class Writer:
    """Rows to a file as they come: what was written is valid whatever happens next."""

    def __init__(self, path: Path, **common: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.common = path.open("w", encoding="utf-8"), common

    def __call__(self, type: str, **fields: Any) -> None:
        short = {name: round(value, 5) if isinstance(value, float) else value for name, value in fields.items()}
        self.file.write(json.dumps({"t": type, **self.common, **short}) + "\n")
        self.file.flush()


class Point(NamedTuple):
    """Where an arm stands after some steps, and what lies over its plan."""

    state: Snapshot
    overlays: tuple[Overlay, ...]


class Pilot:
    """Arms of one run, taken outside its session; each loss is of a causal evaluation."""

    def __init__(self, course: Course, size: Size, told: Writer, deadline: float) -> None:
        self.course, self.size, self.told, self.deadline = course, size, told, deadline
        self.norms: list[float] = []
        self.points: dict[tuple[str, int, int], Point] = {}  # of an arm in an order, after h steps
        course.emit = self._hear
        pieces = course.parts.heldout(course.parts.main_kind, PIECE)
        self.sample: list[Batch] = [
            pieces[i] for i in range(0, len(pieces), max(1, len(pieces) * PIECE // size.sample))
        ]
        self.bytes = pieces.text_bytes

    def __call__(self, orders: Sequence[int], truth: bool) -> None:
        """Everything, until the time is over; without order 0 there is no truth."""
        self._to_fork()
        if truth and 0 in orders:
            for arm in (CONTROL, *CANDIDATES):
                for h in sorted({h for h, _ in self.size.worth}):
                    self._reach(arm, 0, h)
                self._go(self.size.steps - self.course.state.progress.step)
                self.told("truth", arm=arm, order=0, sample=self._loss(), loss=self.course.evaluate().loss)
        for h, m in self.size.worth:
            for order in orders:
                for arm in (CONTROL, *CANDIDATES):
                    self._back(self._reach(arm, order, h))
                    decay = Overlay("probe", "lr.decay", m, self.course.state.progress.step + 1)
                    self.course.state.overlays = (*self.course.state.overlays, decay)
                    self._go(m)
                    self.told("probed", arm=arm, order=order, h=h, m=m, sample=self._loss())

    def _to_fork(self) -> None:
        course, size = self.course, self.size
        course.begin()
        self._go(size.fork)
        course.observe()
        tenths = statistics.quantiles(self.norms[-200:], n=10)
        norms = [round(tenths[i], 3) for i in (0, 4, 8)]
        pace = 1e3 * course.state.progress.wall / size.fork
        sample, loss = self._loss(), course.evaluate().loss
        tokens = sum(one.ids_BS.numel() for one in self.sample)
        self.told("fork", step=size.fork, sample=sample, loss=loss, norms=norms, step_ms=pace, sample_tokens=tokens)
        self.fork = self._here()

    def _reach(self, arm: str, order: int, h: int) -> Point:
        """Stands h steps behind the fork, and says the loss there when that is new."""
        if (arm, order, h) not in self.points:
            behind = [at for name, of, at in self.points if (name, of) == (arm, order) and at < h]
            self._back(self.points[arm, order, max(behind)] if behind else self._laid(arm, order))
            self._go(h - max(behind, default=0))
            self.points[arm, order, h] = self._here()
            self.told("naive", arm=arm, order=order, h=h, sample=self._loss())
        return self.points[arm, order, h]

    def _laid(self, arm: str, order: int) -> Point:
        """The fork, under what the arm is to have."""
        begin, laid = self.size.fork + 1, list(self.fork.overlays)
        if arm != CONTROL:
            laid.append(check(Overlay(arm, *CANDIDATES[arm], begin)))
        if order:
            laid.append(check(Overlay("order", "data.order", order, begin), fork=True))
        return Point(self.fork.state, tuple(laid))

    def _go(self, steps: int) -> None:
        for _ in range(steps):
            if time.monotonic() > self.deadline:
                raise LateError
            self.course.step()

    def _here(self) -> Point:
        return Point(self.course.take(), self.course.state.overlays)

    def _back(self, point: Point) -> None:
        self.course.state.overlays = point.overlays
        self.course.return_to(point.state)

    def _loss(self) -> float:
        return evaluate(self.course.parts.model, self.sample, self.bytes, self.course.parts.precision, None).loss

    def _hear(self, type: str, /, **fields: Any) -> None:
        if type == "step":
            self.norms.append(fields["grad_norm"])


def run(
    size: str,
    optimizer: str,
    seed: int,
    path: Path,
    orders: Sequence[int],
    seconds: float,
    device: str,
    code: str | None,
    only: tuple[int, int] | None,
) -> None:
    """Trains one run, forks it, and writes every number as a row of `path`."""
    shape, told = SIZES[size], Writer(path, size=size, optimizer=optimizer, seed=seed)
    shape = replace(shape, worth=(only,)) if only else shape
    keys = KEYS | shape.keys | {"train.steps": shape.steps, "train.batch_tokens": shape.tokens, "train.seed": seed}
    keys |= {"train.optimizer": optimizer, "train.lr": shape.lr, "parallel.device": device}
    keys |= {} if device == "cpu" else {"precision.mode": "bf16"}
    with tempfile.TemporaryDirectory(prefix="lumina-pilot-") as folder:
        course = stand("tiny", keys, Path(folder)).course
        parameters = sum(one.numel() for one in course.parts.model.parameters())
        named = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        told("about", **about() | ({"commit": code} if code else {}), device=named, parameters=parameters, keys=keys)
        try:
            Pilot(course, shape, told, BEGAN + seconds)(orders, truth=not only)
            told("done", seconds=time.monotonic() - BEGAN)
        except LateError:
            told("late", seconds=time.monotonic() - BEGAN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("run", help="one run, forked")
    one.add_argument("size", choices=SIZES)
    one.add_argument("optimizer", choices=("muon", "adamw"))
    one.add_argument("seed", type=int)
    one.add_argument("file", type=Path)
    one.add_argument("--orders", help="pairs, from 0, with commas between; usually all")
    one.add_argument("--seconds", type=float, default=1e9, help="after which it stops")
    one.add_argument("--device", default="cpu")
    one.add_argument("--commit", help="of the code, where it lies in no checkout")
    one.add_argument("--only", metavar="H,M", help="this trial alone, and no truth")
    page = verbs.add_parser("report", help="a page from raw files")
    page.add_argument("name")
    page.add_argument("files", type=Path, nargs="+")
    page.add_argument("--say", default="", help="what a user may believe, in one sentence")
    asked = parser.parse_args()
    if asked.verb == "report":
        path = Path(__file__).parent / f"{asked.name}.md"
        path.write_text(report.page(report.read(asked.files), asked.say), encoding="utf-8")
        return
    orders = [int(order) for order in asked.orders.split(",")] if asked.orders else range(SIZES[asked.size].pairs)
    h, m = map(int, asked.only.split(",")) if asked.only else (0, 0)
    only, where = (h, m) if h else None, (asked.device, asked.commit)
    run(asked.size, asked.optimizer, asked.seed, asked.file, orders, asked.seconds, *where, only)


if __name__ == "__main__":
    main()
