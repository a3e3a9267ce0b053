"""Whether a configuration can fit on this machine, said before anything is prepared or allocated. No torch on a CPU."""

from __future__ import annotations

from lumina.config.resolve import Resolved, flatten, resolve
from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.model.cost import state_bytes
from lumina.planner import remedies
from lumina.planner.hardware import free_memory, main_memory
from lumina.planner.memory import Memory, memory, mode

SHAPE = ("vocab", "width", "layers", "ffn", "heads", "kv_heads", "head_dim", "moe.experts", "moe.ffn", "moe.shared")
GIB = 2**30


def usable(device: str = "cpu") -> int:
    """Bytes that this machine has for its processes, or one GPU for its own."""
    if _planned(device) == "cuda":
        import torch

        return torch.cuda.mem_get_info()[1]
    return main_memory()


def needed(config: Config, processes: int = 1) -> Memory:
    """What each of `processes` takes, one sequence at a time if the micro-batch is left open."""
    return memory(remedies.smallest(config), processes, _planned(config.parallel.device))


def fits(config: Config, processes: int = 1, local: int = 1) -> bool:
    """Whether training fits; the `local` processes of this machine share its memory, but each has its own GPU."""
    return remedies.fits(config, _share(config, local), processes, _planned(config.parallel.device))


def room_for_copy(config: Config, processes: int = 1, local: int = 1, copies: int = 1) -> bool:
    """Whether the main memory that is free holds copies of weights and moments, beside a training on CPUs."""
    device = _planned(config.parallel.device)
    whole = state_bytes(config.model, config.train.optimizer, mode(config, device), config.train.lora.rank)
    beside = 0 if device == "cuda" else memory(config, processes, device).total
    return local * (beside + copies * (whole.weights + whole.moments) // processes) <= free_memory()


def require(resolved: Resolved, processes: int = 1, local: int = 1) -> None:
    """Raises `UserError` if training takes more memory than there is."""
    config = resolved.config
    if fits(config, processes, local):
        return
    need, have = needed(config, processes), _share(config, local)
    parts = ", ".join(f"{size / GIB:.1f} of {part}" for part, size in need.parts.items() if size >= GIB / 20)
    share = f" in each of {processes} processes (this machine has {local} of them)" if processes > 1 else ""
    raise UserError(
        f"this {config.model.kind} model does not fit: its training takes {need.total / GIB:.1f} GiB{share}, "
        f"{parts or 'next to nothing of it for the model'}; here are {have / GIB:.1f} GiB",
        fix=_ways(resolved, have, processes),
    )


def _ways(resolved: Resolved, have: int, processes: int) -> str:
    config, device = resolved.config, _planned(resolved.config.parallel.device)
    own, smaller = _enlarged(resolved), remedies.largest_preset(config, have, processes, device)
    ways = [f"make {', '.join(own)} smaller"] if own else []
    found = remedies.changes(config, have, processes, device)
    alone = [change for change in found if "processes" not in change]  # others would share this machine
    ways += [f"with {change} it fits" for change in alone]
    ways += [f"`lumina train {smaller}` fits"] if smaller else []
    ways += ["share the model among more machines or GPUs with torchrun", "see `lumina presets`"]
    return "; or ".join(ways[:-1]) + f"; {ways[-1]}"


def _share(config: Config, local: int) -> int:
    """Bytes that one process of this machine may take."""
    device = config.parallel.device
    return usable(device) // (1 if _planned(device) == "cuda" else local)


def _enlarged(resolved: Resolved) -> list[str]:
    """The user's own `key=value` that make the model larger than its preset is."""
    base = resolved.request.get("preset")  # a run's saved configuration has none
    if base is None:
        return []
    preset = flatten(resolve(base, {"model.kind": resolved.config.model.kind}).config)
    mine = {key: resolved.request[key] for key in (f"model.{name}" for name in SHAPE) if key in resolved.request}
    return [f"{key}={value}" for key, value in mine.items() if value > preset[key]]


def _planned(device: str) -> str:
    """The device that the run will be on, as the planner knows it; torch is not asked where the answer is known."""
    if device not in ("auto", "cuda"):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
