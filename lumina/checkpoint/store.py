"""Checkpoints on disk: published whole or not at all, loaded exactly or not at all.

    <root>/step-000500/model/*.safetensors  optim/*.safetensors  state.json  COMPLETE
    <root>/latest -> step-000500

`COMPLETE` lists every other file with its size and SHA-256. A folder is written under another name, flushed
to the disk and renamed last: a crash at any instant leaves a checkpoint, or a leftover that no reader takes
for one. Tensors go through torch's distributed checkpoint into safetensors; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lumina.checkpoint.migrations import FORMAT, migrate, unreadable
from lumina.checkpoint.places import (
    COMPLETE,
    MODEL,
    OLD,
    OPTIM,
    STATE,
    STEP,
    checkpoints,
    discard,
    folder,
    point,
    remove,
    step_of,
    temporary,
)
from lumina.checkpoint.places import disk as _disk
from lumina.checkpoint.places import sync as _sync
from lumina.errors import UserError
from lumina.events import require_plain
from lumina.parallel.world import ALONE, World
from lumina.progress import Tell, silent, tracked

SHOWN = 10  # differences between a checkpoint and a model that an error lists

__all__ = [
    "COMPLETE", "FORMAT", "MODEL", "OLD", "OPTIM", "STATE", "STEP", "Checkpoint", "Receipt",
    "checkpoints", "discard", "fingerprint", "folder", "load", "newest", "point", "read", "remove", "save", "step_of",
    "temporary", "verify",
]  # fmt: skip

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Receipt:
    """What a save did: where, in how many seconds, how many bytes."""

    path: Path
    step: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose every byte was verified by `newest` or `read`, and its `state.json`."""

    path: Path
    step: int
    state: dict[str, Any]


# -- writing ------------------------------------------------------------------------------------------------


def save(root: Path, step: int, model: Tensors, optim: Tensors, state: dict[str, Any], world: World = ALONE) -> Receipt:
    """Publishes a checkpoint of `step`, replacing one of the same step, and points `latest` at it.

    Tensors may have any device, strides and dtype of safetensors; a tied one is given once. They need a
    dimension: scalars belong in `state`, which holds plain JSON values (NaN and infinities too). Every process of
    `world` calls this and writes its own rows; `state` is the main process's.
    Raises `ValueError`, `TypeError` or (two tensors in the same memory) `RuntimeError` for anything else, and
    `UserError` if the disk refuses; whatever was saved before is untouched then.
    """
    start = time.perf_counter()
    for kind, tensors in ((MODEL, model), (OPTIM, optim)):
        if scalars := [name for name, tensor in tensors.items() if tensor.ndim == 0]:
            raise ValueError(f"{kind} tensors without a dimension belong in the state: {', '.join(scalars)}")
    require_plain(state, "checkpoint state")
    final = folder(root, step)
    refused = f"{final}: checkpoint not written"

    def begin() -> Path:
        aside = temporary(final)
        with _disk(refused):
            remove(aside)
            aside.mkdir(parents=True)
        return aside

    def finish() -> int:
        with _disk(refused):
            (aside / STATE).write_text(json.dumps(state, indent=2))
            size = _seal(aside, step)
            _publish(aside, final)
        point(root, "latest", step)
        return size

    aside = world.decide(begin)
    try:
        with _disk(refused):
            _write_tensors(aside / MODEL, model, world)
            _write_tensors(aside / OPTIM, optim, world)
        size = world.decide(finish)
    finally:
        if world.main:
            shutil.rmtree(aside, ignore_errors=True)
    return Receipt(final, step, time.perf_counter() - start, size)


def _write_tensors(path: Path, tensors: Tensors, world: World) -> None:
    if tensors:
        writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
        packed = {name: tensor.contiguous() for name, tensor in tensors.items()}  # safetensors has no strides
        with _torch_checkpoint():
            state_dict_saver.save(packed, storage_writer=writer, no_dist=world.size == 1)


def _seal(path: Path, step: int) -> int:
    """Flushes every file and folder to the disk, then COMPLETE, which vouches for them. Returns the bytes."""
    files = {name: _fingerprint(path / name) for name in sorted(_files(path))}
    for entry in path.rglob("*"):
        _sync(entry)
    entries = {name: {"size": size, "sha256": sha256} for name, (size, sha256) in files.items()}
    (path / COMPLETE).write_text(json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=2))
    _sync(path / COMPLETE)
    _sync(path)
    return sum(size for size, _ in files.values())


def _publish(aside: Path, final: Path) -> None:
    """Renames `aside` to `final`. At every instant the one it replaces, or the new one, can be found."""
    old = final.with_name(final.name + OLD)
    if final.exists():
        if old.exists():
            discard(old)
        final.rename(old)
    aside.rename(final)
    _sync(final.parent)
    if old.exists():
        discard(old)


# -- finding and verifying ----------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    """Names the content of a complete checkpoint."""
    return hashlib.sha256((path / COMPLETE).read_bytes()).hexdigest()


