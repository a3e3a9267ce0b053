"""A model shared out: each process keeps its rows of every parameter, gradient and moment (FSDP2, ZeRO stage 3).

A unit (a block, the embedding, the rest) is gathered when it computes and given back after it. Gradients are summed,
not averaged: the loss is divided by the tokens of the whole batch already. Dimension 0 is shared out as torch does
it: ceil(rows / size) to each process, the last ones may have fewer or none.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lumina.parallel.world import World

FORWARD_METHODS = ("decode", "evaluate")  # they compute too: parameters must be gathered for them


def shard(model: nn.Module, units: Sequence[nn.Module], world: World, device: str) -> None:
    """Shares out `units` one by one, and what is left of `model` as another. Call it on the meta device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    # Of a block whose output is a view: nothing here writes into a block's output.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = init_device_mesh(device, (world.size,))
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh)
        for method in FORWARD_METHODS:
            if hasattr(unit, method):
                register_fsdp_forward_method(unit, method)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def materialize(model: nn.Module, device: str) -> None:
    """Gives every parameter and buffer memory on `device`, undefined in content; tied parameters stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in made:
                empty = torch.empty_like(parameter, device=device)
                made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module.register_parameter(name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty_like(buffer, device=device)
    # FSDP moves rows that do not divide evenly into padded memory: now, not when the optimizer knows the old place.
    model._apply(lambda tensor: tensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory; a tensor that is not shared out is its own."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, parameter: Tensor) -> Tensor:
    """`part` as this process's part of a tensor that is shared out as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def assign(parameter: Tensor, value: Tensor) -> None:
    """Stores the whole `value` in `parameter`, or this process's rows of it."""
    local(parameter).copy_(value[own_rows(parameter)])


def own_rows(parameter: Tensor) -> slice:
    """Which rows of dimension 0 this process has."""
    if not isinstance(parameter, DTensor):
        return slice(0, len(parameter))
    mesh, rows = parameter.device_mesh, len(parameter)
    each = -(-rows // mesh.size())
    return slice(min(mesh.get_local_rank() * each, rows), min((mesh.get_local_rank() + 1) * each, rows))


def whole(parts: Sequence[Tensor], rows: Sequence[int], world: World) -> list[Tensor]:
    """The whole matrices, of so many `rows`, whose own rows are `parts`: one exchange for all of them."""
    padded = [
        nn.functional.pad(part, (0, 0, 0, -(-n // world.size) - len(part))) for part, n in zip(parts, rows, strict=True)
    ]
    gathered = world.gather(torch.cat([part.flatten() for part in padded]))
    pieces = gathered.split([part.numel() for part in padded], dim=1)
    return [piece.reshape(-1, part.shape[1])[:n] for piece, part, n in zip(pieces, padded, rows, strict=True)]
