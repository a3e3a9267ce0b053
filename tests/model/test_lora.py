"""Adapters: nothing at first, the merged formula's gradients later, and whatever is not an adapter rests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import KINDS, model_config, settings
from torch import Tensor

from lumina.config.resolve import read, resolve
from lumina.config.schema.train import LoraConfig
from lumina.data.loader import Batch
from lumina.errors import UserError
from lumina.inference.engine import load
from lumina.model import head, lora
from lumina.model.cost import count, state_bytes
from lumina.model.init import name_seed
from lumina.model.transformer import Transformer
from lumina.parallel.world import World
from lumina.training import setup
from lumina.training.optim import Optimizer, gradient_norms
from lumina.training.precision import Precision
from lumina.training.step import METRICS, Step, train_step
from lumina.training.trainer import Trainer

RANK, ALPHA = 3, 12.0
LORA = LoraConfig(rank=RANK, alpha=ALPHA)
FP32, BF16 = Precision("fp32", "fp32", "cpu"), Precision("bf16", "bf16", "cpu")
STATISTIC = "router.fraction_E"  # of the last batch, which the balance loss needs: not a weight of the model
SHARED = {"moe.shared": 1, "moe.balance": 0.1}


def batch(seed: int = 0) -> Batch:
    ids = torch.randint(0, 260, (4, 65), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.zeros(4, 64).int(), torch.arange(4))


def adapted(kind: str = "dense", learned: bool = True, **changes: Any) -> Transformer:
    """A model whose adapters, once `learned`, add something to every part."""
    model = Transformer(model_config(kind, **changes), lora=LORA)
    if learned:
        generator = torch.Generator().manual_seed(1)
        for _, _, adapter in lora.adapters(model):
            adapter.b.data = torch.randn(adapter.b.shape, generator=generator) * 0.1
    return model


def backward(model: Transformer, precision: Precision = FP32) -> dict[str, Tensor | None]:
    data = batch()
    with precision.training():
        loss, stats = model(data.ids_BS, data.segments_BS, data.targets_BS, 1e-4)
    (loss.loss + stats.predictor_loss + stats.router_loss).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_leave_every_logit_and_without_them_nothing_is_new(kind: str) -> None:
    plain, zero = Transformer(model_config(kind)), Transformer(model_config(kind), lora=LoraConfig(rank=0, alpha=1))
    model = adapted(kind, learned=False)
    assert same(plain.tensors(), zero.tensors())
    assert same(plain.tensors(), model.base_tensors())
    assert torch.equal(plain.logits(batch().ids_BS), model.logits(batch().ids_BS))
    assert not torch.equal(plain.logits(batch().ids_BS), adapted(kind).logits(batch().ids_BS))
    assert all(p.requires_grad for p in zero.parameters())


def test_every_named_part_of_a_dense_model_is_adapted_and_drawn_by_its_name() -> None:
    model = adapted(learned=False, layers=1)
    D, F_, KV = model.config.width, model.config.ffn, model.config.kv_heads * model.config.head_dim
    Q = model.config.heads * model.config.head_dim
    shapes = {(name, part): (a.a.shape[1], a.b.shape[0]) for name, part, a in lora.adapters(model)}
    attn, ffn = "blocks.0.attn", "blocks.0.ffn"
    assert shapes == {
        (attn, "q"): (D, Q), (attn, "k"): (D, KV), (attn, "v"): (D, KV), (attn, "o"): (Q, D),
        (ffn, "gate"): (D, F_), (ffn, "up"): (D, F_), (ffn, "down"): (F_, D),
    }  # fmt: skip
    name = "blocks.0.attn.lora.q.a"
    torch.manual_seed(0)
    drawn = torch.empty(256, D)
    torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
    a = dict(model.named_parameters())[name]
    generator = torch.Generator().manual_seed(name_seed(0, name))
    assert torch.equal(a.detach(), (2 * torch.rand(RANK, D, generator=generator) - 1) / math.sqrt(D))
    assert drawn.abs().max().item() == pytest.approx(1 / math.sqrt(D), rel=0.05)
    assert a.std().item() == pytest.approx(drawn.std().item(), rel=0.2)
    assert not torch.equal(a, dict(model.named_parameters())["blocks.0.attn.lora.k.a"])
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith(".b"))


def test_experts_routers_and_the_rest_are_not() -> None:
    parts = {(name.partition(".ffn")[1:], part) for name, part, _ in lora.adapters(adapted("moe", **SHARED))}
    attention = {(("", ""), part) for part in "qkvo"}
    assert parts == attention | {((".ffn", ".shared"), part) for part in ("gate", "up", "down")}
    assert {part for _, part, _ in lora.adapters(adapted("moe"))} == set("qkvo")


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_part_is_its_own_rows(part: str) -> None:
    """Of three different adapters each moves its rows of the fused output, and no other's."""
    attention = adapted(learned=False).units[0].attn
    assert attention.lora is not None
    x = torch.randn(2, 5, attention.w_qkv.shape[1], generator=torch.Generator().manual_seed(0))
    before = attention.linear(x, "w_qkv")
    adapter = attention.lora[part]
    adapter.b.data.fill_(0.5)
    moved = (attention.linear(x, "w_qkv") - before).split(attention.splits, dim=-1)
    for name, got in zip("qkv", moved, strict=True):
        expected = ALPHA / RANK * (x @ adapter.a.T) @ adapter.b.T if name == part else torch.zeros_like(got)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def explicit(model: Transformer, plain: Transformer, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `plain` as those of `model` with W + (alpha / rank) B A written out, from `leaves`."""
    weights = {name: p.detach() for name, p in plain.named_parameters()}
    for layer in {named.layer for named in lora.adapters(model)}:
        for weight, parts in {"w_qkv": "q k v", "w_out": "o", "w_gate_up": "gate up", "w_down": "down"}.items():
            if f"{layer}.lora.{parts.split()[0]}.a" not in leaves:
                continue
            rows = [leaves[f"{layer}.lora.{p}.b"] @ leaves[f"{layer}.lora.{p}.a"] for p in parts.split()]
            weights[f"{layer}.{weight}"] = weights[f"{layer}.{weight}"] + ALPHA / RANK * torch.cat(rows)
    return weights


@pytest.mark.parametrize(("kind", "changes"), [("dense", {}), ("moe", SHARED), ("mod", {}), ("hybrid", SHARED)])
def test_gradients_are_those_of_the_merged_formula(kind: str, changes: dict[str, Any]) -> None:
    model, plain = adapted(kind, **changes), Transformer(model_config(kind, **changes))
    got = backward(model)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    data = batch()
    arguments = (data.ids_BS, data.segments_BS, data.targets_BS, 1e-4)
    loss, stats = torch.func.functional_call(plain, explicit(model, plain, leaves), arguments)
    (loss.loss + stats.predictor_loss + stats.router_loss).backward()
    assert {name for name, g in got.items() if g is not None} == leaves.keys()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert (got[name] - leaf.grad).norm() < 1e-4 * leaf.grad.norm(), name


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_gradients_are_equal(mode: str) -> None:
    want, model = backward(adapted("hybrid", **SHARED)), adapted("hybrid", **SHARED)
    for block in model.units:
        block.recompute = mode
    got = backward(model)
    assert all(torch.equal(got[name], g) for name, g in want.items() if g is not None)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_compiled_block_is_one_graph_with_the_same_gradients(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"layers": 1, "mod.every": 1, **SHARED}
    eager, compiled = adapted("hybrid", **shape), adapted("hybrid", **shape)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled.units[0].recompute = "selective"
    compiled.units[0].run = torch.compile(compiled.units[0]._train, fullgraph=True, dynamic=False, backend="aot_eager")
    want, got = backward(eager, precision), backward(compiled, precision)
    tolerance = 2e-2 if precision is BF16 else 1e-5
    for name, gradient in want.items():
        other = got[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            assert (other - gradient).norm() <= tolerance * gradient.norm() + 1e-9, name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(("kind", "changes"), [("dense", {}), ("moe", SHARED), ("mod", {}), ("hybrid", SHARED)])
def test_steps_move_the_adapters_alone(kind: str, changes: dict[str, Any], optimizer: str) -> None:
    model = adapted(kind, learned=False, **changes)
    train = resolve("tiny", {"train.optimizer": optimizer}).config.train
    moved = Optimizer(model, train)
    base = {name: tensor.clone() for name, tensor in model.base_tensors().items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    plan = Step(2, clip=1e9, z_loss=1e-4, bias_rate=0.1, frozen=True)
    for i in range(2):
        metrics = train_step(model, moved, batch(i), 1e-2, plan, FP32, freeze_bias=False, step=i)
    told = dict(zip(METRICS, metrics.tolist(), strict=False))
    assert told["skipped"] == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert told["grad_norm"] == pytest.approx(gradient_norms(gradients)[0].item(), rel=1e-6)
    for name, tensor in model.base_tensors().items():
        assert name.endswith(STATISTIC) or torch.equal(tensor, base[name]), name
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (lora.MARK in name)
        if name in before:
            assert not torch.equal(parameter, before[name]), name
        else:
            assert parameter.grad is None, name
    assert {name.rpartition(".")[0] for name in moved.tensors()} == before.keys()
    assert moved.groups.decayed.keys() == before.keys()


def test_a_frozen_head_forms_no_gradient_of_its_weight() -> None:
    """Neither is the memory taken nor the product done; the gradient that goes on is the same."""
    generator = torch.Generator().manual_seed(0)
    h, target = torch.randn(1, 6, 8, generator=generator), torch.tensor([[0, 3, -1, 2, 4, 1]])
    found = []
    for learns in (True, False):
        module = head.Head(8, 5)
        module.weight.data = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
        module.weight.requires_grad_(learns)
        x = h.clone().requires_grad_()
        loss = module(x, target, 1e-3).loss
        saved = [t for t in loss.grad_fn.saved_tensors if t is not None]
        assert [tuple(t.shape) for t in saved] == ([(6, 8), (5, 8)] if learns else [(6, 8)])
        loss.backward()
        assert (module.weight.grad is not None) == learns
        found.append(x.grad)
    assert torch.equal(*found)


def test_frozen_experts_form_no_gradient_of_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("nobody asked for it")

    monkeypatch.setattr("lumina.model.grouped._cpu_weights", refuse)
    backward(adapted("moe", **{"moe.kernel": "grouped"}))
    with pytest.raises(AssertionError, match="nobody asked"):
        backward(Transformer(model_config("moe", **{"moe.kernel": "grouped"})))


@pytest.mark.parametrize(("kind", "changes"), [("dense", {}), ("moe", SHARED), ("mod", {}), ("hybrid", SHARED)])
def test_merged_is_the_same_function_without_adapters(kind: str, changes: dict[str, Any]) -> None:
    model, plain = adapted(kind, **changes), Transformer(model_config(kind, **changes))
    before = model.logits(batch().ids_BS)
    lora.merge(model)
    torch.testing.assert_close(model.logits(batch().ids_BS), before, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain.logits(batch().ids_BS), before, atol=1e-3)
    assert [*model.tensors()] == [*plain.tensors()]
    assert not lora.adapters(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("kind", "changes"), [("dense", {}), ("moe", SHARED), ("hybrid", {"moe.dense_layers": 1})])
def test_costs_are_counted(kind: str, changes: dict[str, Any]) -> None:
    config = model_config(kind, **changes)
    model = Transformer(config, lora=LORA)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted, plain = count(config, rank=RANK), count(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.total - plain.total == learning == counted.active - plain.active
    assert state_bytes(config, "muon", "fp32", RANK) == (
        type(state_bytes(config, "muon", "fp32"))(4 * counted.total, 4 * learning, 8 * learning)
    )
    if kind == "dense":  # a third of a frozen product is saved, and an adapter costs what every trained matrix does
        assert plain.flops_per_token - counted.flops_per_token == 2 * plain.active - 6 * learning


def test_a_built_model_is_frozen_and_several_processes_are_refused() -> None:
    config = resolve("tiny", {"train.lora.rank": RANK, "train.compile": "off"}).config
    model = setup.build_model(config, FP32, World())
    assert {lora.MARK in name for name, p in model.named_parameters() if p.requires_grad} == {True}
    assert lora.adapters(model)
    with pytest.raises(UserError, match="by one process, not 2"):
        setup._require_alone(config, World(size=2))


def test_bf16_adapters_are_computed_as_the_weights_are() -> None:
    model = adapted("dense")
    attention = model.units[0].attn
    x = torch.randn(1, 4, model.config.width)
    with BF16.training():
        y = attention.linear(x, "w_out") if attention.w_out.shape[1] == x.shape[-1] else attention.linear(x, "w_qkv")
    assert y.dtype == torch.bfloat16
    model.cast(torch.bfloat16)
    before = model.logits(batch().ids_BS)
    lora.merge(model)
    assert attention.w_qkv.dtype == torch.bfloat16
    assert F.cosine_similarity(model.logits(batch().ids_BS).flatten(), before.flatten(), dim=0) > 0.999


def test_a_run_leaves_router_biases_and_depth_thresholds_alone(tmp_path: Path) -> None:
    """As `setup` puts it together: what training without adapters moves is what it began with."""
    keys = settings(tmp_path, "hybrid") | {"train.steps": 2, "train.lora.rank": RANK, "train.seed": 0}
    run = Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    trained, fresh = load(run).transformer, Transformer(read(run.config).config.model)
    base = fresh.tensors()
    for name, tensor in trained.base_tensors().items():
        assert name.endswith(STATISTIC) or torch.equal(tensor, base[name]), name
    assert all(named.adapter.b.any() for named in lora.adapters(trained))
