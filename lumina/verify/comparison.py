"""Two runs of one request compared at zero tolerance: all tensors, plain values, events that training determines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lumina.checkpoint import store
from lumina.events import Event, as_line
from lumina.run.folder import Run

# What the clock or the history of attempts determines, not training.
NOT_TRAINED_STATE = frozenset({"run", "attempt", "wall", "step_seconds"})
NOT_TRAINED = frozenset({"attempt", "wall", "tok_s", "mfu", "mem", "seconds"})  # fields of events
TOLD = ("step", "eval", "moe", "mod", "probe", "phase", "decision")  # types of events


def differences(expected: Run, got: Run) -> list[str]:
    """How the run `got` differs from `expected`: the first difference of each sort; none if they are equal."""
    sorts = (_tensors, _state, _events)
    return [first for sort in sorts if (first := next(sort(expected, got), None)) is not None]


def _tensors(expected: Run, got: Run) -> Iterator[str]:
    """Bits, not values: a NaN equals itself, and 0 is not -0."""
    wanted, found = _final(expected), _final(got)
    if wanted.path.name != found.path.name:
        yield f"the final checkpoint is {found.path.name}, {wanted.path.name} is expected"
        return
    mine, theirs = _load(found.path), _load(wanted.path)
    for name in sorted(mine.keys() ^ theirs.keys()):
        yield f"tensor {name}: {'not expected' if name in mine else 'missing'}"
    for name in sorted(mine.keys() & theirs.keys()):
        a, b = mine[name], theirs[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            yield f"tensor {name}: {a.dtype} {tuple(a.shape)}, {b.dtype} {tuple(b.shape)} is expected"
        elif not torch.equal(_bytes(a), _bytes(b)):
            apart = a != b
            most = (a[apart].double() - b[apart].double()).abs().max().item() if apart.any() else 0.0
            yield f"tensor {name}: {int(apart.sum())} of {a.numel()} values differ, by {most:.3g} at most"


def _state(expected: Run, got: Run) -> Iterator[str]:
    wanted, found = _final(expected).state, _final(got).state
    yield from _unequal("state.json", _plain(wanted), _plain(found))


def _events(expected: Run, got: Run) -> Iterator[str]:
    wanted, found = told(expected), told(got)
    for theirs, mine in zip(wanted, found, strict=False):
        where = f"event {theirs['t']} of step {theirs['step']}"
        if (mine["t"], mine["step"]) != (theirs["t"], theirs["step"]):
            yield f"{where} is expected, {mine['t']} of step {mine['step']} was told"
        yield from _unequal(where, theirs, mine)
    if len(wanted) != len(found):
        yield f"{len(found)} events were told, {len(wanted)} are expected"


def _unequal(where: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """The keys whose values differ; by their JSON, in which a NaN equals itself."""
    for key in sorted(wanted.keys() | found.keys()):
        a, b = (as_line({"": values.get(key, "nothing")})[4:-1] for values in (found, wanted))
        if a != b:
            yield f"{where}: {key} is {_short(a)}, {_short(b)} is expected"


def told(run: Run) -> list[Event]:
    """The events that training determines, without what it does not."""
    events = [event for event in run.events() if event["t"] in TOLD]
    return [{key: value for key, value in event.items() if key not in NOT_TRAINED} for event in events]


def _final(run: Run) -> store.Checkpoint:
    return store.read(store.checkpoints(run.checkpoints)[0])


def _load(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*/*.safetensors")):
        found |= {f"{file.parent.name}/{name}": tensor for name, tensor in load_file(file).items()}
    return found


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _plain(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if key not in NOT_TRAINED_STATE:
            flat |= _plain(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
