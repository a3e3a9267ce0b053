"""The processes of a run: who they are, and how they agree. One process is a world of its own and never waits.

`torchrun --nproc-per-node 2 -m lumina train …` starts them and tells each its rank in the environment. The main
process (rank 0) decides whatever could differ: what is on the disk, what the clock says, what a signal asks.
"""

from __future__ import annotations

import atexit
import functools
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from lumina.errors import UserError
from lumina.progress import Tell, silent

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # while the main process prepares data, the others wait; if it dies, they hear at once


@dataclass(frozen=True)
class _Answer:
    """What ends what the main process has to say."""

    value: Any


@dataclass(frozen=True)
class World:
    """This process among `size`; `local_*` counts those of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    deciding: Any = None  # the group of processes that `decide` and `each` speak in

    @property
    def main(self) -> bool:
        return self.rank == 0

    def decide(self, work: Callable[[], T]) -> T:
        """What `work` returns in the main process, in all of them; so is its `UserError`. Others do not run it."""
        return self.follow(lambda tell: work(), silent)

    def follow(self, work: Callable[[Tell], T], progress: Tell) -> T:
        """The same for what takes long: each word of `work` comes to the `progress` of every process, as it is said.

        Whoever waits knows by that that the main process is alive.
        """
        if self.size == 1:
            return work(progress)
        if self.main:
            answer = self._tell_all(work, progress)
        else:
            while not isinstance(answer := self._broadcast(None), _Answer):
                progress(*answer)
        if isinstance(answer.value, UserError):
            answer.value.told = not self.main
            raise answer.value
        return cast("T", answer.value)

    def _tell_all(self, work: Callable[[Tell], Any], progress: Tell) -> _Answer:
        def tell(*word: Any) -> None:
            progress(*word)
            self._broadcast(word)

        try:
            answer = _Answer(work(tell))
        except UserError as error:
            answer = _Answer(error)
        self._broadcast(answer)
        return answer

    def _broadcast(self, said: Any) -> Any:
        """What the main process says, in all of them."""
        heard = [said]
        torch.distributed.broadcast_object_list(heard, src=0, group=self.deciding, device=torch.device("cpu"))
        return heard[0]

    def each(self, work: Callable[[], T]) -> T:
        """What `work`, done in every process, returns in this one; a `UserError` of any is raised in all."""
        if self.size == 1:
            return work()
        answer: list[T] = []
        errors: list[Any] = [None] * self.size
        own: UserError | None = None
        try:
            answer.append(work())
        except UserError as error:
            own = error
        torch.distributed.all_gather_object(errors, own, group=self.deciding)
        for rank, failed in enumerate(errors):
            if failed is not None:
                failed.told = rank != self.rank
                raise failed
        return answer[0]

    def collect(self, value: T) -> list[T]:
        """Every process's `value`, by rank, in all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.deciding)
        return values

    @contextmanager
    def holding(self, resource: AbstractContextManager[object]) -> Iterator[None]:
        """Inside the block the main process holds `resource`; if it cannot, all raise its `UserError`."""

        def enter() -> None:
            resource.__enter__()

        self.decide(enter)
        try:
            yield
        finally:
            if self.main:
                resource.__exit__(None, None, None)

    def max(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return number
        largest = torch.tensor([number])
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest.item())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, equal in all to the bit."""
        if self.size > 1:
            tensor = tensor.contiguous()
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """`[size, *shape]`: the tensors of all processes, which have one shape."""
        gathered = tensor.new_empty(self.size * tensor.numel())
        all_gather(gathered, tensor.contiguous().flatten())
        return gathered.view(self.size, *tensor.shape)


ALONE = World()
# Renamed in torch 2.13.
all_gather = getattr(torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor)


@functools.cache
def join() -> World:
    """The world that torchrun started this process in, joined once; without torchrun, this process alone.

    Raises `UserError` if the environment is only half of what torchrun sets.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE={size} asks for several processes, but {', '.join(missing)} is not set",
            fix="start them with: torchrun --nproc-per-node 2 -m lumina train …, or unset WORLD_SIZE",
        )
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    atexit.register(_leave)
    rank, local_rank, local_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    deciding = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return World(rank, size, local_rank, local_size, deciding)


def _leave() -> None:
    gc.collect()  # cycles of sharded models hold the groups' threads; left to the interpreter's end, they abort it
    torch.distributed.destroy_process_group()
