"""What holds in every sound run, whatever it learns: broken once, it is a fault; no statistics are needed to say so.

TrainCheck (Jiang et al. 2025, 2506.14813) finds most silent errors by such rules within a step, where curves show few.
Each step is checked on the host (`after_step`; the count of optimizer steps comes with its metrics, `counted`); what
reads weights or waits for a device is checked at a look (`at_look`). Each that is broken is a sentence that begins with
its name. What they remember is in `Progress`, so that a restore point brings it back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from lumina.config.overlay import Block
from lumina.config.schema.config import Config
from lumina.data.loader import Batch
from lumina.parallel.sharding import local
from lumina.training.setup import Parts

if TYPE_CHECKING:
    from lumina.training.state import Progress

REMEMBERED = 256  # contents of batches: a loader that is stuck repeats a few
PIECE = 1 << 24  # elements that are summed at once: 128 MiB in fp64
ROUNDING = 1e-4  # of a sum of moves in fp32


def content(batch: Batch) -> str:
    """A hash of the batch's token ids, which have to be on the host."""
    return xxh3_64_hexdigest(batch.ids_BS.numpy().data)


def fingerprint(config: Config) -> str:
    """A hash of every settled value but those that only say how the steps are computed."""
    values = config.model_dump(mode="json")
    values["train"].pop("micro_batch")  # halved where memory runs out
    return xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())


def counted(progress: Progress, metrics: Mapping[str, float]) -> Iterator[str]:
    """The rule of the steps that the optimizer took, told by the metrics of `progress.step`."""
    skipped = progress.skipped + int(metrics["skipped"])
    wanted = progress.step - skipped
    if metrics["optimizer_steps"] != wanted:
        yield (
            f"optimizer step: the optimizer counts {metrics['optimizer_steps']:.0f} steps after step {progress.step}, "
            f"of which {skipped} were skipped"
        )


