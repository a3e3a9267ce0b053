"""A look from outside, every so many steps: costly signals of a fixed piece of held-out text, without gradient.

It changes nothing, and training does not know of it: a run with probes is the run without them, to the bit.
The *golden batch* is one of the training side, read afresh through the loader at each look: its loss leaves that of the
held-out text where what is read is not what is meant (targets that are shifted, tokens of another tokenizer).
`churn` is the share of the tokens whose set of experts in a layer is another than at the probe before, among those that
the layer computed both times.

Shapes: L expert layers, T tokens of the text, A active experts; B, S, N, H, G, K as in
`model.attention`, X queries at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lumina.data.loader import Batch
from lumina.model.attention import Attention, rotate
from lumina.model.mod import DepthRouter
from lumina.model.moe import MoE
from lumina.model.router import Routed
from lumina.model.transformer import Block, Transformer
from lumina.orchestrator.protocol import Look
from lumina.training.precision import Precision

UNSEEN, PASSED_BY = -1, -2  # instead of an expert: before the first look; of a token that depth routing left out
TOKENS = 2048  # of the text, or one sequence if that is longer
LOGITS = 2**22  # attention logits computed at once: 16 MiB
ATTENDED = 4  # sequences whose attention logits are computed: theirs are like the others'


@dataclass(frozen=True)
class Seen:
    """What one look saw: losses in nats a token, the largest attention logit of each block, churn of each expert layer
    (None at the first look, and without experts), agreement of the causal depth rule with the top C."""

    loss: float
    golden: float
    attention: list[float]
    churn: list[float | None] | None
    agree: float | None

    def fields(self) -> dict[str, Any]:
        """Of a `probe` event."""
        return vars(self) | {"attention": [round(logit, 3) for logit in self.attention]}

    def look(self, step: int, broken: tuple[str, ...]) -> Look:
        churn = tuple(self.churn or ())
        return Look(step, self.loss, self.golden, max(self.attention), churn, self.agree, broken)


class Probe:
    """Looks at `model` through `batch`, the same in every process; remembers what it saw last."""

    def __init__(self, model: Transformer, batch: Batch, precision: Precision) -> None:
        self.model, self.precision = model, precision
        self.batch = batch.to(model.embed.weight.device)
        moe = model.config.moe
        shape = (len(model.moes), batch.ids_BS.numel(), moe.top_k if moe else 0)
        self.chosen_LTA = torch.full(shape, UNSEEN, dtype=torch.int32)

    def __call__(self, golden: Batch) -> Seen:
        """`golden` is read afresh; as many of its sequences are computed as of the text."""
        chosen: list[Tensor] = []
        logits: list[float] = []
        agreed: list[float] = []
        with ExitStack() as stack:
            for block in self.model.units:
                _watch_experts(block, stack, chosen)
                _watch_attention(block.attn, stack, logits)
                if block.router is not None and block.router.routing == "learned":
                    stack.callback(block.router.register_forward_hook(_comparing(agreed)).remove)
            loss = self.heldout()
        agree = round(sum(agreed) / len(agreed), 5) if agreed else None
        return Seen(loss, self._loss(golden), logits, self._churn(chosen), agree)

    def heldout(self) -> float:
        """Causal loss of the held-out text, nats a token; nothing is remembered."""
        return self._loss(self.batch)

    def attention(self) -> list[float]:
        """The largest attention logit of each block on the held-out text; nothing is remembered."""
        logits: list[float] = []
        with ExitStack() as stack:
            for block in self.model.units:
                _watch_attention(block.attn, stack, logits)
            self.heldout()
        return logits

    def _loss(self, batch: Batch) -> float:
        rows = len(self.batch.ids_BS)
        ids, segments, targets = (
            part[:rows].to(self.batch.ids_BS.device) for part in (batch.ids_BS, batch.segments_BS, batch.targets_BS)
        )
        with self.precision.evaluating():
            loss, _ = self.model.evaluate(ids, segments, targets)
        return (loss.nats / loss.tokens).item()

    def _churn(self, seen: list[Tensor]) -> list[float | None] | None:
        """One share a layer, None where no token was computed twice; None at the first look, and without experts."""
        if not seen:
            return None
        now_LTA = torch.stack(seen).int().cpu()
        first = bool((self.chosen_LTA == UNSEEN).all())
        both_LT = (now_LTA >= 0).all(-1) & (self.chosen_LTA >= 0).all(-1)
        moved_LT = (now_LTA != self.chosen_LTA).any(-1) & both_LT
        self.chosen_LTA.copy_(now_LTA)
        counted = zip(moved_LT.sum(1).tolist(), both_LT.sum(1).tolist(), strict=True)
        return None if first else [round(moved / both, 5) if both else None for moved, both in counted]

    def tensors(self) -> dict[str, Tensor]:
        """What it remembers, for the checkpoint; loading writes into it in place."""
        return {"probe.chosen": self.chosen_LTA} if self.chosen_LTA.numel() else {}


def _watch_experts(block: Block, stack: ExitStack, seen: list[Tensor]) -> None:
    """Appends which experts the block's tokens take, `[T, A]`, in order; `PASSED_BY` of those it leaves out."""
    keep_BS: Tensor | None = None

    def remember(_: nn.Module, arguments: Any, routed: Routed) -> None:
        expert_BSA = routed.expert_BSA.sort(-1).values
        if keep_BS is not None:
            expert_BSA = expert_BSA.masked_fill(~keep_BS.unsqueeze(-1), PASSED_BY)
        seen.append(expert_BSA.flatten(0, 1))

    def keep(_: nn.Module, arguments: Any, choice: tuple[Tensor, Tensor]) -> None:
        nonlocal keep_BS
        keep_BS = choice[0]

    if isinstance(block.ffn, MoE):
        stack.callback(block.ffn.router.register_forward_hook(remember).remove)
        if block.router is not None:
            stack.callback(block.router.register_forward_hook(keep).remove)


