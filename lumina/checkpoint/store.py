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
import os
import re
import shutil
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lumina.errors import UserError
from lumina.events import require_plain
from lumina.parallel.world import ALONE, World
from lumina.progress import Tell, silent, tracked

FORMAT = 1
COMPLETE = "COMPLETE"
STATE = "state.json"
MODEL, OPTIM = "model", "optim"
SHOWN = 10  # differences between a checkpoint and a model that an error lists
OLD = ".old"  # a checkpoint too: the one that a save of the same step was replacing when it was killed
STEP = re.compile(r"step-\d{6,}(\.old)?")

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


# -- names --------------------------------------------------------------------------------------------------


def folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return root / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint folder, by its name."""
    return int(path.name.removeprefix("step-").removesuffix(OLD))


def checkpoints(root: Path) -> list[Path]:
    """Every published checkpoint folder, newest first, unverified."""
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: a file where the folder of checkpoints belongs", fix="move it away")
    found = [path for path in root.iterdir() if STEP.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=lambda path: (step_of(path), path.suffix != OLD), reverse=True)


def temporary(path: Path) -> Path:
    """The name under which this process writes, or deletes, what nobody may find at `path`."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


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


def point(root: Path, name: str, step: int) -> None:
    """Makes `<root>/<name>` a link to the checkpoint of `step`, replacing an older link as a whole.

    Raises `UserError` if the disk refuses.
    """
    aside = temporary(root / name)
    with _disk(f"{root / name}: link not written"):
        remove(aside)
        aside.symlink_to(folder(root, step).name)
        aside.replace(root / name)
        _sync(root)


def discard(path: Path) -> None:
    """Deletes a checkpoint. It stops being one at once, however long its files take.

    Raises `UserError` if the disk refuses.
    """
    aside = temporary(path)
    with _disk(f"{path}: not deleted"):
        remove(aside)
        path.rename(aside)
        remove(aside)


def remove(path: Path) -> None:
    """Deletes a link, a file, or a folder with all that is in it, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


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
    if version != FORMAT:
        return [f"written in format {version}; this version of lumina reads format {FORMAT}"]
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
    root: Path, world: World = ALONE, progress: Tell = silent, without: Collection[Path] = ()
) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and the newer ones passed over, each with the reason.

    The main process of `world` reads and decides; it does not look at those in `without`.
    """
    return world.decide(lambda: _newest(root, progress, without))


def _newest(root: Path, progress: Tell, without: Collection[Path]) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    skipped: list[tuple[Path, str]] = []
    for path in (path for path in checkpoints(root) if path not in without):
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
    return Checkpoint(path, step_of(path), json.loads((path / STATE).read_bytes()))


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
def _disk(failed: str) -> Iterator[None]:
    """Turns what the disk refuses into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{failed}: {error.strerror or error}",
            fix="make the disk writable or free space on it; what was saved before is untouched",
        ) from error


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


def _sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
