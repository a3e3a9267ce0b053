"""The optimizer: Muon for matrices, fused AdamW for everything else, or AdamW for all. One learning rate.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest semi-orthogonal matrix, found with five
Newton-Schulz iterations, and scales it by 0.2·sqrt(max(rows, columns)) so that its RMS matches AdamW's and one
learning rate serves both (Liu et al. 2025, 2502.16982). Fused weights are split into their named parts first: the
query, key and value projections are different maps. Experts are a batch of matrices. Parts of one shape, over
all layers, go through the iterations as one batch, or as a few where that would take too much memory.

In a stack a matrix whose gradient is exactly zero, that of an expert without tokens, stays as it is: its old momentum
would be blown up to a full step in one and the same direction, again and again.

A step takes `skip`, a float32 scalar that is exactly 0 or 1 and lives on the device: with 1 nothing moves, neither
weights nor moments nor the bias-correction step, and no host synchronisation is needed to decide it.

With several processes each holds its rows of every weight and moment. AdamW needs no more; Muon's matrices are put
together first, each process orthogonalises a share of them, and keeps its rows of the result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lumina.config.schema.train import TrainConfig
from lumina.model.lora import MARK
from lumina.parallel.sharding import like, local, own_rows, whole
from lumina.parallel.world import ALONE, World
from lumina.planner.footprint.optimizer import PORTION
from lumina.training.precision import LossScale

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of Jordan et al.: fast, not exact
NEWTON_SCHULZ_STEPS = 5
MATCH_RMS = 0.2
SAMPLE = 64  # elements of a parameter
FIGURES = ("moved", "size", "adam", "adam_count", "optimizer_steps")  # of a step, from a sample
PARTS = ("embed", "head", "router")  # whose gradients have a norm of their own


@dataclass(frozen=True)
class Groups:
    """Named parameters by treatment."""

    matrices: dict[str, Tensor]  # Muon, weight decay
    decayed: dict[str, Tensor]  # AdamW, weight decay
    plain: dict[str, Tensor]  # AdamW: embeddings, norms, biases, routers
    predictors: dict[str, Tensor]  # AdamW, outside the clipped norm: their loss is their own

    @property
    def clipped(self) -> dict[str, Tensor]:
        return self.matrices | self.decayed | self.plain


def group_parameters(model: nn.Module, optimizer: str) -> Groups:
    """Embedding, head, norms and routers belong to AdamW in either optimizer (Jordan et al.).

    Weight decay is for the matrices and a head of its own; a tied head is the embedding, which OLMo 2 does not decay.
    Adapters are AdamW's in either, decayed, as everywhere: a thin factor has no semi-orthogonal step that is one of
    their product. Frozen parameters are in no group.
    """
    groups = Groups({}, {}, {}, {})
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if MARK in name:
            groups.decayed[name] = parameter
        elif ".predictor." in name:
            groups.predictors[name] = parameter
        elif parameter.ndim < 2 or name.endswith(("embed.weight", "ffn.router.weight")):
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
    """Muon over named matrices `[I, J]` or stacks of matrices `[E, I, J]`; `splits` are the rows of fused parts."""

    def __init__(self, matrices: dict[str, Tensor], splits: dict[str, tuple[int, ...]], world: World = ALONE) -> None:
        self.matrices, self.splits, self.world = matrices, splits, world
        self.momentum = {name: torch.zeros_like(local(w)) for name, w in matrices.items()}

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, skip: Tensor) -> None:
        """One step; `skip` of 1 leaves weights and momentum as they are, even if gradients are not finite."""
        for names in self._portions():
            self._move(names, lr, weight_decay, 1 - skip)

    def _portions(self) -> Iterator[list[str]]:
        """All matrices, those of one shape side by side, at most `PORTION` elements (or one matrix) at a time."""
        portion: list[str] = []
        elements = 0
        for name, weight in sorted(self.matrices.items(), key=lambda item: item[1].shape):
            if portion and elements + weight.numel() > PORTION:
                yield portion
                portion, elements = [], 0
            portion.append(name)
            elements += weight.numel()
        if portion:
            yield portion

    def _move(self, names: list[str], lr: float, weight_decay: float, live: Tensor) -> None:
        batches: dict[tuple[int, ...], list[_Part]] = defaultdict(list)
        directions, fed = self._directions(names, live)
        for name, direction in self._whole(directions).items():
            weight, rows = self.matrices[name], self.splits.get(name, (direction.shape[-2],))
            alive = fed.get(name, live)
            own = own_rows(weight) if weight.ndim == 2 else slice(0, sum(rows))
            start = 0
            for part in direction.split(rows, dim=-2):
                n, columns = part.shape[-2:]
                first, last = max(own.start, start), max(min(own.stop, start + n), own.start, start)
                mine = local(weight)[..., first - own.start : last - own.start, :]
                batches[n, columns, weight.ndim].append(_Part(mine, part, slice(first - start, last - start), alive))
                start += n
        for (n, columns, ndim), parts in batches.items():
            stacks = [part.direction.reshape(part.direction.shape[:-2].numel(), n, columns) for part in parts]
            # Stacks of experts are shared out by expert, so that no other process has these.
            updates = self._orthogonalize(torch.cat(stacks), shared=ndim == 2)
            rate = lr * MATCH_RMS * max(n, columns) ** 0.5
            for part, update in zip(parts, updates.split([len(stack) for stack in stacks]), strict=True):
                update = update.view_as(part.direction)[..., part.rows, :]
                part.weight.mul_(1 - lr * weight_decay * part.live).sub_(update * (rate * part.live))

    def _directions(self, names: list[str], live: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Nesterov's direction of this process's rows; and of stacks, which of their matrices move (0 or 1)."""
        directions, fed = {}, {}
        for name in names:
            weight = self.matrices[name]
            if weight.grad is None:
                continue
            # Once the gradient is clean, factors of exactly 0 and 1 keep a skipped step exact to the bit.
            gradient = torch.where(live.bool(), local(weight.grad), 0.0)
            alive = live
            if weight.ndim == 3:
                alive = fed[name] = live * gradient.ne(0).any((-2, -1)).view(-1, 1, 1)
            momentum = self.momentum[name].lerp_(gradient, (1 - MOMENTUM) * alive.to(gradient.dtype))
            directions[name] = gradient.lerp_(momentum, MOMENTUM)
        return directions, fed

    def _whole(self, directions: dict[str, Tensor]) -> dict[str, Tensor]:
        """The directions of whole matrices. They travel in bf16, in which they are orthogonalised anyway."""
        names = [name for name in directions if self.matrices[name].ndim == 2]
        if self.world.size == 1 or not names:
            return directions
        parts = [directions[name].bfloat16() for name in names]
        matrices = whole(parts, [len(self.matrices[name]) for name in names], self.world)
        return directions | dict(zip(names, matrices, strict=True))

    def _orthogonalize(self, x_NIJ: Tensor, shared: bool) -> Tensor:
        """All N matrices, of which each process computes a share if they are the same in all."""
        if self.world.size == 1 or not shared:
            return orthogonalize(x_NIJ)
        N, each = len(x_NIJ), -(-len(x_NIJ) // self.world.size)
        padded = torch.nn.functional.pad(x_NIJ, (0, 0, 0, 0, 0, each * self.world.size - N))
        share = orthogonalize(padded[self.world.rank * each : (self.world.rank + 1) * each])
        return self.world.gather(share).flatten(0, 1)[:N]


class _Part(NamedTuple):
    """A map inside a fused weight: what of it this process has, its direction, which rows of that are its own, and
    whether it moves, 0 or 1."""

    weight: Tensor
    direction: Tensor
    rows: slice
    live: Tensor


class Optimizer:
    """Both halves behind one `step`, with their state as flat named tensors for the checkpoint."""

    def __init__(
        self, model: nn.Module, train: TrainConfig, world: World = ALONE, loss_scale: LossScale | None = None
    ) -> None:
        self.world, self.loss_scale = world, loss_scale
        self.weight_decay = train.weight_decay  # of the step to come
        self.groups = group_parameters(model, train.optimizer)
        modules = dict(model.named_modules())
        splits: dict[str, tuple[int, ...]] = {}
        for name in self.groups.matrices:
            owner, _, leaf = name.rpartition(".")
            if leaf in ("w_qkv", "w_gate_up"):
                splits[name] = modules[owner].splits
        self.muon = Muon(self.groups.matrices, splits, world)
        self.predictor_rate = 1.0  # of the learning rate of the step to come
        self.named = self.groups.decayed | self.groups.plain | self.groups.predictors
        # What AdamW moves: the parameter itself, or this process's rows of it as a leaf in the same memory.
        self.leaves = {name: p if local(p) is p else nn.Parameter(local(p)) for name, p in self.named.items()}
        self.adamw = torch.optim.AdamW(
            [
                {"params": [self.leaves[name] for name in self.groups.decayed], "weight_decay": self.weight_decay},
                {"params": [self.leaves[name] for name in self.groups.plain], "weight_decay": 0.0},
                {"params": [self.leaves[name] for name in self.groups.predictors], "weight_decay": 0.0},
            ],
            lr=train.lr,
            betas=train.betas,
            eps=train.eps,
            fused=True,
        )
        self.part_of = {name: part for name in self.groups.clipped if (part := _part(name))}
        for tensor in self.leaves.values():
            self.adamw.state[tensor] = {
                "step": torch.zeros((), device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }

        self.sample = Sample(self)

    def step(self, lr: float, skip: Tensor) -> None:
        """Applies the gradients, or nothing at all where `skip` is 1."""
        self.muon.step(lr, self.weight_decay, skip)
        self.adamw.param_groups[0]["weight_decay"] = self.weight_decay
        for name, leaf in self.leaves.items():
            gradient = self.named[name].grad
            leaf.grad = None if gradient is None else local(gradient)
        for group, rate in zip(self.adamw.param_groups, (1.0, 1.0, self.predictor_rate), strict=True):
            group["lr"] = lr * rate
        self.adamw.found_inf = skip  # type: ignore[attr-defined]
        self.adamw.step()

    def reset(self) -> None:
        """As new: no moments, and AdamW counts its steps from 0, by which it corrects them. A loss scale stays."""
        for momentum in self.muon.momentum.values():
            momentum.zero_()
        for state in self.adamw.state.values():
            for tensor in state.values():
                tensor.zero_()

    def replan(self, train: TrainConfig) -> None:
        """Its constants as the configuration has them; rate and decay are given anew with each step."""
        for group in self.adamw.param_groups:
            group["betas"], group["eps"] = train.betas, train.eps

    def zero_grad(self) -> None:
        # Of several processes a block's gradients lie in one piece of memory: one that a leaf still has keeps them all.
        for parameter in (*(self.groups.clipped | self.groups.predictors).values(), *self.leaves.values()):
            parameter.grad = None

    def gradients(self, parameters: dict[str, Tensor]) -> list[Tensor]:
        """This process's part of the gradients there are."""
        return [local(p.grad) for p in parameters.values() if p.grad is not None]

    def norms(self) -> Tensor:
        """Of the gradients that are clipped: the total, then `PARTS`."""
        names = [name for name, p in self.groups.clipped.items() if p.grad is not None]
        parts = [[i for i, name in enumerate(names) if self.part_of.get(name) == part] for part in PARTS]
        return gradient_norms(self.gradients(self.groups.clipped), parts, self.world)

    def tensors(self) -> dict[str, Tensor]:
        """Every moment under its parameter's name; loading writes into these tensors in place."""
        state = {f"{name}.momentum": like(m, self.groups.matrices[name]) for name, m in self.muon.momentum.items()}
        for name, parameter in self.named.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{name}.{moment}"] = like(self.adamw.state[self.leaves[name]][moment], parameter)
        return state | (self.loss_scale.tensors() if self.loss_scale else {})

    def step_tensors(self) -> dict[str, Tensor]:
        """AdamW's count of steps, once for each parameter, in place; `steps_taken` is the same for a checkpoint."""
        return {f"{name}.step": self.adamw.state[leaf]["step"] for name, leaf in self.leaves.items()}

    @property
    def steps_taken(self) -> int:
        """AdamW's bias-correction step: optimizer steps that were not skipped."""
        return next((int(state["step"].item()) for state in self.adamw.state.values()), 0)

    @steps_taken.setter
    def steps_taken(self, value: int) -> None:
        for state in self.adamw.state.values():
            state["step"].fill_(value)


def _part(name: str) -> str:
    """Which of `PARTS` a parameter is; "" if none."""
    if name in ("embed.weight", "head.weight"):
        return name.removesuffix(".weight")
    return "router" if name.endswith("router.weight") else ""


class Sample:
    """Up to `SAMPLE` elements of every parameter, evenly spread: what a step does to them stands for what it does.

    Of this process's rows alone: an exchange would cost more than it tells.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        groups = optimizer.groups
        self.weights = [_some(local(p)) for p in (groups.clipped | groups.predictors).values()]
        tied = "head.weight" not in groups.decayed
        # The rows of an untied embedding have gradients in few steps: that of a rare token is large beside its mean.
        self.adamw = [name for name in optimizer.leaves if name != "embed.weight" or tied]
        states = [optimizer.adamw.state[optimizer.leaves[name]] for name in self.adamw]
        self.squares = [_some(state["exp_avg_sq"]) for state in states]
        self.step: Tensor = states[0]["step"]

    def before(self) -> Tensor:
        """What they are."""
        return torch.cat(self.weights).float()

    def figures(self, before: Tensor) -> Tensor:
        """After a step, `FIGURES`: norm of what it moved, and of what they were; of AdamW's g² / v the sum and how many
        there are, of those that ever had a gradient; its steps.

        v is without its bias towards 0 (Wortsman et al. 2023, 2304.13013, section 3.4).
        """
        group, named = self.optimizer.adamw.param_groups[0], self.optimizer.named
        found = [named[name].grad for name in self.adamw]
        gradients = [
            torch.zeros_like(v) if g is None else _some(local(g)) for g, v in zip(found, self.squares, strict=True)
        ]
        v = torch.cat(self.squares).float() / (1 - group["betas"][1] ** self.step)
        ratio = torch.cat(gradients).float().square() / v.clamp_min(group["eps"] ** 2)
        moved = torch.linalg.vector_norm(torch.cat(self.weights).float() - before)
        return torch.stack([moved, torch.linalg.vector_norm(before), ratio.sum(), torch.count_nonzero(v), self.step])


def _some(tensor: Tensor) -> Tensor:
    """Some elements of a contiguous tensor: a view."""
    numel = tensor.numel()
    return tensor.detach().contiguous().as_strided((min(numel, SAMPLE),), (max(1, numel // SAMPLE),))


def gradient_norms(gradients: Sequence[Tensor], parts: Sequence[Sequence[int]] = (), world: World = ALONE) -> Tensor:
    """The global L2 norm, then that of each part (indices into `gradients`; 0 of none), in fp32, on the device.

    `gradients` are this process's parts of them. Row by row in fp32, for rows are never divided, and over the rows in
    fp64: so the norm, and with it the clipped step, is the same to the bit for any number of processes. (Muon turns
    the last bit of a gradient into a digit of bf16.)
    """
    wide = torch.float32 if gradients[0].device.type == "mps" else torch.float64
    rows = [g.flatten(1) if g.ndim > 1 else g.unsqueeze(1) for g in gradients]
    norms = [torch.linalg.vector_norm(row, dim=1, dtype=torch.float32) for row in rows]
    wanted = [norms, *([norms[i] for i in part] for part in parts)]
    found = [
        torch.linalg.vector_norm(torch.cat(some), dtype=wide) if some else norms[0].new_zeros((), dtype=wide)
        for some in wanted
    ]
    total: Tensor = torch.stack(found)
    return (total if world.size == 1 else world.sum(total.square()).sqrt()).float()
