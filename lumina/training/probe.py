"""A look from outside, every so many steps: costly signals of a fixed piece of held-out text, without gradient.

It changes nothing, and training does not know of it: a run with probes is the run without them, to the bit.
`churn` is the share of its tokens whose set of experts in a layer is another than at the probe before, among those that
the layer computed both times.

Shapes: L expert layers, T tokens of the text, A active experts.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lumina.data.loader import Batch
from lumina.model.moe import MoE
from lumina.model.router import Routed
from lumina.model.transformer import Block, Transformer
from lumina.training.precision import Precision

UNSEEN, PASSED_BY = -1, -2  # instead of an expert: before the first look; of a token that depth routing left out
TOKENS = 2048  # of the text, or one sequence if that is longer


class Probe:
    """Looks at `model` through `batch`, the same in every process; remembers what it saw last."""

    def __init__(self, model: Transformer, batch: Batch, precision: Precision) -> None:
        self.model, self.precision = model, precision
        self.batch = batch.to(model.embed.weight.device)
        moe = model.config.moe
        shape = (len(model.moes), batch.ids_BS.numel(), moe.top_k if moe else 0)
        self.chosen_LTA = torch.full(shape, UNSEEN, dtype=torch.int32)

    def __call__(self) -> dict[str, Any]:
        """The fields of a `probe` event: causal loss in nats a token, and the churn of each expert layer."""
        seen: list[Tensor] = []

        def watch(block: Block, stack: ExitStack) -> None:
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

        with ExitStack() as stack:
            for block in self.model.units:
                watch(block, stack)
            with self.precision.evaluating():
                loss, _ = self.model.evaluate(self.batch.ids_BS, self.batch.segments_BS, self.batch.targets_BS)
        return {"loss": (loss.nats / loss.tokens).item(), "churn": self._churn(seen)}

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
