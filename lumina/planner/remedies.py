"""What to change when training does not fit into memory, each change checked to make it fit, the cheapest first.

A smaller micro-batch costs next to nothing; recomputing costs time (a third of the forward and backward passes, for
all of it); bf16 weights lose small updates; more processes cost devices; a shorter sequence or a smaller model are
another model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

from lumina.config.resolve import flatten, presets, resolve
from lumina.config.schema.config import Config
from lumina.model.cost import state_bytes
from lumina.planner.memory import micro_batch, micro_batches, mode, peak

SAME = ("model.kind", "train.optimizer", "precision.mode", "parallel.device")  # what a smaller preset keeps
RECOMPUTE = ("none", "selective", "full")  # each holds less than the one before
MOST_PROCESSES = 1 << 14
SHORTEST = 128  # tokens: nobody wants a shorter sequence instead


def largest_micro_batch(config: Config, capacity: int, processes: int = 1, device: str = "cpu") -> int | None:
    """The most sequences at once that divide a process's part of the batch and fit into `capacity` bytes, if any do."""

    def is_held(n: int) -> bool:
        return _fits(_with(config, {"train.micro_batch": n}), capacity, processes, device)

    # A part in one piece holds no gradients before it; of the others a larger one always holds more.
    whole, *sizes = micro_batches(config, processes) or [0]
    if not whole or is_held(whole):
        return whole or None
    if not sizes or not is_held(sizes[-1]):
        return None
    return sizes[bisect_left(sizes, True, hi=len(sizes) - 1, key=is_held)]


def remedies(config: Config, capacity: int, processes: int = 1, device: str = "cpu") -> list[str]:
    """What makes `config` fit into `capacity` bytes a device, each alone, the cheapest first; empty if nothing does.

    Settings are `key=value …`; `N processes` may be one of them. The last is the largest preset that fits.
    """
    smaller = largest_preset(config, capacity, processes, device)
    return changes(config, capacity, processes, device) + ([smaller] if smaller else [])


def changes(config: Config, capacity: int, processes: int = 1, device: str = "cpu") -> list[str]:
    """Those of `remedies` that leave the preset as it is."""
    found: list[dict[str, Any]] = []
    for change in _changes(config, processes):
        if any(_sort(change) == _sort(other) for other in found):
            continue  # a milder one of its sort fits
        changed = _with(config, {key: value for key, value in change.items() if key != "processes"})
        shared = int(change.get("processes", processes))
        if _fits(changed, capacity, shared, device):
            found.append(change)
        elif (fitting := largest_micro_batch(changed, capacity, shared, device)) is not None:
            found.append({**change, "train.micro_batch": fitting})
    return [_said(change) for change in found]


def largest_preset(config: Config, capacity: int, processes: int = 1, device: str = "cpu") -> str:
    """The largest preset that fits as this kind, with the same optimizer, precision and device: as `train` wants it.

    At one sequence at a time, with as much recomputation as its file has. Empty if none does.
    """
    flat = flatten(config)
    for name in reversed(presets()):
        if fits(resolve(name, {key: flat[key] for key in SAME}).config, capacity, processes, device):
            preset = flatten(resolve(name).config)
            return " ".join([name, *(f"{key}={flat[key]}" for key in SAME if flat[key] != preset[key])])
    return ""


def fits(config: Config, capacity: int, processes: int = 1, device: str = "cpu") -> bool:
    """Whether training fits into `capacity` bytes, one sequence at a time if the micro-batch is left open."""
    return _fits(smallest(config), capacity, processes, device)


def smallest(config: Config) -> Config:
    """With a micro-batch of one sequence, if it is left open."""
    return _with(config, {"train.micro_batch": 1}) if config.train.micro_batch == "auto" else config


def _fits(config: Config, capacity: int, processes: int, device: str) -> bool:
    held = state_bytes(config.model, config.train.optimizer, mode(config, device), config.train.lora.rank)
    if (held.weights + held.moments) // processes > capacity:  # known without a walk
        return False
    return peak(config, processes, device) <= capacity


def _changes(config: Config, processes: int) -> Iterator[dict[str, Any]]:
    """What may be changed, in the order of what it costs; each also with all the recomputation there is."""
    yield {"train.micro_batch": micro_batch(config, processes)}
    for recompute in RECOMPUTE[RECOMPUTE.index(config.train.recompute) + 1 :]:
        yield {"train.recompute": recompute}
    more = {} if config.train.recompute == "full" else {"train.recompute": "full"}
    pure = {} if config.precision.mode == "bf16_pure" else {"precision.mode": "bf16_pure", "precision.eval": "auto"}
    if pure:
        yield pure
        yield pure | more
    if not config.train.lora.rank:
        sequences = config.train.batch_tokens // config.model.seq_len
        counts = [count for count in _doubled(processes) if sequences % count == 0]
        yield from ({"processes": count, **also} for count in counts for also in ({}, more))
        yield from ({"processes": count, **more, **pure} for count in counts)
    for divisor in (2, 4, 8, 16):
        length, rest = divmod(config.model.seq_len, divisor)
        if not rest and length >= SHORTEST:
            yield {"model.seq_len": length}
            yield {"model.seq_len": length, **more}


def _doubled(processes: int) -> Iterator[int]:
    while (processes := processes * 2) <= MOST_PROCESSES:
        yield processes


def _sort(change: dict[str, Any]) -> str:
    """What it changes first. Of each sort the mildest is enough: fewest processes, longest sequence; but every way to
    recompute is one of its own."""
    key = next(iter(change))
    return f"{key}={change[key]}" if key == "train.recompute" else key


def _said(change: dict[str, Any]) -> str:
    parts = [f"{value} processes" if key == "processes" else f"{key}={value}" for key, value in change.items()]
    return " ".join(part for part in parts if part != "precision.eval=auto")


def _with(config: Config, values: dict[str, Any]) -> Config:
    """The configuration with other values of dotted keys, which the caller knows to be valid."""
    for key, value in values.items():
        section, name = key.split(".")
        changed = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: changed})
    return config
