"""torch.compile: one graph a block, without a break, and the gradients of eager mode."""

from __future__ import annotations

import pytest
import torch
from support import model_config
from torch import Tensor

from lumina.model.transformer import Transformer


def gradients(model: Transformer) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 260, (2, 65), generator=g)
    loss, stats = model(ids[:, :-1], torch.zeros(2, 64, dtype=torch.int32), ids[:, 1:], 1e-4)
    (loss.loss + stats.predictor_loss).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore")  # the compiler's own, which it hides from users
def test_a_compiled_hybrid_has_no_graph_break_and_the_same_gradients() -> None:
    config = model_config("hybrid", layers=1, **{"mod.every": 1})  # routed in depth and in width
    eager, compiled = Transformer(config), Transformer(config)
    torch.compiler.reset()
    for block in compiled.units:
        block.recompute = "selective"
        block.compile()  # fullgraph: a break would raise
    for want, got in zip(gradients(eager), gradients(compiled), strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm() + 1e-9
    # Evaluation is not compiled, and what was compiled is what trained.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
