"""What differs between two checkpoints, tensor by tensor: never more than one tensor of each in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lumina.checkpoint.store import MODEL, OPTIM, Checkpoint
from lumina.checkpoint.tensors import OFFSETS, SHARDING


def difference(before: Checkpoint, after: Checkpoint) -> dict[str, Any]:
    """`tensors` that changed, the largest relative change first; those in `only_before` and `only_after`; `unlike` in
    shape or dtype; how many are `equal`; and plain `values` as [before, after].

    A change is `relative` (L2 norm of the change / of what was) and `largest` (of one number), both computed in fp64.
    """
    old, new = (
        {f"{kind}/{name}": places for kind in (MODEL, OPTIM) for name, places in _tensors(point.path / kind).items()}
        for point in (before, after)
    )
    changed: list[dict[str, Any]] = []
    unlike: list[dict[str, str]] = []
    equal = 0
    for name in sorted(old.keys() & new.keys()):
        a, b = _read(name, old[name]), _read(name, new[name])
        if a.shape != b.shape or a.dtype != b.dtype:
            unlike.append({"name": name, "before": _kind(a), "after": _kind(b)})
        elif torch.equal(a, b):
            equal += 1
        else:
            changed.append({"name": name, "shape": [*a.shape], **_change(a.double(), b.double())})
    changed.sort(key=lambda change: -change["relative"])
    return {
        "tensors": changed,
        "equal": equal,
        "unlike": unlike,
        "only_before": sorted(old.keys() - new.keys()),
        "only_after": sorted(new.keys() - old.keys()),
        "values": {key: list(pair) for key, pair in _values(before.state, after.state)},
    }


def _change(a: Tensor, b: Tensor) -> dict[str, float]:
    moved, was = (b - a).norm().item(), a.norm().item()
    return {"relative": moved / was if was else float("inf"), "largest": (b - a).abs().max().item()}


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {[*tensor.shape]}"


def _tensors(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """Of each tensor the first row of every piece, and the file that has it."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            placed = json.loads((file.metadata() or {}).get(SHARDING, "{}"))
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                first = placed[name][OFFSETS][0] if name in placed else 0
                found.setdefault(name, []).append((first, path))
    return found


def _read(name: str, pieces: list[tuple[int, Path]]) -> Tensor:
    parts = []
    for _, path in sorted(pieces):
        with safe_open(path, framework="pt") as file:
            parts.append(file.get_tensor(name.partition("/")[2]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _values(before: Any, after: Any, key: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The plain values that differ, by dotted key; None where there is none."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            yield from _values(before.get(name), after.get(name), f"{key}.{name}" if key else name)
    elif json.dumps(before) != json.dumps(after):  # in which nan is nan
        yield key, (before, after)
