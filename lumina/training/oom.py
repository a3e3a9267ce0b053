"""Memory that does not suffice is made to: what failed is done again in smaller pieces, of which the run then keeps the
size.

One process repeats the gradients of a step with half the micro-batch (the batch stays the same), or an evaluation with
half its batch. Of several processes none can do that alone, for the others wait for it in the middle of a step: it
leaves word in `retry.json` and ends, and the next start begins with the smaller size.

What a run goes on with is in its `config.yaml` (`train.micro_batch`) and its state (`Progress.eval_tokens`). A trial
changes neither: it is given up.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lumina.config.resolve import Resolved, settle, write
from lumina.data.loader import Batch
from lumina.data.records import Kind
from lumina.errors import MachineFailed, OutOfMemory, UserError
from lumina.parallel.world import World
from lumina.progress import Tell, whole
from lumina.run import supervised
from lumina.run.exit_codes import MACHINE_FAILED, OUT_OF_MEMORY
from lumina.run.folder import Run, write_json
from lumina.standard import lasting
from lumina.training import machine
from lumina.training.evaluate import Evaluation, evaluate
from lumina.training.setup import Parts
from lumina.training.state import State
from lumina.training.step import Step, Sums, apply, gradients

T = TypeVar("T")
# What allocators say: of CUDA and MPS; of a CPU on Unix, and on Windows; of C++ below them.
PHRASES = ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc")
REHEARSED = 2  # micro-batches: while the second is computed there are gradients, too
SMALLER = ("micro_batch", "eval_tokens")  # what can be made so
KIND = "out of memory"  # of the incident
COMPILING = "compiling for smaller micro-batches"


@dataclass(frozen=True)
class Shortage:
    """There was not enough memory; `said` is what the allocator said."""

    said: str


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)


def attempt(work: Callable[[], T]) -> T | Shortage:
    """What `work` returns, unless memory runs out."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = _said(error)
    # Only here, where the error and the frames of its traceback are gone, are the tensors that they held.
    return Shortage(said)