class Invariants:
    """Those of one session; `progress` is given with each call, for a restore point replaces it."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.config = parts, parts.config
        self.begun = fingerprint(parts.config)
        self.tensors = parts.model.tensors()
        self.rests = {name: rest for name in self.tensors if (rest := self._rests(name)) is not None}

    # -- each step ----------------------------------------------------------------------------------------------------

    def after_step(
        self, progress: Progress, step: int, values: Mapping[str, float], batch: Batch, past: Sequence[Block]
    ) -> None:
        """Checks `step`, just taken by these planned `values` on `batch`, read past these blocks; `progress` is still
        at the step before, and remembers what is found."""
        number, seen = self.parts.loader.planned(step - 1, past), content(batch)
        planned = self.parts.loader.ids(step - 1, past, int(values["data.order"]))
        earlier = _earlier(progress, step, seen)
        # Read afresh it is the same: the data has it twice, in the next epoch or as copies.
        repeats = earlier > 0 and content(self.parts.loader.fetch(planned)) == seen
        again = 0 if repeats else earlier
        broken = [*self._optimizer(values), *self._batch(progress, step, number, batch, planned, again)]
        progress.batch, progress.broken = number, broken
        progress.content = "" if repeats else seen
        progress.contents = [*progress.contents, seen][-REMEMBERED:]
        progress.rates += values["lr"]
        progress.travel += values["bias_rate"]

    def _optimizer(self, values: Mapping[str, float]) -> Iterator[str]:
        optimizer, train = self.parts.optimizer, self.config.train
        decayed, plain, predictors = optimizer.adamw.param_groups
        rates = {group["lr"] for group in (decayed, plain)}
        if predictors["lr"] != values["lr"] * values["predictor"]:
            rates.add(predictors["lr"])
        if rates != {values["lr"]}:
            yield f"schedule: the optimizer moved at lr {_list(rates)}, planned is {values['lr']:g}"
        decays = decayed["weight_decay"], optimizer.weight_decay, plain["weight_decay"]
        if decays != (values["weight_decay"], values["weight_decay"], 0.0):
            yield f"config: the optimizer decays weights by {_list(decays)}, planned is {values['weight_decay']:g}"
        for name, wanted in (("betas", tuple(train.betas)), ("eps", train.eps)):
            found = [group[name] for group in (decayed, plain, predictors) if group[name] != wanted]
            if found:
                yield f"config: the optimizer has {name} {found[0]}, the run's configuration {wanted}"

    def _batch(
        self, progress: Progress, step: int, number: int, batch: Batch, planned: NDArray[np.int64], again: int
    ) -> Iterator[str]:
        """The samples are the `planned` ones (B,), the numbers go on, and other samples have another content: `again`
        is the step that read this one, 0 if none did or the data has it twice."""
        if batch.ids_BS.numel() != self.config.train.batch_tokens:
            yield f"batch: {batch.ids_BS.numel()} tokens instead of {self.config.train.batch_tokens}"
        if not np.array_equal(batch.sample_ids_B.numpy(), planned):
            yield f"batch: step {step} read other samples than those planned for batch {number}"
        if again and _distinct(batch):
            yield f"batch: what step {step} read is what step {again} read, though other samples are planned"
        first = progress.batch < 0 or any(step == phase.begin + 1 for phase in self.parts.phases)
        if not first and number <= progress.batch:
            yield f"batch: number {number} comes after {progress.batch}"

    # -- at a look ----------------------------------------------------------------------------------------------------

    def at_look(self, progress: Progress, golden: Batch, asked: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """What only a look can see; `golden` is the batch that is read afresh at each, `asked` are the keys of overlays
        that held since the last one."""
        broken: list[str] = []
        if fingerprint(self.config) != self.begun:
            broken.append("config: the configuration in memory is not the one that the attempt began with")
        broken += self._golden(progress, golden)
        sums, live = self._sums(), self.parts.optimizer.steps_taken
        if wild := [
            name for name, finite in zip(self.tensors, sums.isfinite().all(1).tolist(), strict=True) if not finite
        ]:
            broken.append(f"finite: {_names(wild)} holds what is not finite, whether or not a loss has met it")
        elif progress.sums is not None:
            # In the first step adapters and predictors, of which a factor is zero, have no gradient.
            stepped = live > max(progress.looked, 1) and progress.rates > 0
            broken += self._moves(progress, sums.tolist(), stepped, asked)
        broken += self._replicas(progress)
        progress.sums, progress.looked, progress.rates, progress.travel = sums.flatten().tolist(), live, 0.0, 0.0
        return tuple(broken)

    def _golden(self, progress: Progress, golden: Batch) -> Iterator[str]:
        now = xxh3_64_hexdigest(golden.ids_BS.numpy().tobytes() + golden.targets_BS.numpy().tobytes())
        if progress.golden and progress.golden != now:
            yield "data: the first batch of the run, read again, has other tokens or targets than before"
        progress.golden = progress.golden or now

    def _rests(self, name: str) -> bool | None:
        """Whether a tensor must not move; None if it may or may not."""
        groups = self.parts.optimizer.groups
        if name in groups.predictors:
            mod = self.config.model.mod
            return False if mod and mod.routing == "learned" else None
        if name in groups.clipped:
            # In bf16 a small step of a large weight is rounded away.
            return None if self.config.precision.mode == "bf16_pure" else False
        is_parameter = any(name == known for known, _ in self.parts.model.named_parameters())
        return True if is_parameter else None

    @torch.no_grad()
    def _sums(self) -> Tensor:
        """`[tensors, 2]`, fp64: the sum of each, and that of its squares."""
        sums = torch.stack([_sums_of(local(tensor)) for tensor in self.tensors.values()]).cpu().double()
        shared = torch.tensor([local(tensor) is not tensor for tensor in self.tensors.values()])
        total: Tensor = torch.where(shared.unsqueeze(1), self.parts.world.sum(sums.clone()), sums)
        return total

    def _moves(self, progress: Progress, now: list[list[float]], stepped: bool, asked: frozenset[str]) -> Iterator[str]:
        assert progress.sums is not None
        before = dict(zip(self.tensors, zip(progress.sums[::2], progress.sums[1::2], strict=True), strict=True))
        found = dict(zip(self.tensors, map(tuple, now), strict=True))
        moved = {name for name, sums in found.items() if sums != before[name]}
        frozen = self.parts.optimizer.groups.predictors if "predictor" in asked else {}
        may = [name for name, rests in self.rests.items() if not rests and name not in frozen]
        still = [name for name in may if name not in moved] if stepped else []
        for rule, predicts in (("weights", False), ("predictor", True)):
            if of := [name for name in still if (name in self.parts.optimizer.groups.predictors) == predicts]:
                yield f"{rule}: no step since the last look moved {_names(of)}"
        if wrong := [name for name, rests in self.rests.items() if rests and name in moved]:
            yield f"weights: {_names(wrong)} moved, though frozen"
        for name, tensor in self.tensors.items():
            if not name.endswith("router.bias_E") or asked & {"router.reset", "expert.reseed"}:
                continue
            drift = abs(found[name][0] - before[name][0]) / tensor.numel()
            if not drift <= progress.travel * (1 + ROUNDING) + 1e-6:
                yield f"router bias: the mean of {name} moved by {drift:.2g}, its rate allows {progress.travel:.2g}"

    def _replicas(self, progress: Progress) -> Iterator[str]:
        """What every process holds whole is the same in all."""
        if self.parts.world.size == 1:
            return
        whole = [tensor for tensor in self.tensors.values() if local(tensor) is tensor]
        whole += list(self.parts.optimizer.step_tensors().values())
        data = b"".join(tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in whole)
        mine = xxh3_64_hexdigest(data + f"{progress.step} {progress.content}".encode())
        hashes = self.parts.world.collect(mine)
        if other := [rank for rank, found in enumerate(hashes) if found != hashes[0]]:
            yield f"replicas: processes {', '.join(map(str, other))} hold other values than process 0"


def _sums_of(tensor: Tensor) -> Tensor:
    """`[2]`, fp64 where the device has it: piece by piece, for a wide copy of all weights would need their memory
    twice more."""
    pieces = tensor.reshape(-1).split(PIECE)
    wide = (piece if piece.device.type == "mps" else piece.double() for piece in pieces)
    return torch.stack([torch.stack([piece.sum(), piece.square().sum()]) for piece in wide]).sum(0)


def _earlier(progress: Progress, step: int, seen: str) -> int:
    """The last step before this one that read the same content; 0 if none is known."""
    return step - 1 - progress.contents[::-1].index(seen) if seen in progress.contents else 0


def _distinct(batch: Batch) -> bool:
    """Whether a batch has several sequences, no two alike: text that repeats itself says nothing of the loader."""
    rows = {row.tobytes() for row in batch.ids_BS.numpy()}
    return 1 < len(rows) == len(batch.ids_BS)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _list(values: Any) -> str:
    return ", ".join(f"{value:g}" if math.isfinite(value) else str(value) for value in values)
