"""Matrix products of sorted rows with one weight per expert: the grouped kernel and the loop it is tested against.

Rows 0..offs[0]-1 of `x` meet expert 0, rows offs[0]..offs[1]-1 expert 1, and so on; every row has an expert
(the kernel leaves rows past offs[-1] uninitialised). The kernel is wrapped in an operator of our own because
PyTorch's meta kernel takes bf16 only and CPU autocast does not cast its inputs.

Shapes: R rows (token, expert) sorted by expert, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("lumina::grouped_mm", mutates_args=())
def _grouped_mm(x_RI: Tensor, w_EOI: Tensor, offs_E: Tensor) -> Tensor:
    return F.grouped_mm(x_RI, w_EOI.transpose(-1, -2), offs=offs_E)


@_grouped_mm.register_fake
def _(x_RI: Tensor, w_EOI: Tensor, offs_E: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], w_EOI.shape[1])


@torch.library.custom_op("lumina::grouped_mm_backward", mutates_args=())
def _grouped_mm_backward(g_RO: Tensor, x_RI: Tensor, w_EOI: Tensor, offs_E: Tensor) -> tuple[Tensor, Tensor]:
    g_RO = g_RO.contiguous()  # an expanded gradient has stride 0, which the kernel refuses
    return F.grouped_mm(g_RO, w_EOI, offs=offs_E), F.grouped_mm(g_RO.t(), x_RI, offs=offs_E)


@_grouped_mm_backward.register_fake
def _(g_RO: Tensor, x_RI: Tensor, w_EOI: Tensor, offs_E: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_RI), torch.empty_like(w_EOI)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g_RO: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*_grouped_mm_backward(g_RO, *ctx.saved_tensors), None)


_grouped_mm.register_autograd(_backward, setup_context=_save_inputs)


def _loop(x_RI: Tensor, w_EOI: Tensor, offs_E: Tensor) -> Tensor:
    """One product per expert; one host sync to learn where the experts' rows lie."""
    ends = offs_E.tolist()
    starts = [0, *ends[:-1]]
    return torch.cat(
        [F.linear(x_RI[start:end], w_OI) for w_OI, start, end in zip(w_EOI.unbind(), starts, ends, strict=True)]
    )


def grouped_linear(x_RI: Tensor, w_EOI: Tensor, offs_E: Tensor, kernel: str) -> Tensor:
    """`F.linear` with the weight of each row's expert.

    `offs_E` is the int32 running count of rows per expert; `kernel` is `grouped` or `loop`. Under autocast
    both inputs are cast to its dtype, as `F.linear` would do.
    """
    device = x_RI.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_RI, w_EOI = x_RI.to(dtype), w_EOI.to(dtype)
    if kernel == "loop":
        return _loop(x_RI, w_EOI, offs_E)
    y_RO: Tensor = _grouped_mm(x_RI, w_EOI, offs_E)
    return y_RO
