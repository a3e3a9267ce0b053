"""Held-out quality, measured the way the model will be used: causal routing, every held-out token once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lumina.data.loader import Batch, Heldout
from lumina.model.mod import DepthRouter
from lumina.model.transformer import Transformer
from lumina.parallel.world import ALONE, World
from lumina.progress import Tell, silent, tracked
from lumina.training.precision import Precision

LARGEST_LOSS = 709.0  # nats; of a larger one the perplexity is no float64


class Realised(NamedTuple):
    """One way to choose: loss in nats a token, the shares of each sequence that routed blocks computed, and on how many
    tokens it agrees with the top C of the same input (a share)."""

    loss: float
    mean: float
    p99: float
    agree: float


@dataclass(frozen=True)
class Evaluation:
    """`loss` in nats per token; `bpb` = nats over all held-out tokens / (ln 2 · bytes of held-out text).

    `mod_capacity` is the share of tokens that each routed block really took, in order of depth; the evaluation is
    `comparable` if each lies within [c/2, 2c] of the trained capacity c, and that does not still fall (`mod.anneal`).
    """

    loss: float
    ppl: float
    acc: float
    bpb: float
    heldout_tokens: int
    mod_capacity: list[float]
    comparable: bool

    def fields(self) -> dict[str, object]:
        return asdict(self)


def evaluate(
    model: Transformer,
    batches: Heldout | Sequence[Batch],
    text_bytes: int,
    precision: Precision,
    capacity: float | None,
    world: World = ALONE,
    progress: Tell = silent,
) -> Evaluation:
    """Evaluates all of `batches`, which hold `text_bytes` of text. `capacity` is the trained share c, if any.

    Several processes take turns at the batches. One that has none left repeats the first, for the others need its
    part of the model; it counts only once.
    """
    device = model.embed.weight.device
    sums = torch.zeros(4, dtype=torch.float64)
    taken = torch.zeros(len(model.routers))
    turns = range(0, len(batches), world.size)
    for first in tracked(turns, "evaluating", len(turns), progress):
        counts = first + world.rank < len(batches)
        batch = batches[first + world.rank if counts else 0].to(device)
        with precision.evaluating():
            loss, taken_L = model.evaluate(batch.ids_BS, batch.segments_BS, batch.targets_BS)
        if counts:
            counted = torch.stack([loss.nats, loss.correct, loss.tokens]).tolist()
            sums += torch.tensor([*counted, batch.ids_BS.numel()], dtype=torch.float64)
            taken += taken_L.cpu()
    nats, correct, count, positions = world.sum(sums).tolist()
    shares = [t / positions for t in world.sum(taken).tolist()]
    return Evaluation(
        loss=nats / count,
        ppl=math.inf if nats / count > LARGEST_LOSS else math.exp(nats / count),
        acc=correct / count,
        bpb=nats / (math.log(2) * text_bytes),
        heldout_tokens=int(count),
        mod_capacity=[round(share, 4) for share in shares],
        comparable=capacity is None or all(capacity / 2 <= share <= 2 * capacity for share in shares),
    )


@torch.no_grad()
def routing_gap(model: Transformer, batches: Heldout | Sequence[Batch], precision: Precision) -> dict[str, Realised]:
    """The same text under the choice of training (`top`, which looks ahead) and under both causal rules.

    What training does and writing cannot, and what that is worth: `top` is no loss of a model that writes.
    """
    if not model.routers or model.routers[0].routing != "learned":
        raise ValueError("a model that does not learn to choose tokens has no gap")
    device, found = model.embed.weight.device, {}
    usual = model.routers[0].rule
    agreed: list[float] = []

    def compare(router: nn.Module, inputs: tuple[Tensor, Tensor], choice: tuple[Tensor, Tensor]) -> None:
        assert isinstance(router, DepthRouter)
        agreed.append((choice[0] == router.top(choice[1])).float().mean().item())

    hooks = [router.register_forward_hook(compare) for router in model.routers]
    try:
        for rule in ("top", "predictor", "threshold"):
            for router in model.routers:
                router.rule = rule
            nats = tokens = 0.0
            agreed.clear()
            shares: list[float] = []
            for i in range(len(batches)):
                for sequence in batches[i].split(len(batches[i].ids_BS)):
                    one = sequence.to(device)
                    with precision.evaluating():
                        loss, taken_L = model.evaluate(one.ids_BS, one.segments_BS, one.targets_BS)
                    shares += (taken_L / one.ids_BS.numel()).tolist()
                    nats, tokens = nats + loss.nats.item(), tokens + loss.tokens.item()
            shares.sort()
            p99 = shares[min(len(shares) - 1, math.ceil(0.99 * len(shares)) - 1)]
            found[rule] = Realised(nats / tokens, sum(shares) / len(shares), p99, sum(agreed) / len(agreed))
    finally:  # `top` looks ahead
        for hook in hooks:
            hook.remove()
        for router in model.routers:
            router.rule = usual
    return found
