"""The optimizer: Muon for matrices, fused AdamW for everything else, or AdamW for all. One learning rate.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest semi-orthogonal matrix, found with five
Newton-Schulz iterations, and scales it by 0.2·sqrt(max(rows, columns)) so that its RMS matches AdamW's and one
learning rate serves both (Liu et al. 2025, 2502.16982). Fused weights are split into their named parts first: the
query, key and value projections are different maps. Experts are a batch of matrices. All parts of one shape, over
all layers, go through the iterations as one batch.

A step takes `skip`, a float32 scalar that is exactly 0 or 1 and lives on the device: with 1 nothing moves, neither
weights nor moments nor the bias-correction step, and no host synchronisation is needed to decide it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lumina.config.schema.train import TrainConfig

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of Jordan et al.: fast, not exact
NEWTON_SCHULZ_STEPS = 5
MATCH_RMS = 0.2


@dataclass(frozen=True)
class Groups:
    """Named parameters by treatment."""

    matrices: dict[str, Tensor]  # Muon, weight decay
    decayed: dict[str, Tensor]  # AdamW, weight decay
    plain: dict[str, Tensor]  # AdamW: embeddings, norms, biases, routers
    predictors: dict[str, Tensor]  # AdamW, outside the clipped norm: their loss is their own

    @property
    def clipped(self) -> list[Tensor]:
        return [*self.matrices.values(), *self.decayed.values(), *self.plain.values()]


def group_parameters(model: nn.Module, optimizer: str) -> Groups:
    """Embedding, head, norms and routers belong to AdamW in either optimizer (Jordan et al.).

    Weight decay is for the matrices and a head of its own; a tied head is the embedding, which OLMo 2 does not decay.
    """
    groups = Groups({}, {}, {}, {})
    for name, parameter in model.named_parameters():
        if ".predictor." in name:
            groups.predictors[name] = parameter
        elif parameter.ndim < 2 or name.endswith(("embed.weight", "ffn.router")):
            groups.plain[name] = parameter
        elif optimizer == "muon" and not name.endswith("head.weight"):
            groups.matrices[name] = parameter
        else:
            groups.decayed[name] = parameter
    return groups


def orthogonalize(x_NIJ: Tensor, eps: float = 1e-7) -> Tensor:
    """The semi-orthogonal factor of each of N matrices `[I, J]`, approximately (singular values 0.7 to 1.2).

    In bf16, as torch.optim.Muon does it: the iteration forgives the rounding.
    """
    a, b, c = NEWTON_SCHULZ
    x = x_NIJ.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(eps)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon:
    """Muon over named matrices `[I, J]` or stacks of matrices `[E, I, J]`."""

    def __init__(self, matrices: dict[str, Tensor], splits: dict[str, tuple[int, ...]]) -> None:
        self.matrices = matrices
        self.splits = splits
        self.momentum = {name: torch.zeros_like(w) for name, w in matrices.items()}

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, skip: Tensor) -> None:
        """One step; `skip` of 1 leaves weights and momentum as they are, even if gradients are not finite."""
        live = 1 - skip
        batches: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for name, weight in self.matrices.items():
            if weight.grad is None:
                continue
            # Once the gradient is clean, factors of exactly 0 and 1 keep a skipped step exact to the bit.
            gradient = torch.where(live.bool(), weight.grad, 0.0)
            momentum = self.momentum[name].lerp_(gradient, (1 - MOMENTUM) * live)
            direction = gradient.lerp_(momentum, MOMENTUM)  # Nesterov
            rows = self.splits.get(name, (weight.shape[-2],))
            for w, d in zip(weight.split(rows, dim=-2), direction.split(rows, dim=-2), strict=True):
                batches[tuple(w.shape[-2:])].append((w, d))
        for (rows_of_each, columns), parts in batches.items():
            updates = orthogonalize(torch.cat([d.reshape(-1, rows_of_each, columns) for _, d in parts]))
            rate = lr * MATCH_RMS * max(rows_of_each, columns) ** 0.5 * live
            sizes = [d.numel() // (rows_of_each * columns) for _, d in parts]
            for (w, _), update in zip(parts, updates.split(sizes), strict=True):
                w.mul_(1 - lr * weight_decay * live).sub_(update.view_as(w) * rate)


class Optimizer:
    """Both halves behind one `step`, with their state as flat named tensors for the checkpoint."""

    def __init__(self, model: nn.Module, train: TrainConfig) -> None:
        self.train = train
        self.groups = group_parameters(model, train.optimizer)
        modules = dict(model.named_modules())
        splits: dict[str, tuple[int, ...]] = {}
        for name in self.groups.matrices:
            owner, _, leaf = name.rpartition(".")
            if leaf in ("w_qkv", "w_gate_up"):
                splits[name] = modules[owner].splits
        self.muon = Muon(self.groups.matrices, splits)
        plain = {**self.groups.plain, **self.groups.predictors}
        self.named = {**self.groups.decayed, **plain}
        self.adamw = torch.optim.AdamW(
            [
                {"params": list(self.groups.decayed.values()), "weight_decay": train.weight_decay},
                {"params": list(plain.values()), "weight_decay": 0.0},
            ],
            lr=train.lr,
            betas=train.betas,
            eps=train.eps,
            fused=True,
        )
        for parameter in self.named.values():
            self.adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, lr: float, skip: Tensor) -> None:
        """Applies the gradients, or nothing at all where `skip` is 1."""
        self.muon.step(lr, self.train.weight_decay, skip)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.found_inf = skip  # type: ignore[attr-defined]
        self.adamw.step()

    def zero_grad(self) -> None:
        for parameter in (*self.groups.clipped, *self.groups.predictors.values()):
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Every moment under its parameter's name; loading writes into these tensors in place."""
        state = {f"{name}.momentum": m for name, m in self.muon.momentum.items()}
        for name, parameter in self.named.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{name}.{moment}"] = self.adamw.state[parameter][moment]
        return state

    @property
    def steps_taken(self) -> int:
        """AdamW's bias-correction step: optimizer steps that were not skipped."""
        return next((int(state["step"].item()) for state in self.adamw.state.values()), 0)

    @steps_taken.setter
    def steps_taken(self, value: int) -> None:
        for state in self.adamw.state.values():
            state["step"].fill_(value)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The global L2 norm of the gradients, in fp32, on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
    return total
