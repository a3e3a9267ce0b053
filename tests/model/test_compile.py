"""torch.compile: one graph a block, without a break, and the gradients of eager mode."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from support import model_config
from torch import Tensor

from lumina.config.resolve import resolve
from lumina.config.schema.model import MoDConfig
from lumina.model.cost import chosen, depth_stages
from lumina.model.transformer import Transformer
from lumina.parallel.world import ALONE
from lumina.training import setup
from lumina.training.precision import Precision


def gradients(model: Transformer, bf16: bool) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 260, (2, 65), generator=g)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, stats = model(ids[:, :-1], torch.zeros(2, 64, dtype=torch.int32), ids[:, 1:], 1e-4)
    (loss.loss + stats.predictor_loss + stats.router_loss).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore")  # the compiler's own, which it hides from users
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_compiled_hybrid_has_no_graph_break_and_the_same_gradients(
    bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("torch._higher_order_ops.wrap"), "callHandlers", said.append)
    options = {"moe.capacity": 0.8, "moe.dropout": 0.2, "moe.z_loss": 1e-3, "moe.balance": 1e-2} if bf16 else {}
    config = model_config("hybrid", layers=1, **{"mod.every": 1, **options})  # routed in depth and in width
    eager, compiled = Transformer(config), Transformer(config)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for block in compiled.units:
        block.recompute = "selective"
        block.compile()  # fullgraph: a break would raise
    tolerance = 2e-2 if bf16 else 1e-5  # fused operations round to bf16 less often
    for want, got in zip(gradients(eager, bf16), gradients(compiled, bf16), strict=True):
        assert (got - want).norm() <= tolerance * want.norm() + 1e-9
    assert not said
    # Evaluation is not compiled, and what was compiled is what trained.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    if bf16:
        return
    for model in (eager, compiled):  # another capacity is another graph, as whole
        model.routers[0].capacity = 0.5
        model.zero_grad()
    for want, got in zip(gradients(eager, bf16), gradients(compiled, bf16), strict=True):
        assert (got - want).norm() <= tolerance * want.norm() + 1e-9
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.filterwarnings("ignore")
def test_layers_share_their_graphs_and_many_capacities_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise depends on the layer, and yet a deep model is few graphs; more of them than the compiler's usual limit."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = resolve(
        "tiny",
        {"model.layers": 10, "model.moe.dropout": 0.2, "model.mod.routing": "random", "train.compile": "on",
         "model.mod.capacity": 0.002, "model.moe.kernel": "grouped"},
    ).config  # fmt: skip
    with torch._dynamo.config.patch(recompile_limit=8):  # puts back what building the model sets
        torch._dynamo.utils.counters.clear()
        model = setup.build_model(config, Precision("fp32", "fp32", "cpu"), ALONE)
        stages = [capacity for capacity, _ in depth_stages(MoDConfig(capacity=0.002, anneal=0.5), 100)]
        assert len(stages) > 8
        for capacity in stages:
            for router in model.routers:
                router.capacity = capacity
            gradients(model, bf16=False)
    sizes = {chosen(capacity, config.model.seq_len) for capacity in stages}
    # One of the blocks that are not routed, and one of those that are for each size, perhaps each capacity.
    assert 1 + len(sizes) <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1 + len(stages)
