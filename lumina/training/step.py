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
from lumina.training.optim import Optimizer, gradient_norm
from lumina.training.precision import Precision

METRICS = ("nats", "correct", "count", "grad_norm", "skipped", "balance", "agreement", "loss_scale")


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

    loss: Tensor  # nats, correct, counted tokens
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
    sums = torch.zeros(3, device=device)
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
        sums += torch.stack([loss.nats, loss.correct, loss.tokens])
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
    norm = gradient_norm(clipped, plan.world)
    losses = torch.stack([*sums, routing.predictor_loss, routing.router_loss])
    finite = torch.isfinite(norm) & torch.isfinite(losses).all()
    if predictors:
        finite &= torch.isfinite(gradient_norm(predictors, plan.world))
    if plan.skip:
        finite = torch.zeros_like(finite)
    skip = (~finite).float()
    torch._foreach_mul_(clipped, (plan.clip / (norm + 1e-6)).clamp(max=1.0))
    optimizer.step(lr, skip)
    _update_routers(model, routing, finite, plan, 0.0 if freeze_bias else plan.bias_rate, batch)
    used = scale.scale[0].clone() if scale else torch.ones((), device=sums.device)
    if scale:
        scale.update(skip)
    metrics = torch.stack([*sums, norm, skip, *_routing_metrics(model, routing), used])
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


def _routing_metrics(model: Transformer, routing: RoutingStats) -> list[Tensor]:
    """Largest over mean expert load (mean over layers), and how often the causal depth rule and the choice agree."""
    load_LE = routing.load_LE
    one = torch.ones((), device=routing.predictor_loss.device)
    balance = agreement = one
    if len(load_LE):
        active = torch.stack([moe.router.active_E.sum() for moe in model.moes])
        balance = (load_LE.amax(1) / load_LE.sum(1) * active).mean()
    if len(routing.depth_LX):
        agreement = depth.share(routing.depth_LX, "agreement")
    return [balance, agreement]
