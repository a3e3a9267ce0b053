"""How a checkpoint comes to be, in four parts that each leave the disk in a state that can be told from a checkpoint.

    stage    tensors that can be written: in memory that nothing changes meanwhile
    write    the files of this process, in a folder under another name, hashed meanwhile; `flush` sends them to the disk
    seal     COMPLETE, which vouches for all files, and everything flushed
    publish  one rename, and the link `latest`; what it replaces goes once the new one is known to last

Of several processes each stages and writes its own rows; the main one seals and publishes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from lumina.checkpoint import places, tensors
from lumina.checkpoint.host import alike
from lumina.checkpoint.migrations import FORMAT
from lumina.checkpoint.places import COMPLETE, MODEL, OPTIM, STATE, disk
from lumina.checkpoint.tensors import Entry, Shard
from lumina.events import require_plain
from lumina.parallel.sharding import local, own_rows
from lumina.parallel.world import World

Tensors = Mapping[str, Tensor]
Files = dict[str, Entry]  # by their names below the checkpoint's folder


@dataclass(frozen=True)
class Staged:
    """What this process will write for a step; `state` is the main process's."""

    step: int
    shards: Mapping[str, Mapping[str, Shard]]
    state: bytes | None


class Buffers:
    """Memory of the host that tensors are copied into, taken at the first save and used again at every other one."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Tensor]] = {}

    def copy(self, kind: str, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies; from a GPU into page-locked memory, all under way at once."""
        copies = self._held.get(kind, {})
        if _shapes(copies) != _shapes(rows):
            self._held.pop(kind, None)  # before there is another
            copies = self._held[kind] = alike(rows)
        for name, tensor in rows.items():
            copies[name].copy_(tensor, non_blocking=tensor.is_cuda)
        if any(tensor.is_cuda for tensor in rows.values()):
            torch.cuda.synchronize()
        return copies


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def stage(
    step: int, model: Tensors, optim: Tensors, state: dict[str, Any], world: World, buffers: Buffers | None = None
) -> Staged:
    """Makes tensors ready to be written: into `buffers`, or, without, where they are if a file can hold them so.

    Raises `ValueError`, `TypeError` or (two tensors in the same memory) `RuntimeError` for what cannot be saved.
    """
    for kind, named in ((MODEL, model), (OPTIM, optim)):
        if scalars := [name for name, tensor in named.items() if tensor.ndim == 0]:
            raise ValueError(f"{kind} tensors without a dimension belong in the state: {', '.join(scalars)}")
        if unknown := [f"{name} ({t.dtype})" for name, t in named.items() if t.dtype not in tensors.CODES]:
            raise ValueError(f"{kind} tensors of dtypes that cannot be saved: {', '.join(unknown)}")
        _require_apart(named)
    require_plain(state, "checkpoint state")
    shards = {kind: _shards(kind, named, world, buffers) for kind, named in ((MODEL, model), (OPTIM, optim))}
    return Staged(step, shards, json.dumps(state, indent=2).encode() if world.main else None)


def begin(root: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of a step in. Raises `UserError` if the disk refuses."""
    aside = places.temporary(places.folder(root, step))
    with disk(refused(root, step)):
        places.remove(aside)
        aside.mkdir(parents=True)
    return aside


def write(root: Path, aside: Path, staged: Staged, rank: int, stopped: Callable[[], bool] = lambda: False) -> Files:
    """Writes this process's files into `aside`, both kinds of tensors at the same time.

    Raises `UserError` if the disk refuses, `tensors.Abandoned` if told to stop.
    """
    made: Files = {}
    failed = threading.Event()

    def enough() -> bool:
        return failed.is_set() or stopped()

    with disk(refused(root, staged.step)), ThreadPoolExecutor(len(staged.shards)) as pool:
        if staged.state is not None:
            (aside / STATE).write_bytes(staged.state)
            made[STATE] = Entry(len(staged.state), xxh3_128_hexdigest(staged.state))
        under_way = {}
        for kind, shards in staged.shards.items():
            if shards:
                (aside / kind).mkdir(exist_ok=True)
                name = f"{kind}/{tensors.file_name(rank)}"
                under_way[name] = pool.submit(tensors.write, aside / name, shards, enough)
        try:
            return made | {name: writing.result() for name, writing in under_way.items()}
        except BaseException:
            failed.set()  # leaving the block waits for the other file
            raise


def flush(root: Path, aside: Path, step: int, files: Files) -> None:
    """Waits until the disk has these files. Raises `UserError` if it refuses."""
    with disk(refused(root, step)):
        for name in files:
            places.sync(aside / name)


def seal(root: Path, aside: Path, step: int, files: Files) -> str:
    """Writes COMPLETE, which vouches for all `files`, and waits for the disk. Returns its SHA-256.

    Raises `UserError` if the disk refuses.
    """
    entries = {name: files[name]._asdict() for name in sorted(files)}
    content = json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=2).encode()
    with disk(refused(root, step)):
        for kind in sorted({name.split("/")[0] for name in files if "/" in name}):
            places.sync(aside / kind)
        (aside / COMPLETE).write_bytes(content)
        places.sync(aside / COMPLETE)
        places.sync(aside)
    return hashlib.sha256(content).hexdigest()


def publish(root: Path, aside: Path, step: int) -> Path:
    """Renames `aside` to what readers look for and points `latest` at it.

    At every instant the checkpoint that it replaces, or the new one, can be found. The replaced one is kept under
    another name until `places.settle`, or until this one is set aside. Raises `UserError` if the disk
    refuses.
    """
    final = places.folder(root, step)
    old = places.replaced(final)
    with disk(refused(root, step)):
        if os.path.lexists(final):  # a dangling link is in the way, too
            if os.path.lexists(old):  # then what took its place did not last
                places.discard(final)
            else:
                final.rename(old)
        aside.rename(final)
        places.sync(root)
    places.point(root, "latest", step)
    return final


def drop(aside: Path) -> None:
    """Takes away what an unfinished save left, as far as the disk allows."""
    shutil.rmtree(aside, ignore_errors=True)


def refused(root: Path, step: int) -> str:
    """How an error begins that says a save has failed."""
    return f"{places.folder(root, step)}: checkpoint not written"


def _shards(kind: str, named: Tensors, world: World, buffers: Buffers | None) -> dict[str, Shard]:
    """This process's rows. What is not shared out, or has no rows, is the main process's to write."""
    own = {
        name: local(tensor).detach()
        for name, tensor in named.items()
        if world.main or (local(tensor) is not tensor and local(tensor).numel())
    }
    rows = buffers.copy(kind, own) if buffers else {name: part.cpu().contiguous() for name, part in own.items()}
    return {name: Shard(part, (own_rows(named[name]).start, *[0] * (part.ndim - 1))) for name, part in rows.items()}


def _require_apart(named: Tensors) -> None:
    """Tied tensors are given once: loading writes in place, and two would write the same memory."""
    spans = sorted(
        (part.data_ptr(), part.data_ptr() + part.nbytes, name)
        for name, part in ((name, local(tensor)) for name, tensor in named.items())
        if part.numel() and part.is_contiguous()
    )
    for (_, end, name), (begin, _, other) in pairwise(spans):
        if begin < end:
            raise RuntimeError(f"{name} and {other} share memory: give one of them")