def _watch_attention(attn: Attention, stack: ExitStack, found: list[float]) -> None:
    """Appends the largest logit that a query of this layer has for a key it may see."""
    parts: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, arguments, normed: parts.__setitem__(name, normed)

    def compute(_: nn.Module, arguments: Any, output: Tensor) -> None:
        _, rope, mask_B1SN, *_ = arguments
        q_BSHK, k_BSGK = (rotate(parts.pop(name)[:ATTENDED], *(table[:ATTENDED] for table in rope)) for name in "qk")
        found.append(largest_logit(q_BSHK, k_BSGK, mask_B1SN[:ATTENDED]))

    stack.callback(attn.q_norm.register_forward_hook(remember("q")).remove)
    stack.callback(attn.k_norm.register_forward_hook(remember("k")).remove)
    stack.callback(attn.register_forward_hook(compute).remove)


@torch.no_grad()
def largest_logit(q_BSHK: Tensor, k_BSGK: Tensor, mask_B1SN: Tensor) -> float:
    """max of q·k / sqrt(K) over the pairs that the mask lets see each other, in fp32, `LOGITS` at a time."""
    B, S, H, K = q_BSHK.shape
    k_BHKN = k_BSGK.repeat_interleave(H // k_BSGK.shape[2], 2).permute(0, 2, 3, 1).float()
    q_BHSK = q_BSHK.transpose(1, 2).float() * K**-0.5
    sequences = max(1, LOGITS // (H * S * S))
    queries = S if sequences > 1 else max(1, LOGITS // (H * S))
    largest = []
    for b in range(0, B, sequences):
        for s in range(0, S, queries):
            logit_BHXN = q_BHSK[b : b + sequences, :, s : s + queries] @ k_BHKN[b : b + sequences]
            seen_B1XN = mask_B1SN[b : b + sequences, :, s : s + queries]
            largest.append(logit_BHXN.masked_fill_(~seen_B1XN, -torch.inf).amax())
    return torch.stack(largest).amax().item()


def _comparing(agreed: list[float]) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor]], None]:
    """Appends on which share of the tokens the causal depth rule takes the top C."""

    def compare(router: nn.Module, arguments: Any, choice: tuple[Tensor, Tensor]) -> None:
        assert isinstance(router, DepthRouter)
        agreed.append((choice[0] == router.top(choice[1])).float().mean().item())

    return compare
