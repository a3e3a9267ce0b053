"""Checkpoints on disk: published whole or not at all, loaded exactly or not at all.

    <root>/step-000500/model/*.safetensors  optim/*.safetensors  state.json  COMPLETE
    <root>/latest -> step-000500

`COMPLETE` lists every other file with its size and hash (XXH3, 128 bits). A folder is written under another name,
flushed to the disk and renamed last: a crash at any instant leaves a checkpoint, or a leftover that no reader takes
for one. Tensors are safetensors files, which torch's distributed checkpoint reads for any number of processes;
nothing is ever unpickled. A folder may come from anybody: whoever wrote it can also have written its COMPLETE, so
every name, header and value is checked before a tensor is copied.
"""

from __future__ import annotations

import stat
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from lumina.checkpoint import phases, places, tensors
from lumina.checkpoint.catalogue import RUN, read_json
from lumina.checkpoint.migrations import migrate, unreadable
from lumina.checkpoint.phases import Tensors
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
from lumina.checkpoint.readback import damage
from lumina.errors import UserError
from lumina.parallel.sharding import local
from lumina.parallel.world import ALONE, World
from lumina.progress import Tell, silent, tracked

__all__ = [
    "COMPLETE", "MODEL", "OLD", "OPTIM", "STATE", "STEP", "Checkpoint", "Receipt", "Unsound", "checkpoints", "discard",
    "folder", "load", "newest", "point", "read", "remove", "save", "step_of", "temporary", "verify",
]  # fmt: skip

SHOWN = 10  # differences between a checkpoint and a model that an error lists


@dataclass(frozen=True)
class Receipt:
    """What a save did: where, and what it cost in seconds. `stall` is what the steps waited, `waited` of it for the
    save before; `seconds` is until it was published and the disk had it."""

    path: Path
    step: int
    seconds: float
    bytes: int
    stall: float
    waited: float = 0.0
    way: str = "inline"
    verified: bool = False  # whether the disk gave back what was written
    damaged: bool = False  # whether it gave back something else; it is set aside then, unless that was `refused`
    problems: tuple[str, ...] = ()  # what was wrong with it, or with reading it back
    refused: UserError | None = None  # what the disk did not do once that was known

    @property
    def bandwidth(self) -> float:
        """Bytes a second, until the disk had them."""
        return self.bytes / self.seconds


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose every byte was verified by `newest` or `read`, and its `state.json`."""

    path: Path
    step: int
    state: dict[str, Any]


class Unsound(UserError):  # noqa: N818 - it is an error by its base
    """A checkpoint that is what was saved, but that nobody can go on from."""


# -- writing ------------------------------------------------------------------------------------------------


def save(root: Path, step: int, model: Tensors, optim: Tensors, state: dict[str, Any], world: World = ALONE) -> Receipt:
    """Publishes a checkpoint of `step`, replacing one of the same step, and points `latest` at it.

    Tensors may have any device, strides and dtype of safetensors; a tied one is given once. They need a
    dimension: scalars belong in `state`, which holds plain JSON values (NaN and infinities too). Every process of
    `world` calls this and writes its own rows; `state` is the main process's.
    Raises `ValueError`, `TypeError` or (two tensors in the same memory) `RuntimeError` for anything else, and
    `UserError` if the disk refuses; whatever was saved before is untouched then. `writer.Writer` does the same in
    parts, and reads back what it wrote.
    """
    start = time.perf_counter()
    staged = phases.stage(step, model, optim, state, world)
    aside = world.decide(lambda: phases.begin(root, step))

    def write() -> phases.Files:
        files = phases.write(root, aside, staged, world.rank)
        phases.flush(root, aside, step, files)
        return files

    def publish() -> Path:
        phases.seal(root, aside, step, files)
        path = phases.publish(root, aside, step)
        places.settle(path)
        return path

    try:
        files = {name: entry for own in world.collect(world.each(write)) for name, entry in own.items()}
        path = world.decide(publish)
    finally:
        if world.main:
            phases.drop(aside)
    seconds = time.perf_counter() - start
    return Receipt(path, step, seconds, sum(entry.size for entry in files.values()), seconds)


# -- finding and verifying ----------------------------------------------------------------------------------


def verify(path: Path, progress: Tell = silent, own: str = "") -> list[str]:
    """What is wrong with a checkpoint: one sentence for each thing that is not as COMPLETE says, or cannot be.

    `own`: the id of the run that it should be of.
    """
    try:
        content = read_json(path / COMPLETE)
        version, step = content["format"], content["step"]
        hash = "sha256" if version == 1 else "xxh3_128"
        files = {name: (entry["size"], entry[hash]) for name, entry in content["files"].items()}
        if wrong := [
            name for name, (size, digest) in files.items() if type(size) is not int or type(digest) is not str
        ]:
            raise TypeError(f"{wrong[0]} without a size and a hash")
    except FileNotFoundError:
        return [f"no {COMPLETE}: it was never finished"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return [f"{COMPLETE} cannot be read: {error!r:.200}"]
    if problem := unreadable(version):
        return [problem]
    present, problems = _files(path)
    if step != step_of(path):
        problems.append(f"{COMPLETE} belongs to step {step!r:.20}")
    problems += [f"{COMPLETE} lists {name!r:.100}, which no checkpoint has" for name in files if not _is_ours(name)]
    problems += [f"{name} is missing" for name in sorted(filter(_is_ours, files.keys() - present))]
    problems += [f"{name} does not belong here" for name in sorted(present - files.keys())]
    if problems:  # before any file is opened
        return problems
    what, total = f"verifying {path.name}", sum(files[name][0] for name in files)
    checking = tracked(sorted(files), what, total, progress, lambda name: files[name][0])
    problems = [p for name in checking for p in damage(path / name, name, *files[name], hash)]
    return problems or _lies(path, version, own)


def _is_ours(name: str) -> bool:
    """Whether a checkpoint has a file of this name: the state, or a file of tensors; nothing is sought elsewhere."""
    kind, _, file = name.partition("/")
    return name == STATE or (
        kind in (MODEL, OPTIM) and PurePosixPath(file).name == file and file.endswith(".safetensors")
    )


def _lies(path: Path, version: int, own: str) -> list[str]:
    """What cannot be, in a checkpoint whose every byte is as COMPLETE says."""
    problems = []
    for kind in (MODEL, OPTIM):
        try:
            tensors.saved_in(path / kind)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    try:
        run = _state(path, version).get(RUN)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        return [*problems, f"{STATE} cannot be read: {error!r:.200}"]
    return problems + [f"it is of another run, {run!r:.50}"] * bool(own and run and run != own)


def _state(path: Path, version: int) -> dict[str, Any]:
    """The plain values, brought up to date. Raises whatever reading what somebody else wrote can raise."""
    state = read_json(path / STATE)
    if not isinstance(state, dict):
        raise TypeError("not a mapping")
    return migrate(state, version)


def newest(
    root: Path, world: World = ALONE, progress: Tell = silent, without: Collection[Path] = (), own: str = ""
) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and the newer ones passed over, each with the reason.

    The main process of `world` reads, telling all of them how far it is, and decides; it does not look at those in
    `without`. With `own`, the id of a run, those of another are passed over.
    """
    return world.follow(lambda tell: _newest(root, tell, without, own), progress)


