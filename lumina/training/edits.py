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

Shapes: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lumina.config.overlay import Overlay
from lumina.errors import UserError
from lumina.model.init import STD, name_seed
from lumina.model.moe import MoE
from lumina.model.noise import fold, uniform
from lumina.model.transformer import Transformer
from lumina.parallel.sharding import local, own_rows
from lumina.training.probe import Probe
from lumina.training.setup import Parts

# Of the root mean square of what is copied. Our choice: two equal experts get equal gradients and would stay equal, so
# some noise there must be (expert upcycling perturbs router rows alike, 2604.19835); how much, nobody has measured.
NOISE = 0.01


@torch.no_grad()
def make(edit: Overlay, parts: Parts, probe: Probe) -> None:
    """Does it; the probe reads the held-out text by which attention logits are known."""
    if edit.key == "optimizer.reset":
        parts.optimizer.reset()
    elif edit.key == "qk_clip":
        assert not isinstance(edit.value, list)
        clip_logits(parts.model, probe, edit.value)
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


def clip_logits(model: Transformer, probe: Probe, tau: float) -> None:
    """Scales the gains of the query and the key norm so that no logit exceeds `tau` in the sequences that the probe
    attends to (`probe.ATTENDED`).

    Each layer is clipped by what it does with what the others give it now.
    """
    for block, largest in zip(model.units, probe.attention(), strict=True):
        if largest > tau:
            for norm in (block.attn.q_norm, block.attn.k_norm):
                local(norm.weight).mul_(math.sqrt(tau / largest))


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
