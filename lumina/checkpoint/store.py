"""Checkpoints on disk: published whole, or not at all; loaded exactly, or not at all.

    <root>/step-000500/model/*.safetensors  optim/*.safetensors  state.json  COMPLETE
    <root>/latest -> step-000500

`COMPLETE` lists every other file with its size and SHA-256. A folder is written under another name, flushed to the
disk and renamed last, so that a crash at any instant leaves either a checkpoint or a leftover that no reader takes
for one. Tensors go through torch's distributed checkpoint into safetensors; nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lumina.errors import UserError
from lumina.events import require_plain

FORMAT = 1
COMPLETE = "COMPLETE"
STATE = "state.json"
MODEL, OPTIM = "model", "optim"
# `.old` is a checkpoint too: the one that a save of the same step was about to replace when it was killed.
STEP = re.compile(r"step-(\d{6,})(\.old)?")


@dataclass(frozen=True)
class Receipt:
    """What a save did: where, in how many seconds, how many bytes."""

    path: Path
    step: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose every file was verified when it was opened, and its `state.json`."""

    path: Path
    step: int
    state: dict[str, Any]


def folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return root / f"step-{step:06d}"


# -- writing ----------------------------------------------------------------------------------------------------------


def save(
    root: Path, step: int, model: Mapping[str, Tensor], optim: Mapping[str, Tensor], state: dict[str, Any]
) -> Receipt:
    """Publishes a checkpoint of `step` and points `latest` at it. One of the same step is replaced.

    Tensors may lie anywhere and in any layout, but need a dimension (scalars belong in `state`) and must be given
    once if tied; `state` must be plain JSON, in which NaN and infinities are allowed. Raises `ValueError` or
    `TypeError` for others, and `UserError` if the disk refuses. A save that fails leaves everything as it was.
    """
    start = time.perf_counter()
    for kind, tensors in ((MODEL, model), (OPTIM, optim)):
        if scalars := [name for name, tensor in tensors.items() if tensor.ndim == 0]:
            raise ValueError(
                f"{kind} tensors without a dimension: {', '.join(scalars)}; scalars belong in state"
            )
    require_plain(state, "checkpoint state")
    aside = temporary(folder(root, step))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write_tensors(aside / MODEL, model)
        _write_tensors(aside / OPTIM, optim)
        (aside / STATE).write_text(json.dumps(state, indent=2))
        files = _seal(aside, step)
        _publish(aside, folder(root, step))
        point(root, "latest", step)
    except OSError as error:
        raise UserError(
            f"{root}: checkpoint of step {step} not written: {error.strerror}",
            fix="free or remount the disk; the checkpoints saved before are untouched",
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    written = sum(entry["size"] for entry in files.values())
    return Receipt(folder(root, step), step, time.perf_counter() - start, written)


def point(root: Path, name: str, step: int) -> None:
    """Makes `<root>/<name>` a link to the checkpoint of `step`, replacing the link as a whole."""
    aside = temporary(root / name)
    aside.unlink(missing_ok=True)
    aside.symlink_to(folder(root, step).name)
    aside.replace(root / name)
    _sync(root)


def temporary(path: Path) -> Path:
    """The name under which this process writes, or takes away, what is not to be found at `path`."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def discard(path: Path) -> None:
    """Deletes a checkpoint. It stops being one at once, however long its files take."""
    aside = temporary(path)
    path.rename(aside)
    shutil.rmtree(aside)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.mkdir()
    if tensors:
        with _torch_checkpoint():
            writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
            dcp.save(dict(tensors), storage_writer=writer, no_dist=True)


def _seal(path: Path, step: int) -> dict[str, dict[str, Any]]:
    """Flushes every file and folder to the disk, then the COMPLETE that vouches for them. Returns its entries."""
    files = {name: _fingerprint(path / name) for name in _files(path)}
    for entry in (*path.rglob("*"), path):
        _sync(entry)
    with (path / COMPLETE).open("w") as file:
        json.dump({"format": FORMAT, "step": step, "files": files}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync(path)
    return files


def _publish(aside: Path, final: Path) -> None:
    """Renames `aside` to `final`. At every instant the old or the new one can be found."""
    old = final.with_name(f"{final.name}.old")
    if final.exists():
        if old.exists():
            discard(old)
        final.rename(old)
    aside.rename(final)
    _sync(final.parent)
    if old.exists():
        discard(old)


# -- finding and verifying --------------------------------------------------------------------------------------------


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint: nothing, or one sentence for each file that is not as COMPLETE says."""
    match = STEP.fullmatch(path.name)
    if match is None:
        return [f"{path.name}: not a checkpoint's name"]
    try:
        seal = json.loads((path / COMPLETE).read_bytes())
        version, step, files = seal["format"], seal["step"], dict(seal["files"])
    except FileNotFoundError:
        return [f"no {COMPLETE}: it was never finished"]
    except (ValueError, LookupError, TypeError) as error:
        return [f"{COMPLETE} cannot be read ({error})"]
    if version != FORMAT:
        return [f"format {version}; this version of lumina reads format {FORMAT}"]
    if step != int(match[1]):
        return [f"{COMPLETE} belongs to step {step}"]
    present = _files(path)
    problems = [f"{name} is missing" for name in sorted(files.keys() - present)]
    problems += [f"{name} does not belong here" for name in sorted(present - files.keys())]
    for name in sorted(present & files.keys()):
        found, listed = _fingerprint(path / name), files[name]
        if found["size"] != listed["size"]:
            problems.append(f"{name} has {found['size']} bytes instead of {listed['size']}")
        elif found["sha256"] != listed["sha256"]:
            problems.append(f"{name} has another content than was saved")
    return problems


def newest(root: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and the newer ones passed over, each with the reason."""
    skipped = []
    for path in checkpoints(root):
        problems = verify(path)
        if not problems:
            return _open(path), skipped
        skipped.append((path, "; ".join(problems)))
    return None, skipped


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder, or behind a link to it. Raises `UserError` with everything that is wrong."""
    path = path.resolve()
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint")
    if problems := verify(path):
        raise UserError.collect(problems, f"{path}: damaged checkpoint")
    return _open(path)


def checkpoints(root: Path) -> list[Path]:
    """Every published checkpoint folder, newest first, unverified."""
    found = [
        (int(match[1]), not match[2], path) for path in _entries(root) if (match := STEP.fullmatch(path.name))
    ]
    return [path for _, _, path in sorted(found, reverse=True)]


def step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other name."""
    match = STEP.fullmatch(path.name)
    return None if match is None else int(match[1])


# -- loading ----------------------------------------------------------------------------------------------------------


def load(
    checkpoint: Checkpoint, model: Mapping[str, Tensor], optim: Mapping[str, Tensor] | None = None
) -> None:
    """Reads every tensor of a checkpoint into the given ones, in place; `optim=None` leaves the optimizer out.

    Names, shapes and dtypes must be equal: otherwise one `UserError` lists every difference and no target has
    changed.
    """
    wanted = {MODEL: model} | ({} if optim is None else {OPTIM: optim})
    problems = [
        p for kind, targets in wanted.items() for p in _differences(checkpoint.path / kind, kind, targets)
    ]
    if problems:
        raise UserError.collect(problems, f"{checkpoint.path}: does not fit this model")
    for kind, targets in wanted.items():
        if targets:
            with _torch_checkpoint():
                reader = dcp.HuggingFaceStorageReader(str(checkpoint.path / kind))
                dcp.load(dict(targets), storage_reader=reader, no_dist=True)


def _differences(path: Path, kind: str, targets: Mapping[str, Tensor]) -> Iterator[str]:
    """How the tensors saved below `path` differ from `targets`, from the files' headers alone."""
    saved = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    for name in sorted(targets.keys() - saved.keys()):
        yield f"{kind} tensor {name} is not in the checkpoint"
    for name in sorted(saved.keys() - targets.keys()):
        yield f"{kind} tensor {name} is only in the checkpoint"
    for name in sorted(saved.keys() & targets.keys()):
        have, want = saved[name], targets[name]
        if have.size != want.shape:
            yield f"{kind} tensor {name} has shape {[*have.size]}, not {[*want.shape]}"
        if have.properties.dtype != want.dtype:
            yield f"{kind} tensor {name} is {have.properties.dtype}, not {want.dtype}"


# -- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def _torch_checkpoint() -> Iterator[None]:
    """Keeps torch from warning that there is one process, and gives an error back as the error that it was."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as wrapper:
        error, _ = next(iter(wrapper.failures.values()))
        raise error from None


def _entries(root: Path) -> list[Path]:
    return list(root.iterdir()) if root.is_dir() else []


def _files(path: Path) -> set[str]:
    """The files below `path`, as COMPLETE names them."""
    files = {entry.relative_to(path).as_posix() for entry in path.rglob("*") if not entry.is_dir()}
    return files - {COMPLETE}


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def _sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