@contextmanager
def beyond_repair(what: str, fix: str) -> Iterator[None]:
    """Raises `OutOfMemory` where memory runs out in something that cannot be repeated in smaller pieces."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory in {what}: {_said(error)}", fix) from None


@contextmanager
def ending_alone(world: World) -> Iterator[None]:
    """Of several processes, one that raises what it alone has met ends at once: the others wait for it, it for none."""
    try:
        yield
    except (OutOfMemory, MachineFailed) as error:
        if world.size == 1:
            raise
        with lasting(sys.stderr):
            print(f"error: process {world.rank}: {error}", file=sys.stderr, flush=True)
        with lasting(sys.stdout):
            sys.stdout.flush()
        code = OUT_OF_MEMORY if isinstance(error, OutOfMemory) else MACHINE_FAILED
        supervised.tell_exit(code)
        os._exit(code)


class Fitting:
    """Takes the steps and evaluations of a session, in pieces that the memory holds."""

    def __init__(
        self, run: Run, resolved: Resolved, parts: Parts, state: State, told: Tell, emit: Callable[..., Any]
    ) -> None:
        self.run, self.resolved, self.parts, self.state, self.told, self.emit = run, resolved, parts, state, told, emit
        self.trying = False
        self.most: int | None = None  # sequences at once, once the memory did not hold more

    @contextmanager
    def on_trial(self) -> Iterator[None]:
        """Inside the block memory that runs out raises `OutOfMemory`: what a run only tries must not change it."""
        self.trying = True
        try:
            with beyond_repair("an arm", self._again()):
                yield
        finally:
            self.trying = False

    @property
    def micro_batch(self) -> int:
        """Sequences that each process computes at once, as configured."""
        return self.sequences // self.parts.plan.micro_batches

    @property
    def sequences(self) -> int:
        """Sequences of a step that each process computes."""
        train, seq_len = self.parts.config.train, self.parts.config.model.seq_len
        return train.batch_tokens // seq_len // self.parts.world.size

    def tell_retry(self) -> None:
        """Tells what an earlier attempt left word of, and takes it from there."""
        retry = self.parts.world.decide(lambda: read_retry(self.run))
        if retry is None:
            return
        what = next(name for name in SMALLER if name in retry)
        if what == "eval_tokens":
            self.state.progress.eval_tokens = retry[what]
        step = self.state.progress.step  # that of the failure may be later than where this attempt begins
        self.emit("incident", step=step, **incident(what, retry["before"], retry[what], retry["said"]))
        self.parts.world.decide(self.run.retry.unlink)

    def rehearse(self, batch: Batch, step: int, plan: Step) -> None:
        """Computes gradients of `batch` and throws them away: what does not fit is known before anything has happened.

        All micro-batches are of one size, and depth routers take the most of the first that is left.
        """
        compiling = "compiling, and " if self.parts.config.train.compile == "on" else ""
        with whole(f"{compiling}rehearsing the largest batch", self.told):
            self._gradients(batch, step, plan, REHEARSED)
            self.parts.optimizer.zero_grad()

    def loss(self, batch: Batch, step: int, plan: Step) -> Tensor:
        """What `Sums.loss` is for `batch`, of this process; the gradients are thrown away."""
        found = self._gradients(batch, step, plan)
        self.parts.optimizer.zero_grad()
        return found.loss

    def step(self, batch: Batch, lr: float, plan: Step, step: int) -> Tensor:
        """The step of the session's parts by `plan`: the metrics of `step.apply`.

        Raises `OutOfMemory` if one sequence is too much, or where the weights already moved.
        """
        parts = self.parts
        found = self._gradients(batch, step, plan)
        with beyond_repair(f"the optimizer, in step {step}", f"go on from the last checkpoint: {self._again()}"):
            return apply(parts.model, parts.optimizer, batch, lr, plan, found)

    def evaluate(self, kind: Kind, capacity: float | None, most: int | None = None) -> Evaluation:
        """All held-out tokens of a kind, or at `most` about so many; `capacity` is the trained share of a depth router.

        Raises `OutOfMemory` if one sequence is too much.
        """
        parts, progress = self.parts, self.state.progress
        while True:
            batches = parts.heldout(kind, progress.eval_tokens)
            batches = batches if most is None else batches.thinned(most // parts.config.model.seq_len)
            how = batches, batches.text_bytes, parts.precision, capacity, parts.world, self.told
            found = attempt(partial(evaluate, parts.model, *how))
            if isinstance(found, Evaluation):
                return found
            self._give_up_trial(found)
            free()
            if batches.sequences == 1:
                raise OutOfMemory(f"evaluating one sequence at a time: {found.said}", self._advice())
            before, progress.eval_tokens = progress.eval_tokens, progress.eval_tokens // 2
            self._abort_or_tell({"eval_tokens": progress.eval_tokens}, found.said, progress.step, before)

    def _gradients(self, batch: Batch, step: int, plan: Step, at_most: int | None = None) -> Sums:
        parts, compiling = self.parts, False
        while True:
            least = self.sequences // self.most if self.most else 1
            fitting = replace(plan, micro_batches=max(plan.micro_batches, least))
            work = partial(gradients, parts.model, parts.optimizer, batch, fitting, parts.precision, step, at_most)
            with whole(COMPILING, self.told) if compiling else nullcontext():  # which takes longer than a step may
                found = attempt(work)
            if isinstance(found, Sums):
                return found
            parts.optimizer.zero_grad()
            self._give_up_trial(found)
            free()
            self._split(step, found.said, self.sequences // fitting.micro_batches)
            compiling = parts.config.train.compile == "on"

    def _give_up_trial(self, shortage: Shortage) -> None:
        if self.trying:
            raise OutOfMemory(f"out of memory in an arm: {shortage.said}", self._again())

    def _split(self, step: int, said: str, before: int) -> None:
        """Goes on with half the micro-batch, which was `before`, here or in the next start."""
        parts = self.parts
        if before == 1:
            raise OutOfMemory(f"training one sequence at a time, in step {step}: {said}", self._advice())
        half = machine.micro_batch(parts.config, parts.world, before // 2)
        self._abort_or_tell({"micro_batch": half}, said, step, before)
        self.most = half
        if half < self.micro_batch:  # else it was an overlay that asked for more than was planned
            why = f"{KIND} with {before} in step {step}"
            self.resolved = settle(self.resolved, {"train.micro_batch": (half, why)})
            rewrite(self.run, self.resolved)
            parts.plan = replace(parts.plan, micro_batches=self.sequences // half)
        if parts.config.train.compile == "on":
            torch.compiler.reset()  # graphs for the new size alone, as a resumed run will have them

    def _abort_or_tell(self, smaller: dict[str, int], said: str, step: int, before: int) -> None:
        ((what, after),) = smaller.items()
        if self.parts.world.size > 1:
            write_json(self.run.retry, {**smaller, "before": before, "step": step, "said": said})
            raise OutOfMemory(f"step {step}: {said}", f"go on with {what.replace('_', ' ')} {after}: {self._again()}")
        self.emit("incident", step=step, **incident(what, before, after, said))

    def _again(self) -> str:
        return f"lumina resume {self.run.path}"

    def _advice(self) -> str:
        ways = [] if self.parts.config.train.recompute == "full" else [f"{self._again()} train.recompute=full"]
        return "; or ".join([*ways, "share it among more processes", "a smaller model or model.seq_len"])


def read_retry(run: Run) -> dict[str, Any] | None:
    """What a process that ran out of memory left word of, if one did. Raises `UserError` if the file is damaged."""
    if not run.retry.exists():
        return None
    try:
        retry = json.loads(run.retry.read_bytes())
        sizes = [retry[name] for name in SMALLER if name in retry] + [retry["before"], retry["step"]]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{run.retry}: damaged: {error!r}", fix="delete it") from None
    if len(sizes) != 3 or not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(f"{run.retry}: damaged: not what a lack of memory leaves", fix="delete it")
    return dict(retry)


def incident(what: str, before: int, after: int, said: str) -> dict[str, Any]:
    """The fields of the event that tells of a smaller `micro_batch` or `eval_tokens`."""
    return {"kind": KIND, what: [before, after], "said": said}


def rewrite(run: Run, resolved: Resolved) -> None:
    """Makes `resolved` what the run goes on with."""
    try:
        write(resolved, run.config)
    except OSError as error:
        fix = "make the disk writable or free space on it"
        raise UserError(f"{run.config}: not written: {error.strerror}", fix) from error


def _said(error: BaseException) -> str:
    """Its first line; torch's others are advice."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def free() -> None:
    """Gives back what a failed attempt left behind: cycles, and blocks that the allocator keeps."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
