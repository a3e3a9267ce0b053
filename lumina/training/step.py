"""One optimizer step, start to end, without waiting for the device.

    `gradients`: micro-batches -> loss sums / tokens of the whole batch -> backward
    `apply`:     guard -> clip -> optimizer -> router state

`gradients` changes nothing but the gradients, so it may be repeated or thrown away; `apply` moves the state, once.
The guard decides on the device: a step whose loss or gradients are not finite moves nothing (weights, moments,
router biases, thresholds), and says so in the metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lumina.data.loader import Batch
from lumina.model.noise import keys
from lumina.model.transformer import RoutingStats, Transformer
from lumina.parallel.world import ALONE, World
from lumina.training import depth, experts
from lumina.training.optim import FIGURES, PARTS, Optimizer, gradient_norms
from lumina.training.precision import Precision

METRICS = (
    "nats", "correct", "count", "square", "grad_norm", *(f"grad_{part}" for part in PARTS), "skipped",
    *FIGURES, "loss_scale",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """The constants of training that a step needs."""

    micro_batches: int  # of each process
    clip: float
    z_loss: float
    bias_rate: float
    world: World = ALONE
    seed: int = 0  # of the noise
    frozen: bool = False  # only adapters learn: router biases and depth thresholds rest
    skip: bool = False  # asked for: the step moves nothing, as if it were not finite


class Sums(NamedTuple):
    """What this process's micro-batches add up to."""

    loss: Tensor  # nats, correct, counted tokens, squares of log Z
    routing: RoutingStats


def train_step(
    model: Transformer,
    optimizer: Optimizer,
    batch: Batch,
    lr: float,
    plan: Step,
    precision: Precision,
    freeze_bias: bool,
    step: int = 0,
) -> Tensor:
    """Takes one step and returns its metrics, a float32 vector on the device: `METRICS`, then `experts.rows` and
    `depth.rows` flat.

    `batch` is the whole batch, in every process; its noise is that of `step`.
    """
    found = gradients(model, optimizer, batch, plan, precision, step)
    return apply(model, optimizer, batch, lr, plan, found, freeze_bias)


def gradients(
    model: Transformer,
    optimizer: Optimizer,
    batch: Batch,
    plan: Step,
    precision: Precision,
    step: int = 0,
    at_most: int | None = None,
) -> Sums:
    """Leaves the gradients of `batch`, or of `at_most` its first micro-batches, in the parameters in place of others.

    Nothing else changes.
    """
    optimizer.zero_grad()
    device, scale = model.embed.weight.device, optimizer.loss_scale
    sums = torch.zeros(4, device=device)
    stats: list[RoutingStats] = []
    tokens = max(1, batch.targets)  # of conversations, a small batch may count none
    for micro in batch.split(plan.world.size)[plan.world.rank].split(plan.micro_batches)[:at_most]:
        micro = micro.to(device)
        with precision.training():
            key_B = keys(plan.seed, step, micro.sample_ids_B)
            loss, routing = model(micro.ids_BS, micro.segments_BS, micro.targets_BS, plan.z_loss, key_B)
        # Sums over the whole batch's tokens, not means of means: any split gives the same gradient.
        total = (loss.loss + routing.predictor_loss) / tokens + routing.router_loss / len(batch.ids_BS)
        (total * scale.scale if scale else total).backward()
        sums += torch.stack([loss.nats, loss.correct, loss.tokens, loss.square])
        stats.append(RoutingStats(*(value.detach() for value in routing)))
    return Sums(sums, RoutingStats(*(torch.stack(values).sum(0) for values in zip(*stats, strict=True))))


def apply(
    model: Transformer,
    optimizer: Optimizer,
    batch: Batch,
    lr: float,
    plan: Step,
    found: Sums,
    freeze_bias: bool = False,
) -> Tensor:
    """Moves weights and routers by the gradients of `batch`, of which `found` are the sums; returns the metrics."""
    sums, routing = _everywhere(*found, plan.world)
    scale = optimizer.loss_scale
    clipped, predictors = (
        optimizer.gradients(group) for group in (optimizer.groups.clipped, optimizer.groups.predictors)
    )
    if scale:
        scale.unscale([*clipped, *predictors])
    norms = optimizer.norms()
    norm = norms[0]
    losses = torch.stack([*sums[:3], routing.predictor_loss, routing.router_loss])
    finite = torch.isfinite(norm) & torch.isfinite(losses).all()
    if predictors:
        finite &= torch.isfinite(gradient_norms(predictors, world=plan.world)).all()
    overflow = (~finite).float()
    if plan.skip:
        finite = torch.zeros_like(finite)
    skip = (~finite).float()
    torch._foreach_mul_(clipped, (plan.clip / (norm + 1e-6)).clamp(max=1.0))
    before = optimizer.sample.before()
    optimizer.step(lr, skip)
    figures = optimizer.sample.figures(before)
    _update_routers(model, routing, finite, plan, 0.0 if freeze_bias else plan.bias_rate, batch)
    used = scale.scale[0].clone() if scale else torch.ones((), device=sums.device)
    if scale:
        scale.update(overflow)
    metrics = torch.cat([sums, norms, skip.view(1), figures, used.view(1)])
    return torch.cat([metrics, experts.rows(model, routing).flatten(), depth.rows(model, routing).flatten()])


def _everywhere(sums: Tensor, routing: RoutingStats, world: World) -> tuple[Tensor, RoutingStats]:
    """The sums over all processes, in one exchange."""
    if world.size == 1:
        return sums, routing
    parts = [sums, *routing]
    total = world.sum(torch.cat([part.flatten() for part in parts]))
    sums, *rest = (t.view_as(part) for t, part in zip(total.split([p.numel() for p in parts]), parts, strict=True))
    return sums, RoutingStats(*rest)


@torch.no_grad()
def _update_routers(
    model: Transformer, routing: RoutingStats, finite: Tensor, plan: Step, rate: float, batch: Batch
) -> None:
    for moe, load_E in zip(model.moes, routing.load_LE, strict=True):
        moe.router.follow(load_E, 0.0 if plan.frozen else rate, finite)  # the balance loss wants the last load anyway
    if plan.frozen:
        return
    sequences = len(batch.ids_BS)
    for router, quantile, threshold in zip(model.routers, routing.quantile_L, routing.threshold_L, strict=True):
        router.follow(quantile / sequences, threshold / sequences, finite)
