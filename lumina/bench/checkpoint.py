"""What a save costs training: the steps after it against those before it, in the same run.

*Lost* is what the save blocked, what the steps beside it took longer than the median of the steps before it, and what
had to be waited for after the last step. A run without a save says how much of that is noise. Before each run the disk
has nothing left to write. The state is a dense model in fp32 with the two moments of AdamW.

torch.save leaves its file to the system unless the arm says that it waits for the disk; torch's asynchronous
distributed checkpoint (DCP) and ours always wait, and ours hashes what it writes and reads it back, too.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from lumina.bench.harness import TOTAL, Arm, Measurement, Parts, Ratio, interval, measure
from lumina.bench.speed import LR, SEQUENCES, random_batch
from lumina.checkpoint import places
from lumina.checkpoint.phases import Tensors
from lumina.checkpoint.places import MODEL, OPTIM
from lumina.checkpoint.writer import Way, Writer
from lumina.config.resolve import resolve, settle
from lumina.config.schema.config import Config
from lumina.parallel.world import ALONE
from lumina.progress import Tell
from lumina.telemetry.figures import size
from lumina.training import machine, setup
from lumina.training.optim import Optimizer
from lumina.training.precision import Precision
from lumina.training.step import Step, train_step

LOST, BLOCKED, ON_DISK, REST = "lost", "blocked", "on disk", "after the last step"
NONE, SAVE, SYNCED, ASYNC = "no save", "torch.save", "torch.save + fsync", "dcp.async_save"
OURS: Mapping[str, str] = {"inline": "ours, inline", "background": "ours, background"}
HEADER = ("arm", "lost, s", "blocked, s", "waited after the steps, s", "on disk after, s", "bandwidth")
SEQ_LEN = 16  # short steps: what a save takes from them is to be seen
SHAPES: Mapping[int, Mapping[str, Any]] = {  # by millions of parameters
    1: {"model.width": 128, "model.heads": 2, "model.layers": 4, "model.ffn": 384, "model.vocab": 512},
    10: {"model.width": 256, "model.heads": 4, "model.layers": 8, "model.ffn": 768, "model.vocab": 6144},
    100: {"model.width": 768, "model.heads": 12, "model.layers": 10, "model.ffn": 2304, "model.vocab": 16384},
}

Wait = Callable[[], float | None]  # waits until nothing is under way; seconds until the disk had it, if that is known
Save = Callable[[Tensors, Tensors, int], Wait]


class Training:
    """A dense model of so many million parameters and its optimizer, which all arms step and save."""

    def __init__(self, millions: int, threads: int) -> None:
        self.config = configure(millions, threads)
        torch.set_num_threads(threads)
        self.precision = Precision.of(self.config.precision, "cpu")
        self.model = setup.build_model(self.config, self.precision, ALONE)
        self.optimizer = Optimizer(self.model, self.config.train, ALONE)
        self.batch = random_batch(self.config, 0)
        self.plan = Step(micro_batches=1, clip=1.0, z_loss=0.0, bias_rate=0.0)

    @property
    def bytes(self) -> int:
        """What a save writes."""
        named = [*self.model.tensors().values(), *self.optimizer.tensors().values()]
        return sum(tensor.nbytes for tensor in named)

    def arm(self, name: str, save: Save | None, steps: int, folder: Path) -> Arm:
        """Runs take `steps` steps, with a save after half of them."""

        def run() -> Parts:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            os.sync()
            start = time.perf_counter()
            usual = statistics.median(self._steps(steps // 2))
            begun = time.perf_counter()
            wait = save(self.model.tensors(), self.optimizer.tensors(), 1) if save else lambda: None
            blocked = time.perf_counter() - begun
            beside = self._steps(steps - steps // 2)
            stepped = time.perf_counter()
            seconds = wait()
            end = time.perf_counter()
            rest, slowed = end - stepped, sum(beside) - len(beside) * usual
            known = {} if seconds is None else {ON_DISK: seconds}
            return {TOTAL: end - start, LOST: blocked + slowed + rest, BLOCKED: blocked, REST: rest, **known}

        return Arm(name, lambda: run, self.bytes, "B")

    def _steps(self, count: int) -> list[float]:
        """Takes so many steps; the seconds of each."""
        ends = [time.perf_counter()]
        for _ in range(count):
            train_step(self.model, self.optimizer, self.batch, LR, self.plan, self.precision, freeze_bias=False)
            ends.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(ends)]


def configure(millions: int, threads: int) -> Config:
    """The settings of such a training, with every choice settled."""
    keys: dict[str, Any] = {
        "model.kind": "dense", "model.head_dim": 64, "model.tied": False, "model.seq_len": SEQ_LEN,
        "train.batch_tokens": SEQUENCES * SEQ_LEN, "train.steps": 1000, "train.optimizer": "adamw",
        "train.compile": "off", "precision.mode": "fp32", "parallel.threads": threads, "parallel.device": "cpu",
        **SHAPES[millions], "model.kv_heads": SHAPES[millions]["model.heads"],
    }  # fmt: skip
    resolved = resolve("debug", keys)
    return settle(resolved, machine.choose(resolved.config)).config


def take(millions: int, threads: int, steps: int, rounds: int, folder: Path, progress: Tell) -> Measurement:
    """All arms in turns, on the disk that `folder` is on."""
    training = Training(millions, threads)
    saves: dict[str, Save | None] = {
        NONE: None, SAVE: _torch_save(folder, False), SYNCED: _torch_save(folder, True), ASYNC: _dcp(folder),
        **{name: _ours(folder, way) for way, name in OURS.items()},
    }  # fmt: skip
    arms = [training.arm(name, save, steps, folder) for name, save in saves.items()]
    try:
        return measure(
            arms, rounds, warm=1, progress=progress, millions=millions, steps=steps, bytes=training.bytes,
            auto=OURS[training.config.checkpoint.write],
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- arms ---------------------------------------------------------------------------------------------------


def _torch_save(folder: Path, synced: bool) -> Save:
    def save(model: Tensors, optim: Tensors, step: int) -> Wait:
        start = time.perf_counter()
        torch.save({MODEL: dict(model), OPTIM: dict(optim)}, folder / "state.pt")
        if synced:
            places.sync(folder / "state.pt")
        seconds = time.perf_counter() - start
        return lambda: seconds if synced else None

    return save


def _dcp(folder: Path) -> Save:
    """With memory to copy to that is taken once, as ours; its writer waits for the disk by default."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # its thread says so at each save
    stager = DefaultStager(StagingOptions(False, False, False, False))

    def save(model: Tensors, optim: Tensors, step: int) -> Wait:
        start, done = time.perf_counter(), list[float]()
        state = {MODEL: dict(model), OPTIM: dict(optim)}
        future: Any = state_dict_saver.async_save(
            state, checkpoint_id=folder / "dcp", async_stager=stager, no_dist=True
        )
        future.add_done_callback(lambda _: done.append(time.perf_counter() - start))

        def wait() -> float:
            future.result()
            return done[0]

        return wait

    return save