def _newest(
    root: Path, progress: Tell, without: Collection[Path], own: str
) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    skipped: list[tuple[Path, str]] = []
    for path in (path for path in checkpoints(root) if path not in without):
        problems = verify(path, progress, own)
        if not problems:
            return _open(path), skipped
        skipped.append((path, "; ".join(problems)))
    return None, skipped


def read(path: Path, progress: Tell = silent, own: str = "") -> Checkpoint:
    """The checkpoint in a folder, or behind a link to one. Raises `UserError` with all that is wrong.

    `own`: as in `verify`.
    """
    path = path.resolve()
    if not STEP.fullmatch(path.name) or not path.is_dir():
        raise UserError(f"{path}: no such checkpoint", fix="name a step-… folder below a run's checkpoints/")
    if problems := verify(path, progress, own):
        raise UserError.collect(problems, f"{path}: damaged checkpoint", "restore it, or name another one")
    return _open(path)


def _open(path: Path) -> Checkpoint:
    version = read_json(path / COMPLETE)["format"]
    return Checkpoint(path, step_of(path), _state(path, version))


# -- loading ------------------------------------------------------------------------------------------------


def load(
    checkpoint: Checkpoint, model: Tensors, optim: Tensors | None = None, world: World = ALONE, *, cast: bool = False
) -> None:
    """Reads every tensor of a checkpoint into the given ones, in place; without `optim`, the model's only.

    Names, shapes and dtypes must be equal: else one `UserError` lists the first differences, and nothing changed.
    Raises `Unsound` if a number is not finite; the tensors hold it then. With `cast`, floating-point tensors are
    converted to the given dtypes.
    """
    wanted = {MODEL: model} if optim is None else {MODEL: model, OPTIM: optim}
    problems = [p for kind, targets in wanted.items() for p in _differences(checkpoint.path, kind, targets, cast)]
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
    world.each(lambda: _require_finite(checkpoint.path, wanted))


def _require_finite(path: Path, loaded: Mapping[str, Tensors]) -> None:
    """A step that would have made a weight non-finite is never taken: who finds one did not get it from training."""
    named = {f"{kind} tensor {name}": local(tensor) for kind, of in loaded.items() for name, tensor in of.items()}
    wrong = [name for name, part in named.items() if part.is_floating_point() and not part.isfinite().all()]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Unsound(f"{path}: {wrong[0]}{more}: not all numbers are finite", fix="use an earlier checkpoint")


def _differences(path: Path, kind: str, targets: Tensors, cast: bool) -> Iterator[str]:
    """How the tensors of one kind saved in `path` differ from `targets`, by the headers of the files alone.

    Torch would not say: it ignores what nobody asked for, and copies into another dtype.
    """
    saved = tensors.saved_in(path / kind)
    for name in sorted(targets.keys() - saved.keys()):
        yield f"{kind} tensor {name} is not in the checkpoint"
    for name in sorted(saved.keys() - targets.keys()):
        yield f"{kind} tensor {name} is in the checkpoint only"
    for name in sorted(saved.keys() & targets.keys()):
        have, want = saved[name], targets[name]
        if have.shape != tuple(want.shape):
            yield f"{kind} tensor {name} was saved with shape {[*have.shape]}, wanted is {[*want.shape]}"
        floats = have.dtype.is_floating_point and want.dtype.is_floating_point
        if have.dtype != want.dtype and not (cast and floats):
            yield f"{kind} tensor {name} was saved as {have.dtype}, wanted is {want.dtype}"


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


def _files(path: Path) -> tuple[set[str], list[str]]:
    """The files below `path`, as COMPLETE names them, and what is neither a file nor a folder.

    Not COMPLETE itself, nor what a file browser leaves.
    """
    files, problems = set(), []
    for entry in sorted(path.rglob("*")):
        name, mode = entry.relative_to(path).as_posix(), entry.lstat().st_mode
        if stat.S_ISREG(mode):
            files |= {name} if entry.name != ".DS_Store" else set()
        elif not stat.S_ISDIR(mode):
            problems.append(f"{name} is {'a link' if stat.S_ISLNK(mode) else 'not a plain file'}")
    return files - {COMPLETE}, problems
