"""Matrix products of sorted rows with one weight per expert: the grouped kernel and the loop it is tested against.

Rows 0..offs[0]-1 of `x` meet expert 0, rows offs[0]..offs[1]-1 expert 1, and so on; every row has an expert
(the kernel leaves rows past offs[-1] uninitialised). The kernel is wrapped in an operator of our own because
PyTorch's meta kernel takes bf16 only and CPU autocast does not cast its inputs.

On a CPU the kernel is ours: oneDNN generates and keeps code for every new shape of a bf16 product, and an expert's
number of rows is new in every step. Products in few shapes halve the time and keep the memory flat (docs/log.md).

Shapes: R rows (token, expert) sorted by expert, E experts, I inputs, O outputs, Q rows padded with zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

# Rows of a product on a CPU: whole blocks, then a multiple of the quantum.
BLOCK, QUANTUM = 1024, 64


def _cpu_rows(x_RI: Tensor, w_EIO: Tensor, offs_E: Tensor) -> Tensor:
    """`x @ w` of each row's expert. A product runs on into the next expert's rows, which that expert overwrites."""
    R = x_RI.shape[0]
    y_RO, start = x_RI.new_empty(R, w_EIO.shape[2]), 0
    for w_IO, end in zip(w_EIO.unbind(), offs_E.tolist(), strict=True):
        while start < end:
            rows = min(BLOCK, _padded(end - start))
            stop = min(end, start + rows)
            if start + rows <= R:
                torch.mm(x_RI[start : start + rows], w_IO, out=y_RO[start : start + rows])
            elif rows <= R:  # the last rows of all: run on backwards, and keep only this expert's
                y_RO[start:stop] = torch.mm(x_RI[R - rows :], w_IO)[rows - (R - start) :][: stop - start]
            else:
                torch.mm(x_RI[start:stop], w_IO, out=y_RO[start:stop])
            start = stop
    return y_RO


def _cpu_weights(g_RO: Tensor, x_RI: Tensor, offs_E: Tensor) -> Tensor:
    """`g.T @ x` of each expert's rows: whole blocks in one product, the rest padded with zeros in another."""
    w_EOI, start = g_RO.new_zeros(len(offs_E), g_RO.shape[1], x_RI.shape[1]), 0
    for w_OI, end in zip(w_EOI.unbind(), offs_E.tolist(), strict=True):
        rest = (end - start) % BLOCK
        if rest:
            g_QO, x_QI = (F.pad(t[end - rest : end], (0, 0, 0, _padded(rest) - rest)) for t in (g_RO, x_RI))
            torch.mm(g_QO.t(), x_QI, out=w_OI)
        if end - rest > start:
            w_OI.addmm_(g_RO[start : end - rest].t(), x_RI[start : end - rest])
        start = end
    return w_EOI


def _padded(rows: int) -> int:
    return -(-rows // QUANTUM) * QUANTUM


def native_rows(x_RI: Tensor, w_EIO: Tensor, offs_E: Tensor) -> Tensor:
    """`x @ w` of each row's expert, in one kernel."""
    return F.grouped_mm(x_RI, w_EIO, offs=offs_E)


def native_weights(g_RO: Tensor, x_RI: Tensor, offs_E: Tensor) -> Tensor:
    """`g.T @ x` of each expert's rows, in one kernel; of no rows some GPUs leave garbage (pytorch#172439)."""
    rows_E = offs_E.diff(prepend=offs_E.new_zeros(1))
    return torch.where(rows_E.view(-1, 1, 1) > 0, F.grouped_mm(g_RO.t(), x_RI, offs=offs_E), 0.0)


@library.custom_op("lumina::grouped_mm", mutates_args=())
def _grouped_mm(x_RI: Tensor, w_EOI: Tensor, offs_E: Tensor) -> Tensor:
    rows = _cpu_rows if x_RI.device.type == "cpu" else native_rows
    return rows(x_RI, w_EOI.transpose(-1, -2), offs_E)


@_grouped_mm.register_fake
def _(x_RI: Tensor, w_EOI: Tensor, offs_E: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], w_EOI.shape[1])


@library.custom_op("lumina::grouped_mm_backward", mutates_args=())
def _grouped_mm_backward(g_RO: Tensor, x_RI: Tensor, w_EOI: Tensor, offs_E: Tensor) -> tuple[Tensor, Tensor]:
    g_RO = g_RO.contiguous()  # an expanded gradient has stride 0, which the kernel refuses
    if g_RO.device.type == "cpu":
        return _cpu_rows(g_RO, w_EOI, offs_E), _cpu_weights(g_RO, x_RI, offs_E)
    return native_rows(g_RO, w_EOI, offs_E), native_weights(g_RO, x_RI, offs_E)


@_grouped_mm_backward.register_fake
def _(g_RO: Tensor, x_RI: Tensor, w_EOI: Tensor, offs_E: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_RI), torch.empty_like(w_EOI)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g_RO: Tensor) -> tuple[Tensor, Tensor | None, None]:
    if not ctx.needs_input_grad[1]:  # frozen experts
        _, w_EOI, offs_E = ctx.saved_tensors
        return _grouped_mm(g_RO.contiguous(), w_EOI.mT, offs_E), None, None
    return (*_grouped_mm_backward(g_RO, *ctx.saved_tensors), None)


_grouped_mm.register_autograd(_backward, setup_context=_save_inputs)


def _loop(x_RI: Tensor, w_EOI: Tensor, offs_E: Tensor) -> Tensor:
    """One product per expert; the host waits to learn where the experts' rows lie."""
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