def verify(path: Path, progress: Tell = silent) -> list[str]:
    """What is wrong with a checkpoint: one sentence for each thing that is not as COMPLETE says."""
    try:
        seal = json.loads((path / COMPLETE).read_bytes())
        version, step = seal["format"], seal["step"]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in seal["files"].items()}
    except FileNotFoundError:
        return [f"no {COMPLETE}: it was never finished"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return [f"{COMPLETE} cannot be read: {error!r}"]
    if problem := unreadable(version):
        return [problem]
    present = _files(path)
    problems = [] if step == step_of(path) else [f"{COMPLETE} belongs to step {step}"]
    problems += [f"{name} is missing" for name in sorted(files.keys() - present)]
    problems += [f"{name} does not belong here" for name in sorted(present - files.keys())]
    names = sorted(present & files.keys())
    what, total = f"verifying {path.name}", sum(files[name][0] for name in names)
    checking = tracked(names, what, total, progress, lambda name: files[name][0])
    problems += [p for name in checking for p in _damage(path, name, *files[name])]
    return problems


def newest(
    root: Path, world: World = ALONE, progress: Tell = silent
) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and the newer ones passed over, each with the reason.

    The main process of `world` reads and decides.
    """
    return world.decide(lambda: _newest(root, progress))


def _newest(root: Path, progress: Tell) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    skipped: list[tuple[Path, str]] = []
    for path in checkpoints(root):
        problems = verify(path, progress)
        if not problems:
            return _open(path), skipped
        skipped.append((path, "; ".join(problems)))
    return None, skipped


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder, or behind a link to one. Raises `UserError` with all that is wrong."""
    path = path.resolve()
    if not STEP.fullmatch(path.name) or not path.is_dir():
        raise UserError(f"{path}: no such checkpoint", fix="name a step-… folder below a run's checkpoints/")
    if problems := verify(path):
        raise UserError.collect(problems, f"{path}: damaged checkpoint", "restore it, or name another one")
    return _open(path)


def _open(path: Path) -> Checkpoint:
    version = json.loads((path / COMPLETE).read_bytes())["format"]
    return Checkpoint(path, step_of(path), migrate(json.loads((path / STATE).read_bytes()), version))


def _damage(path: Path, name: str, size: int, sha256: str) -> Iterator[str]:
    """How a file differs from what was saved: no item, or one."""
    try:
        found, digest = _fingerprint(path / name)
    except OSError as error:
        yield f"{name} cannot be read: {error.strerror}"
        return
    if found != size:
        yield f"{name} has {found} bytes, {size} were saved"
    elif digest != sha256:
        yield f"{name} has other bytes than were saved"


# -- loading ------------------------------------------------------------------------------------------------


def load(checkpoint: Checkpoint, model: Tensors, optim: Tensors | None = None, world: World = ALONE) -> None:
    """Reads every tensor of a checkpoint into the given ones, in place; without `optim`, the model's only.

    Names, shapes and dtypes must be equal: else one `UserError` lists the first differences, and nothing changed.
    """
    wanted = {MODEL: model} if optim is None else {MODEL: model, OPTIM: optim}
    problems = [p for kind, targets in wanted.items() for p in _differences(checkpoint.path, kind, targets)]
    if problems:
        more = len(problems) - SHOWN
        shown = [*problems[:SHOWN], f"and {more} more"] if more > 0 else problems
        title = f"{checkpoint.path}: saved from another model or optimizer"
        raise UserError.collect(shown, title, "leave out the keys that change the model, or begin another run")
    for kind, targets in wanted.items():
        if targets:
            reader = HuggingFaceStorageReader(str(checkpoint.path / kind))
            with _torch_checkpoint():
                state_dict_loader.load(dict(targets), storage_reader=reader, no_dist=world.size == 1)


def _differences(path: Path, kind: str, targets: Tensors) -> Iterator[str]:
    """How the tensors of one kind saved in `path` differ from `targets`, by the headers of the files alone.

    Torch would not say: it ignores what nobody asked for, and copies into another dtype.
    """
    saved = _headers(path / kind)
    for name in sorted(targets.keys() - saved.keys()):
        yield f"{kind} tensor {name} is not in the checkpoint"
    for name in sorted(saved.keys() - targets.keys()):
        yield f"{kind} tensor {name} is in the checkpoint only"
    for name in sorted(saved.keys() & targets.keys()):
        have, want = saved[name], targets[name]
        if have.size != want.shape:
            yield f"{kind} tensor {name} was saved with shape {[*have.size]}, wanted is {[*want.shape]}"
        if have.properties.dtype != want.dtype:
            yield f"{kind} tensor {name} was saved as {have.properties.dtype}, wanted is {want.dtype}"


def _headers(path: Path) -> dict[str, TensorStorageMetadata]:
    if not path.is_dir():  # no tensors of this kind were saved
        return {}
    metadata = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return cast("dict[str, TensorStorageMetadata]", metadata)


# -- files --------------------------------------------------------------------------------------------------


@contextmanager
def _torch_checkpoint() -> Iterator[None]:
    """Keeps torch from warning that there is one process, and raises the error inside the one it raises."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as wrapper:
        error, _ = next(iter(wrapper.failures.values()))
        raise error from None


def _files(path: Path) -> set[str]:
    """The files below `path`, as COMPLETE names them: not itself, nor what a file browser leaves."""
    files = [entry for entry in path.rglob("*") if not entry.is_dir() and entry.name != ".DS_Store"]
    return {file.relative_to(path).as_posix() for file in files} - {COMPLETE}


def _fingerprint(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