def _ours(folder: Path, way: str) -> Save:
    writer = Writer(folder, way=cast("Way", way))

    def save(model: Tensors, optim: Tensors, step: int) -> Wait:
        writer.save(step, model, optim, {})

        def wait() -> float:
            writer.finish()
            (receipt,) = writer.poll()
            return receipt.seconds

        return wait

    return save


# -- what it says -------------------------------------------------------------------------------------------


def lost(measured: Measurement, arm: str) -> Ratio:
    """Seconds that a save costs: the median over the rounds, with its interval."""
    return interval(measured.seconds[arm][LOST])


def rows(measured: Measurement) -> list[list[str]]:
    """A row for each way to save, and one for none."""
    made = []
    for arm in (NONE, SAVE, SYNCED, ASYNC, *OURS.values()):
        seconds, cost = measured.seconds[arm], lost(measured, arm)
        name = f"{arm} (auto)" if arm == measured.about["auto"] else arm
        disk = measured.median(arm, ON_DISK) if ON_DISK in seconds else None
        made.append(
            [
                name,
                f"{cost.median:.3f} [{cost.low:.3f}, {cost.high:.3f}]",
                f"{measured.median(arm, BLOCKED):.3f}",
                f"{measured.median(arm, REST):.3f}",
                "-" if disk is None else f"{disk:.3f}",
                "-" if disk is None else f"{size(measured.about['bytes'] / disk)}/s",
            ]
        )
    return made


def bars(measured: Measurement) -> list[list[str]]:
    """Whether the way that `auto` picks costs less than each peer and than the other way, in the same rounds."""
    auto, table = measured.about["auto"], []
    for other in (SAVE, ASYNC, *(name for name in OURS.values() if name != auto)):
        pairs = zip(measured.seconds[auto][LOST], measured.seconds[other][LOST], strict=True)
        less = interval([theirs - ours for ours, theirs in pairs])
        verdict = "met" if less.low > 0 else "NOT met" if less.median <= 0 else "met, not beyond noise"
        table.append(
            [f"{auto} costs less than {other}", f"{less.median:.3f} s [{less.low:.3f}, {less.high:.3f}]", verdict]
        )
    return table


def heading(measured: Measurement) -> str:
    """What was saved, and beside what."""
    about = measured.about
    return f"{about['millions']}M parameters, {size(about['bytes'])}, training on {about['threads']} threads"


def said(measured: Measurement) -> str:
    """What the table means."""
    step = measured.median(NONE) / measured.about["steps"]  # none is slowed there
    return (
        f"One save in {measured.about['steps']} steps of {step:.3f} s; medians over {measured.about['rounds']} rounds."
    )


def choices(cores: int) -> Sequence[int]:
    """Threads to train on: all cores, and one less where that leaves some."""
    return (cores, cores - 1) if cores > 1 else (1,)
