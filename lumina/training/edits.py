"""Edits: what changes the state once, between two steps, on purpose; see `lumina.config.overlay`.

Each is a pure function of the state (weights, moments, router state), of the edit and of the seed, and the same in
every process: a run that goes on from before it makes it again, to the bit, and its undo is the run that never had it.

| edit | what becomes of the state |
|---|---|
| `optimizer.reset` | all moments are zero, and AdamW's bias correction begins anew |
| `qk_clip` | where the largest attention logit of a layer exceeds tau, it becomes tau (Kimi K2, 2507.20534, alg. 1) |
| `router.reset` | an expert's router row is drawn as for a new model, its bias is 0, the row's moments are zero |
| `expert.reseed` | an expert and its router row become the layer's most loaded one, with noise; their moments are 0 |

Kimi K2 scales a head's query and key weights by sqrt(tau / largest logit) each. Here their norms come after them, so
that the norms' gains take those factors; all heads of a layer share them.

Shapes: B sequences, S tokens, H query heads, G key-value heads, K head dim, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lumina.config.overlay import Overlay
from lumina.data.loader import Batch
from lumina.errors import UserError
from lumina.model.attention import Attention, rotate
from lumina.model.init import STD, name_seed
from lumina.model.moe import MoE
from lumina.model.noise import fold, uniform
from lumina.model.transformer import Transformer
from lumina.parallel.sharding import local, own_rows
from lumina.training.precision import Precision
from lumina.training.setup import Parts

NOISE = 0.01  # of the root mean square of what is copied: enough to part the two, too little to change what they do


@torch.no_grad()
def make(edit: Overlay, parts: Parts, looked_at: Batch) -> None:
    """Does it. `looked_at` is the probe's piece of held-out text, by which attention logits are known."""
    if edit.key == "optimizer.reset":
        parts.optimizer.reset()
    elif edit.key == "qk_clip":
        assert not isinstance(edit.value, list)
        clip_logits(parts.model, looked_at, parts.precision, edit.value)
    else:
        assert isinstance(edit.value, list)
        layer, expert = edit.value
        _Expert(parts, layer, expert, edit.begin).make(edit.key)


def require_expert(model: Transformer, edit: Overlay) -> None:
    """Raises `UserError` if the model has no such layer or expert; spare slots are none."""
    assert isinstance(edit.value, list)
    (layer, expert), moes = edit.value, model.moes
    experts = moes[0].router.config.experts
    if layer >= len(moes) or expert >= experts:
        wrong = f"{edit.key}={edit.value}: no such expert"
        raise UserError(wrong, fix=f"layers are 0 to {len(moes) - 1}, experts 0 to {experts - 1}")


def clip_logits(model: Transformer, batch: Batch, precision: Precision, tau: float) -> None:
    """Scales the gains of the query and the key norm so that no logit of `batch` exceeds `tau`, layer by layer.

    Each layer is clipped by what it does with what the others give it now.
    """
    for attention, largest in zip(_attentions(model), largest_logits(model, batch, precision), strict=True):
        if largest > tau:
            for norm in (attention.q_norm, attention.k_norm):
                local(norm.weight).mul_(math.sqrt(tau / largest))


def largest_logits(model: Transformer, batch: Batch, precision: Precision) -> list[float]:
    """The largest attention logit of each layer on `batch`, under the causal routing; the same in every process."""
    found: list[Tensor] = []

    def watch(attention: Attention, stack: ExitStack) -> None:
        given: list[Any] = []

        def before(_: nn.Module, arguments: Any) -> None:
            given[:] = arguments[1], arguments[2], arguments[4] if len(arguments) > 4 else None

        def normed(_: nn.Module, arguments: Any, normed_BSHK: Tensor) -> None:
            given.append(normed_BSHK)
            if len(given) == 5:
                rope, mask_B1SS, keep_BS, q_BSHK, k_BSGK = given
                found.append(_largest(rotate(q_BSHK, *rope), rotate(k_BSGK, *rope), mask_B1SS, keep_BS))

        stack.callback(attention.register_forward_pre_hook(before).remove)
        for norm in (attention.q_norm, attention.k_norm):
            stack.callback(norm.register_forward_hook(normed).remove)

    with ExitStack() as stack:
        for attention in _attentions(model):
            watch(attention, stack)
        with precision.evaluating():
            model.evaluate(batch.ids_BS, batch.segments_BS, batch.targets_BS)
    return [float(largest) for largest in torch.stack(found).tolist()]


