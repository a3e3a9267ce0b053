"""Whether a configuration can fit on this machine, said before anything is prepared or allocated. No torch on a CPU."""

from __future__ import annotations

from lumina.config.resolve import Resolved, flatten, presets, resolve
from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.model.cost import StateBytes, state_bytes
from lumina.planner.hardware import main_memory

SHAPE = ("vocab", "width", "layers", "ffn", "heads", "kv_heads", "head_dim", "moe.experts", "moe.ffn", "moe.shared")
SAME = ("model.kind", "train.optimizer", "precision.mode", "parallel.device")  # what a smaller preset keeps
GIB = 2**30


def usable(device: str = "cpu") -> int:
    """Bytes that this machine has for its processes, or one GPU for its own."""
    if _is_cuda(device):
        import torch

        return torch.cuda.mem_get_info()[1]
    return main_memory()


def needed(config: Config, processes: int = 1, local: int = 1) -> StateBytes:
    """Bytes of weights, gradients and moments in what `usable` counts.

    All `processes` share them; the `local` ones of this machine share its memory, but each has its own GPU.
    """
    whole = state_bytes(config.model, config.train.optimizer, config.precision.mode, config.train.lora.rank)
    here = 1 if _is_cuda(config.parallel.device) else local
    return StateBytes(*(part * here // processes for part in (whole.weights, whole.gradients, whole.moments)))


def fits(config: Config, processes: int = 1, local: int = 1) -> bool:
    """Whether weights, gradients and moments fit; activations, which come on top, are not counted here."""
    return needed(config, processes, local).total <= usable(config.parallel.device)


def room_for_copy(config: Config, processes: int = 1, local: int = 1) -> bool:
    """Whether main memory holds a copy of weights and moments, beside what a training on CPUs has there."""
    whole = state_bytes(config.model, config.train.optimizer, config.precision.mode, config.train.lora.rank)
    copy = (whole.weights + whole.moments) * local // processes
    beside = 0 if _is_cuda(config.parallel.device) else needed(config, processes, local).total
    return beside + copy <= usable()


def require(resolved: Resolved, processes: int = 1, local: int = 1) -> None:
    """Raises `UserError` if weights, gradients and moments alone are larger than the memory there is."""
    config, kind = resolved.config, resolved.config.model.kind
    if fits(config, processes, local):
        return
    need, have = needed(config, processes, local), usable(config.parallel.device)
    own, smaller = _enlarged(resolved), _largest_that_fits(config, processes, local)
    ways = [f"make {', '.join(own)} smaller"] if own else []
    ways += [f"`lumina train {smaller}` fits"] if smaller else []
    ways += ["share the model among more machines or GPUs with torchrun", "see `lumina presets`"]
    share = f" (this machine's or GPU's share of {processes} processes)" if processes > 1 else ""
    raise UserError(
        f"this {kind} model does not fit: {need.weights / GIB:.1f} GiB of weights, {need.gradients / GIB:.1f} of "
        f"gradients and {need.moments / GIB:.1f} of optimizer state{share} are {need.total / GIB:.1f} GiB before any "
        f"activation; here are {have / GIB:.1f} GiB",
        fix="; or ".join(ways[:-1]) + f"; {ways[-1]}",
    )


def _enlarged(resolved: Resolved) -> list[str]:
    """The user's own `key=value` that make the model larger than its preset is."""
    base = resolved.request.get("preset")  # a run's saved configuration has none
    if base is None:
        return []
    preset = flatten(resolve(base, {"model.kind": resolved.config.model.kind}).config)
    mine = {key: resolved.request[key] for key in (f"model.{name}" for name in SHAPE) if key in resolved.request}
    return [f"{key}={value}" for key, value in mine.items() if value > preset[key]]


def _largest_that_fits(config: Config, processes: int, local: int) -> str:
    """The largest preset that fits as this kind, with the same optimizer, precision and device: as `train` wants it."""
    flat = flatten(config)
    fitting = {}
    for name in presets():
        other = resolve(name, {key: flat[key] for key in SAME}).config
        if fits(other, processes, local):
            preset = flatten(resolve(name).config)
            command = " ".join([name, *(f"{key}={flat[key]}" for key in SAME if flat[key] != preset[key])])
            fitting[command] = needed(other, processes, local).total
    return max(fitting, key=fitting.__getitem__, default="")


def _is_cuda(device: str) -> bool:
    """Whether the run will be on a GPU, asked without torch where the answer is known."""
    if device not in ("auto", "cuda"):
        return False
    import torch

    return torch.cuda.is_available()
