"""Memory that training takes, moment by moment, to be held against what the planner says.

A step is taken as a run takes it (`step.gradients`, `step.apply`), then an evaluation, and a meter is read at the end
of each moment. The meters: `allocator` (a GPU's), `tracker` (PyTorch's count of fake tensors), `resident` (a process's
memory on a CPU).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lumina.config.names import kinds_of
from lumina.config.resolve import Resolved, resolve, settle
from lumina.config.schema.config import Config
from lumina.data.loader import Batch
from lumina.errors import UserError
from lumina.model.transformer import Transformer
from lumina.parallel.world import ALONE, World
from lumina.planner import memory as forecasts
from lumina.planner.memory import EVAL_TOKENS
from lumina.training import machine
from lumina.training.optim import Optimizer
from lumina.training.precision import LossScale, Precision
from lumina.training.step import Step, apply, gradients

Keys = Mapping[str, Any]
MOMENTS = ("forward", "backward", "optimizer", "evaluation")


class Meter(Protocol):
    """Reads memory in bytes: what is allocated, and the most that was since it was last asked for the most."""

    def begin(self, model: Transformer, optimizer: Optimizer) -> None:
        """Called once they are built, before the first step."""

    def now(self) -> int: ...

    def most(self) -> int: ...


@dataclass(frozen=True)
class Walk:
    """Bytes at the most, by moment: what was allocated at its end, and the most inside it."""

    most: Mapping[str, int]
    end: Mapping[str, int]

    @property
    def peak(self) -> int:
        return max(self.most.values())


def configure(keys: Keys) -> Config:
    """`keys` over the debug preset as a dense model, settled for this machine; keys of other kinds are passed over."""
    asked = resolved(keys)
    return settle(asked, machine.choose(asked.config)).config


def resolved(keys: Keys) -> Resolved:
    """The same, with the machine's choices open."""
    kind = keys.get("model.kind", "dense")
    own = {key: value for key, value in keys.items() if kind in kinds_of(key)}
    return resolve("debug", {"model.kind": kind, "train.steps": 1000, **own})


def walk(config: Config, model: Transformer, meter: Meter, steps: int = 2, world: World = ALONE) -> Walk:
    """Takes `steps` with the `model` of `config` and evaluates once; random ids, two documents a sequence.

    The second step has every moment, and every workspace of a library, already.
    """
    most: dict[str, int] = {}
    end: dict[str, int] = {}

    def mark(moment: str) -> None:
        most[moment] = max(most.get(moment, 0), meter.most())
        end[moment] = meter.now()

    device = config.parallel.device
    precision = Precision.of(config.precision, device)
    optimizer = Optimizer(model, config.train, world, LossScale(device) if config.precision.mode == "fp16" else None)
    meter.begin(model, optimizer)
    mark("state")
    sequences = config.train.batch_tokens // config.model.seq_len
    plan = Step(
        micro_batches=sequences // world.size // int(config.train.micro_batch),
        clip=config.train.clip,
        z_loss=config.train.z_loss,
        bias_rate=config.model.moe.bias_rate if config.model.moe else 0.0,
        world=world,
        frozen=config.train.lora.rank > 0,
    )
    batch = random_batch(config, sequences)
    with _marking(model, mark):
        for step in range(steps):
            found = gradients(model, optimizer, batch, plan, precision, step)
            mark("backward")
            apply(model, optimizer, batch, 1e-4, plan, found)
            mark("optimizer")
            del found
    held_out = random_batch(config, max(1, EVAL_TOKENS // config.model.seq_len)).to(device)
    with precision.evaluating():
        model.evaluate(held_out.ids_BS, held_out.segments_BS, held_out.targets_BS)
    mark("evaluation")
    return Walk(most, end)


@contextmanager
def _marking(model: Transformer, mark: Any) -> Iterator[None]:
    """Marks where each forward begins (a backward may have ended) and ends."""
    before = model.register_forward_pre_hook(lambda *_: mark("backward"))
    after = model.register_forward_hook(lambda *_: mark("forward"))
    try:
        yield
    finally:
        before.remove()
        after.remove()


def random_batch(config: Config, sequences: int) -> Batch:
    """Any token as likely as any other; two documents in each sequence."""
    seq_len = config.model.seq_len
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.model.vocab, (sequences, seq_len + 1), generator=generator)
    segments = (torch.arange(seq_len) >= seq_len // 2).int().expand(sequences, -1).contiguous()
    return _AllCounted(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), segments, torch.arange(sequences))


class _AllCounted(Batch):
    """Counts its targets without looking at them: they may be fake."""

    @property
    def targets(self) -> int:
        return self.targets_BS.numel()


def forecast_of(keys: Keys, device: str, attention: str | None = None, version: str | None = None) -> forecasts.Memory:
    """What the planner says of them, given the attention kernel that was seen, and in an earlier version of PyTorch."""
    torch_version = None if version is None else forecasts.major_minor(version)
    return forecasts.memory(resolved(keys).config, 1, device, attention, torch_version)


def earlier(path: Path, device: str) -> dict[str, Any]:
    """What was measured before, maybe on another machine: the JSON of a report.

    Raises `UserError` if it is none, or one of another `device`.
    """
    try:
        measured = json.loads(path.read_bytes())
        if not (isinstance(measured["about"], dict) and measured["cases"]):
            raise ValueError("it has no cases")
        if measured["device"] != device:
            raise UserError(f"{path}: measured otherwise", fix=f"say so: --device {measured['device']}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", fix="name the .json of a report") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no measured memory: {error}", fix="name the .json of a report") from None
    return dict(measured)