def _largest(q_BSHK: Tensor, k_BSGK: Tensor, mask_B1SS: Tensor, keep_BS: Tensor | None) -> Tensor:
    """Over all pairs that see each other, of the tokens that the layer computes; a sequence at a time."""
    K, groups = q_BSHK.shape[-1], q_BSHK.shape[2] // k_BSGK.shape[2]
    largest = []
    for b in range(len(q_BSHK)):
        k_HSK = k_BSGK[b].float().repeat_interleave(groups, dim=1).transpose(0, 1)
        logit_HSS = q_BSHK[b].float().transpose(0, 1) @ k_HSK.mT / math.sqrt(K)
        seen_1SS = mask_B1SS[b] if keep_BS is None else mask_B1SS[b] & keep_BS[b].view(1, -1, 1)
        largest.append(logit_HSS.masked_fill(~seen_1SS, -math.inf).amax())
    return torch.stack(largest).amax()


def _attentions(model: Transformer) -> list[Attention]:
    return [block.attn for block in model.units]


class _Expert:
    """One expert of one layer, with whatever the state holds of it, in whichever process."""

    def __init__(self, parts: Parts, layer: int, expert: int, step: int) -> None:
        self.parts, self.expert, self.world = parts, expert, parts.world
        self.moe: MoE = parts.model.moes[layer]
        self.name = next(name for name, module in parts.model.named_modules() if module is self.moe)
        self.key = torch.tensor([name_seed(parts.plan.seed, f"{self.name}.{expert}")])
        self.key = fold(self.key, step)

    def make(self, edit: str) -> None:
        router = self.moe.router
        if edit == "router.reset":
            self._write("router.weight", STD * self._normal(router.weight.shape[1:]))
            router.bias_E[self.expert] = 0.0
            self._forget("router.weight")
            return
        hottest = int(router.fraction_E.masked_fill(~router.active_E, -1.0).argmax())  # of the last step
        for number, leaf in enumerate(("w_gate_up", "w_down", "router.weight")):
            source = self._read(leaf, hottest)
            noise = self._normal(source.shape, number + 1).to(source.device)
            scale = NOISE * source.float().square().mean().sqrt()
            self._write(leaf, source.float() + scale * noise)
            self._forget(leaf)
        router.bias_E[self.expert] = router.bias_E[hottest]

    def _normal(self, shape: torch.Size, number: int = 0) -> Tensor:
        """Standard normal noise by the counter hash (Box and Muller), in fp32."""
        counters = torch.arange(shape.numel())
        first, second = (uniform(fold(fold(self.key, 2 * number + part), counters)) for part in (0, 1))
        return ((-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()).view(shape)

    def _parameter(self, leaf: str) -> Tensor:
        return self.moe.get_parameter(leaf)

    def _rows(self, leaf: str, expert: int) -> Iterator[tuple[Tensor, int]]:
        """This process's rows of the parameter, and which of them is the expert's; nothing if another has it."""
        parameter = self._parameter(leaf)
        rows = own_rows(parameter)
        if rows.start <= expert < rows.stop:
            yield local(parameter), expert - rows.start

    def _read(self, leaf: str, expert: int) -> Tensor:
        """The expert's part of a parameter, in every process."""
        parameter = self._parameter(leaf)
        part = torch.zeros(parameter.shape[1:], dtype=parameter.dtype, device=parameter.device)
        for rows, row in self._rows(leaf, expert):
            part.copy_(rows[row])
        return self.world.sum(part)

    def _write(self, leaf: str, value: Tensor) -> None:
        for rows, row in self._rows(leaf, self.expert):
            rows[row] = value.to(rows.dtype).to(rows.device)

    def _forget(self, leaf: str) -> None:
        """The moments of the expert's part are zero; AdamW's count of steps is the whole parameter's and stays."""
        own = self.parts.optimizer.tensors()
        for moment in ("momentum", "exp_avg", "exp_avg_sq"):
            if (tensor := own.get(f"{self.name}.{leaf}.{moment}")) is not None:
                for _, row in self._rows(leaf, self.expert):
                    local(tensor)[row] = 0.0
