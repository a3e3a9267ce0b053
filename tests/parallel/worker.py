"""What each of several processes does; `test_processes.py` compares with one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from lumina.checkpoint import phases
from lumina.config.resolve import resolve, settle
from lumina.data.loader import Batch, Loader
from lumina.parallel.world import ALONE, World, join
from lumina.run.folder import Run
from lumina.training import oom, setup
from lumina.training.endings import Stopped
from lumina.training.machine import choose
from lumina.training.optim import FIGURES, Optimizer
from lumina.training.precision import LossScale, Precision
from lumina.training.step import METRICS, Step, train_step
from lumina.training.trainer import Trainer, resume

LENGTH, CUT = 9, 3  # steps of a run that changes hands after each third
KINDS = ("dense", "moe", "mod", "hybrid")
# Which process is killed, and in which part of its save: with its own files written, and with all of them sealed.
DEATHS = {"writing": (1, "flush"), "publishing": (0, "publish")}
CASES = [(kind, "muon", "fp32") for kind in KINDS] + [("hybrid", "adamw", "fp16"), ("hybrid", "adamw", "fp32")]


def uneven(kind: str, optimizer: str) -> dict[str, Any]:
    """Five experts and an odd vocabulary do not divide evenly; of four processes the last has no expert at all."""
    losses = {"model.moe.balance": 0.1, "model.moe.z_loss": 1e-2, "model.moe.dropout": 0.1, "model.moe.capacity": 0.9}
    experts = {"model.moe.experts": 5, **losses} if kind in ("moe", "hybrid") else {}
    return {"model.kind": kind, "train.optimizer": optimizer, "model.vocab": 263, **experts}


def one_step(kind: str, optimizer_name: str, mode: str, world: World) -> dict[str, Tensor]:
    """Gradients and weights after one step on a fixed batch of eight sequences."""
    resolved = resolve("tiny", uneven(kind, optimizer_name) | {"precision.mode": mode})
    config = settle(resolved, choose(resolved.config, world)).config
    precision = Precision(mode, mode, "cpu")
    model = setup.build_model(config, precision, world)
    optimizer = Optimizer(model, config.train, world, LossScale("cpu") if mode == "fp16" else None)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 260, (8, 65), generator=g)
    targets = ids[:, 1:].clone()
    targets[0, :20] = -1  # sequences that count unequally
    batch = Batch(ids[:, :-1], targets, torch.zeros(8, 64, dtype=torch.int32), torch.arange(8))
    step = Step(micro_batches=1 if world.size == 4 else 2, clip=1e9, z_loss=1e-4, bias_rate=1e-3, world=world)
    metrics = train_step(model, optimizer, batch, 1e-3, step, precision, freeze_bias=False)
    whole = {f"{name} grad": p.grad for name, p in model.named_parameters() if p.grad is not None} | model.tensors()
    full = {
        f"{kind} {optimizer_name} {mode} {name}": t.full_tensor() if isinstance(t, DTensor) else t
        for name, t in whole.items()
    }
    return {name: t.detach().clone().contiguous() for name, t in full.items()} | {
        f"{kind} {optimizer_name} {mode} metrics": metrics[: METRICS.index(FIGURES[0])]  # those are each process's own
    }


def gradients(cases: list[tuple[str, str, str]], world: World = ALONE) -> dict[str, Tensor]:
    return {name: t for case in cases for name, t in one_step(*case, world).items()}


def train(root: Path, text: Path, kinds: Sequence[str] = KINDS, steps: int = 20, micro_batch: int = 4) -> list[Run]:
    """A tiny run of every kind, half of them with AdamW.

    Micro-batches of four: one process adds up the same two halves that two processes do.
    """
    return [Trainer("tiny", keys_of(kind, text, steps, micro_batch), root=root / kind).fit() for kind in kinds]


def keys_of(kind: str, text: Path, steps: int, micro_batch: int) -> dict[str, Any]:
    i = KINDS.index(kind)
    return uneven(kind, ("muon", "adamw")[i % 2]) | {
        "data.train": str(text),
        "train.steps": steps,
        "train.micro_batch": micro_batch,
        "train.eval_every": steps // 2,
        "train.recompute": ("none", "full", "selective", "full")[i],
        "checkpoint.every": steps // 2,
        "checkpoint.keep_last": 9,
    }


def stop_at(step: int) -> Callable[[dict[str, Any]], None]:
    """A listener that sends this process a SIGTERM when it sees a step."""

    def stop(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


def noted(path: Path) -> Callable[..., NDArray[np.int64]]:
    """`Loader.ids` that also appends what it returns to a file."""
    ids = Loader.ids

    def note(self: Loader, i: int, *rest: Any) -> NDArray[np.int64]:
        found = ids(self, i, *rest)
        with path.open("a") as file:
            file.write(f"{i} {found.tolist()}\n")
        return found

    return note


def interrupt(root: Path, text: Path, listeners: Sequence[Any] = ()) -> None:
    """A run of `LENGTH` steps, unless a listener stops it."""
    with suppress(Stopped):
        Trainer("tiny", keys_of("hybrid", text, LENGTH, 4), root=root, listeners=listeners).fit()


def scarce(root: Path, text: Path) -> None:
    """The memory of the second process runs out in step 3, for as long as its micro-batch is of four."""
    real = oom.gradients

    def short(*arguments: Any) -> Any:
        _, _, _, plan, _, step, rehearsal = arguments
        if plan.world.rank == 1 and step == 3 and plan.micro_batches == 1 and not rehearsal:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return real(*arguments)

    oom.gradients = short
    Trainer("tiny", keys_of("moe", text, 6, 4) | {"checkpoint.every": 2}, root=root).fit()


def saving_often(root: Path, text: Path) -> None:
    """A run that saves every second step."""
    Trainer("tiny", keys_of("hybrid", text, 8, 4) | {"checkpoint.every": 2}, root=root).fit()


def killed(root: Path, text: Path, how: str) -> None:
    """The same, until a process is killed in the save of step 4, as `DEATHS` says."""
    rank, part = DEATHS[how]
    real = getattr(phases, part)

    def die(root: Path, aside: Path, step: int, *rest: Any) -> Any:
        if step == 4 and join().rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(root, aside, step, *rest)

    setattr(phases, part, die)
    saving_often(root / how, text)


# -- in each of them --------------------------------------------------------------------------------------------------


def write_gradients(out: Path) -> None:
    """One step of every case: gradients and updated weights, put together."""
    found = gradients(CASES if join().size == 2 else CASES[-2:], join())
    if join().main:
        save_file(found, out)


def interrupt_one_of_two(root: Path, text: Path, ids: Path) -> None:
    """A run that is not interrupted, and one that is, by SIGTERM after `CUT` steps."""
    Loader.ids = noted(ids)  # type: ignore[method-assign]
    interrupt(root / "whole", text)
    interrupt(root / "parts", text, [stop_at(CUT)])


def go_on(runs: Sequence[Path], ids: Path | None = None) -> None:
    if ids:
        Loader.ids = noted(ids)  # type: ignore[method-assign]
    for path in runs:
        resume(Run(path))


def go_on_beside_one_left_alone(root: Path, text: Path, runs: Sequence[Path]) -> None:
    saving_often(root, text)
    go_on(runs)
