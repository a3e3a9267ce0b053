"""Every kind of damage that a checkpoint is done: a table of what can happen to a file, to a folder, and to several."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumina.checkpoint import store
from lumina.checkpoint.catalogue import RUN
from lumina.checkpoint.readback import fingerprint

SAVED = (6, 4, 2)  # the steps whose checkpoints the run has
Hurt = Callable[[Path, Path], object]  # something of the newest checkpoint, and the same of the one before it

FILES = {
    "weights": "model/*.safetensors",
    "moments": "optim/*.safetensors",
    store.STATE: store.STATE,
    store.COMPLETE: store.COMPLETE,
}


@dataclass(frozen=True)
class Damage:
    """`hurt` gets the newest checkpoint and the one before. `left`: the step found after it; None: none is left."""

    name: str
    hurt: Hurt
    left: int | None = SAVED[1]
    resumed: bool = False  # whether it is tried, too, that the run goes on from there and ends equal


def _resized(change: Callable[[int], int]) -> Hurt:
    return lambda path, _: os.truncate(path, change(path.stat().st_size))


def _flipped(place: Callable[[int], int]) -> Hurt:
    def flip(path: Path, _: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[place(len(raw))] ^= 1
        path.write_bytes(raw)

    return flip


def _instead(make: Callable[[Path, Path], object]) -> Hurt:
    def replace(path: Path, other: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        make(path, other)

    return replace


def _swapped(path: Path, _: Path) -> None:
    a, b = (next(path.glob(FILES[which])) for which in ("weights", "moments"))
    aside = path / "aside"
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def _sealed(change: Callable[[dict[str, Any]], Any]) -> Hurt:
    def write(path: Path, _: Path) -> None:
        seal = path / store.COMPLETE
        seal.write_text(json.dumps(change(json.loads(seal.read_bytes()))))

    return write


def _renamed(path: Path, _: Path) -> None:
    path.rename(store.folder(path.parent, SAVED[0] + 1))


def _of_another_run(path: Path, _: Path) -> None:
    """As if it had been copied from a run of another seed: sound, sealed, and of the same data and model."""
    state = path / store.STATE
    state.write_text(json.dumps(json.loads(state.read_bytes()) | {RUN: "another"}))
    entry = dict(zip(("size", "xxh3_128"), fingerprint(state), strict=True))
    _sealed(lambda seal: seal | {"files": seal["files"] | {store.STATE: entry}})(path, path)


def _both(path: Path, other: Path) -> None:
    for one in (path, other):
        (one / store.COMPLETE).unlink()


def _everyone(what: str) -> Hurt:
    def hurt(path: Path, _: Path) -> None:
        for one in store.checkpoints(path.parent):
            os.truncate(next(one.glob(FILES[what])), 1)

    return hurt


TO_A_FILE: dict[str, Hurt] = {
    "torn in the middle": _resized(lambda size: size // 2),
    "emptied": _resized(lambda _: 0),
    "one byte short": _resized(lambda size: size - 1),
    "one byte long": _resized(lambda size: size + 1),
    "first bit flipped": _flipped(lambda _: 0),
    "bit of the header flipped": _flipped(lambda _: 16),
    "bit in the middle flipped": _flipped(lambda size: size // 2),
    "last bit flipped": _flipped(lambda _: -1),
    "of another checkpoint": lambda path, other: shutil.copy(other, path),
    "missing": lambda path, _: path.unlink(),
    "a folder instead": _instead(lambda path, _: path.mkdir()),
    "a dangling link instead": _instead(lambda path, _: path.symlink_to("nowhere")),
}
TO_A_CHECKPOINT = (
    Damage("two files swapped", _swapped),
    Damage("one file too many", lambda path, _: (path / "model" / "more.safetensors").write_bytes(b"more")),
    Damage("its tensors gone", lambda path, _: shutil.rmtree(path / "model")),
    Damage("COMPLETE is no JSON", lambda path, _: (path / store.COMPLETE).write_text("{")),
    Damage("COMPLETE is a list", _sealed(lambda seal: [seal])),
    Damage("COMPLETE names no files", _sealed(lambda seal: seal | {"files": {}})),
    Damage("COMPLETE of a later format", _sealed(lambda seal: seal | {"format": 10**6})),
    Damage("folder named as another step", _renamed, resumed=True),
    Damage("a checkpoint of another run", _of_another_run, resumed=True),
    Damage("an empty folder instead", _instead(lambda path, _: path.mkdir()), resumed=True),
    Damage("a file instead", _instead(lambda path, _: path.touch()), resumed=True),
    Damage("a dangling link instead", _instead(lambda path, _: path.symlink_to("nowhere")), resumed=True),
    Damage("a link to another instead", _instead(lambda path, other: path.symlink_to(other.name)), resumed=True),
    Damage("COMPLETE missing in the two newest", _both, left=SAVED[2], resumed=True),
    Damage("weights torn in all", _everyone("weights"), left=None),
    Damage("COMPLETE torn in all", _everyone(store.COMPLETE), left=None),
)


def damages() -> list[Damage]:
    """Every kind: what can be done to a file, to each file; then what can be done to checkpoints."""

    def to(pattern: str, hurt: Hurt) -> Hurt:
        return lambda path, other: hurt(next(path.glob(pattern)), next(other.glob(pattern)))

    of_files = [
        Damage(f"{file}: {kind}", to(pattern, hurt), resumed=kind == "torn in the middle")
        for file, pattern in FILES.items()
        for kind, hurt in TO_A_FILE.items()
    ]
    return of_files + list(TO_A_CHECKPOINT)
