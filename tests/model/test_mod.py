"""Mixture of Depths: exact capacity, bit-identical bypass, causal decoding (science: Raposo et al. 2404.02258)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import model_config
from torch.utils.flop_counter import FlopCounterMode

from lumina.config.schema.model import MoDConfig
from lumina.model import moe
from lumina.model.mod import SUMS, DepthRouter, Selection, put, take
from lumina.model.noise import fold
from lumina.model.transformer import Block, Transformer, View, document_mask


def batch(model: Transformer, sequences: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab, (sequences, model.config.seq_len), generator=generator)
    return ids, torch.zeros_like(ids), ids.roll(-1, 1)


def depth_router(width: int, capacity: float, **options: Any) -> DepthRouter:
    return DepthRouter(width, MoDConfig(capacity=capacity, **options))


def select(router: DepthRouter, x: torch.Tensor) -> Selection:
    position = torch.arange(x.shape[1]).expand(x.shape[:2])
    return router.select(x, position, fold(torch.arange(len(x)).unsqueeze(1), position))


def spread(model: Transformer, seed: int = 1) -> None:
    """Makes routers and predictors disagree about tokens, as they do after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in model.routers:
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * 5)
            for parameter in (router.predictor.w_in, router.predictor.w_out):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def whole_view(model: Transformer) -> View:
    """Of one sequence that is one document."""
    position, segments = torch.arange(model.config.seq_len).unsqueeze(0), torch.zeros(1, model.config.seq_len)
    rope = model.cos_SK.unsqueeze(0), model.sin_SK.unsqueeze(0)
    return View(position, segments, rope, document_mask(position, segments), position)


@pytest.mark.parametrize(("capacity", "tokens"), [(0.125, 3), (0.25, 5), (0.3, 6), (0.35, 7), (1.0, 20)])
def test_selects_exactly_c_tokens_in_order_ties_included(capacity: float, tokens: int) -> None:
    router = depth_router(16, capacity)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()  # every score ties
    router.reset()
    chosen = select(router, torch.randn(3, 20, 16))
    assert chosen.index_BC.shape == (3, tokens)
    assert (chosen.index_BC.diff(dim=1) > 0).all()


def test_before_any_data_no_token_exceeds_the_threshold_in_any_format() -> None:
    """The bias is rounded to its format; a threshold that is not would lie below it, and take every token."""
    for dtype in (torch.float32, torch.bfloat16):
        model = Transformer(model_config("mod", capacity=0.3))
        model.cast(dtype)
        model.initialize(0)
        for router in model.routers:
            keep_BS, _ = router(torch.randn(2, 8, model.config.width, dtype=dtype), torch.arange(8).expand(2, 8))
            assert not keep_BS.any()


def test_bypassed_rows_are_bit_identical() -> None:
    x = torch.randn(2, 10, 8)
    x[0, 3] = -0.0
    index = torch.tensor([[1, 4, 9], [0, 2, 3]])
    y = put(x, index, take(x, index) + 1)
    bypassed = torch.ones(2, 10, dtype=torch.bool).scatter_(1, index, False)
    assert torch.equal(y[bypassed].view(torch.int32), x[bypassed].view(torch.int32))
    assert not torch.equal(y[~bypassed], x[~bypassed])


@pytest.mark.parametrize("kind", ["mod", "hybrid"])
def test_the_training_forward_is_the_definition(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen tokens are the top C; the others pass bit by bit; and the chosen ones are computed as in the
    parallel form, which never gathers them: all rows, with the rows that were not chosen invisible."""
    model = Transformer(model_config(kind))
    spread(model)
    ids, _, targets = batch(model)
    segments = (torch.arange(ids.shape[1]) > 20).long().expand_as(ids)
    routed: list[torch.Tensor] = []

    def checked_put(x: torch.Tensor, index: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result, router = put(x, index, y), model.routers[len(routed)]
        keep = torch.zeros(x.shape[:2], dtype=torch.bool).scatter_(1, index, True)
        for score, row in zip((x @ router.weight).tolist(), keep, strict=True):
            best = sorted(range(len(score)), key=lambda s: (-score[s], s))[: math.ceil(0.25 * len(score))]
            assert sorted(best) == row.nonzero().flatten().tolist()
        assert torch.equal(result[~keep].view(torch.int32), x[~keep].view(torch.int32))
        assert (result[keep] != x[keep]).any(dim=-1).all()
        routed.append(keep)
        return result

    monkeypatch.setattr("lumina.model.transformer.put", checked_put)
    trained = model(ids, segments, targets)[0].nats
    assert len(routed) == len(model.routers) > 0
    monkeypatch.setattr(DepthRouter, "forward", lambda self, x, _: (routed[model.routers.index(self)], self.score(x)))
    parallel = model.evaluate(ids, segments, targets)[0].nats
    torch.testing.assert_close(trained, parallel, rtol=1e-6, atol=0)


def test_full_capacity_with_weight_one_is_the_dense_model() -> None:
    routed = Transformer(model_config("mod", capacity=1.0))
    dense = Transformer(model_config("dense"))
    dense.load_state_dict({k: v for k, v in routed.state_dict().items() if ".router." not in k})
    ids, segments, targets = batch(routed)
    for router in routed.routers:
        router.score = lambda x: torch.ones(x.shape[:2])  # type: ignore[method-assign]
    torch.testing.assert_close(
        routed(ids, segments, targets)[0].nats, dense(ids, segments, targets)[0].nats, rtol=1e-6, atol=0
    )


def test_router_learns_through_the_selected_tokens_only() -> None:
    model = Transformer(model_config("mod"))
    spread(model)  # at its initial zero output a predictor would pass no gradient on, detached or not
    ids, segments, targets = batch(model)
    loss, stats = model(ids, segments, targets)
    loss.loss.backward(retain_graph=True)
    router = model.routers[0]
    assert router.weight.grad is not None
    assert router.weight.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in router.predictor.parameters())
    model.zero_grad()
    stats.predictor_loss.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched
    assert all(".predictor." in name for name in touched)


def test_the_router_gradient_is_the_finite_difference_and_comes_from_selected_tokens_alone() -> None:
    model = Transformer(model_config("mod", layers=2)).double()
    spread(model)
    block, view = model.units[1].double(), whole_view(model)
    router = block.router
    assert router is not None
    S, width = model.config.seq_len, model.config.width
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 1, S, width, generator=generator, dtype=torch.float64).unbind(0)

    def loss() -> torch.Tensor:
        return (block(x, view)[0] * weight).sum()

    loss().backward()
    assert router.weight.grad is not None
    direction = router.weight.grad / router.weight.grad.norm()
    chosen_before = router.select(x, view.position_BS, view.key_BS).index_BC
    with torch.no_grad():
        start, step = router.weight.clone(), 1e-3  # r is computed in fp32
        ends = []
        for sign in (1, -1):
            router.weight.copy_(start + sign * step * direction)
            assert torch.equal(router.select(x, view.position_BS, view.key_BS).index_BC, chosen_before)
            ends.append(loss().item())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(router.weight.grad.norm().item(), rel=1e-3)

    x = torch.randn(1, 12, model.config.width, requires_grad=True)
    single = depth_router(model.config.width, 0.25)
    torch.nn.init.normal_(single.weight)
    for parameter in single.predictor.parameters():
        torch.nn.init.zeros_(parameter)
    single.reset()
    chosen = select(single, x)
    chosen.weight_BC.sum().backward()
    assert x.grad is not None
    touched = x.grad.abs().sum(-1)[0].nonzero().flatten().tolist()
    assert touched == chosen.index_BC[0].tolist()


def test_a_router_that_says_zero_makes_its_block_the_identity() -> None:
    model = Transformer(model_config("mod", layers=2))
    block = model.units[1]
    assert block.router is not None
    torch.nn.init.zeros_(block.router.weight)
    x = torch.randn(2, 64, model.config.width)
    position = torch.arange(64).expand(2, 64)
    mask = document_mask(position, torch.zeros_like(position))
    y, _ = block(x, View(position, torch.zeros_like(position), model._rope(position), mask, position))
    assert torch.equal(y, x)


def test_a_bypassed_token_changes_no_selected_token() -> None:
    router = depth_router(8, 0.5)
    with torch.no_grad():
        router.weight.copy_(torch.eye(8)[0])
        for parameter in router.predictor.parameters():
            parameter.zero_()
    router.reset()
    x = torch.randn(1, 10, 8)
    changed = x.clone()
    outside = [s for s in range(10) if s not in select(router, x).index_BC[0].tolist()]
    changed[0, outside, 1:] += 1.0  # the router sees only the first feature
    first, second = select(router, x), select(router, changed)
    assert torch.equal(first.index_BC, second.index_BC)
    assert torch.equal(take(x, first.index_BC), take(changed, second.index_BC))


@pytest.mark.parametrize("kind", ["mod", "hybrid"])
def test_a_block_shows_a_bypassed_token_to_no_selected_one(kind: str) -> None:
    model = Transformer(model_config(kind))
    spread(model)
    block = next(block for block in model.units if block.router is not None)
    assert block.router is not None
    with torch.no_grad():
        block.router.weight[1:] = 0  # sees only the first feature
    S, width = model.config.seq_len, model.config.width
    view = whole_view(model)
    position = view.position_BS
    x = torch.randn(1, S, width, generator=torch.Generator().manual_seed(0))
    selected = block.router.select(x, position, position).index_BC[0].tolist()
    outside = [s for s in range(S) if s not in selected]
    changed = x.clone()
    changed[0, outside, 1:] += 1.0
    before, after = block(x, view)[0], block(changed, view)[0]
    assert torch.equal(before[0, selected], after[0, selected])
    assert torch.equal(after[0, outside], changed[0, outside])
    assert (before[0, selected] != x[0, selected]).any(-1).all()


def test_threshold_is_a_mean_then_a_moving_average_and_ignores_skipped_steps() -> None:
    router = depth_router(8, 0.25)
    router.reset()
    live, skipped = torch.tensor(True), torch.tensor(False)
    router.follow(torch.tensor(float("nan")), torch.tensor(float("nan")) + 1, skipped)
    assert router.steps.item() == 0
    assert router.quantile.item() == pytest.approx(math.log(0.25 / 0.75))
    for value, expected in ((2.0, 2.0), (3.0, 2.5), (7.0, 4.0)):
        router.follow(torch.tensor(value), torch.tensor(value) + 1, live)
        assert router.quantile.item() == pytest.approx(expected)
        assert router.threshold.item() == pytest.approx(expected + 1)
    router.follow(torch.tensor(float("nan")), torch.tensor(float("nan")) + 1, skipped)
    assert router.quantile.item() == pytest.approx(4.0)
    router.steps.fill_(1000)
    router.follow(torch.tensor(5.0), torch.tensor(5.0) + 1, live)
    assert router.quantile.item() == pytest.approx(4.1)


RULES = [{}, {"mod.decode": "threshold"}, {"mod.routing": "random"}, {"mod.routing": "static"}]


@pytest.mark.parametrize("options", RULES, ids=lambda options: "-".join(options.values()) or "predictor")
def test_decode_rule_takes_about_c_of_the_tokens_it_was_seeded_with(options: dict[str, str]) -> None:
    model = Transformer(model_config("mod", **options))
    spread(model)
    ids, segments, targets = batch(model, sequences=8)
    _, stats = model(ids, segments, targets)
    for router, quantile, threshold in zip(model.routers, stats.quantile_L, stats.threshold_L, strict=True):
        router.follow(quantile / len(ids), threshold / len(ids), torch.tensor(True))
    _, taken_L = model.evaluate(ids, segments, targets)
    share = (taken_L / ids.numel()).tolist()
    assert all(0.12 < s < 0.5 for s in share), share


def test_ablations_choose_without_looking_and_exactly_c() -> None:
    x, other = torch.randn(2, 2, 20, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    position = torch.arange(20)
    for routing in ("random", "static"):
        router, deeper = (DepthRouter(16, MoDConfig(capacity=0.35, routing=routing), 20, n) for n in (0, 1))
        for one in (router, deeper):
            torch.nn.init.normal_(one.weight)
            torch.nn.init.normal_(one.predictor.w_in)
            one.predictor.w_out.data.zero_()
            one.reset()
        index = select(router, x).index_BC
        assert index.shape == (2, 7)
        assert torch.equal(index, select(router, other).index_BC)
        assert torch.equal(select(router, x).weight_BC, router.score(x).gather(1, index))  # r still scales
        if routing == "static":
            assert index[0].diff().unique().tolist() == [2, 3] or index[0].diff().max() <= 3
            keep, _ = router(x, position.expand(2, 20))
            assert keep.sum(1).tolist() == [7, 7]
        else:
            assert not torch.equal(index[0], index[1])
            assert not torch.equal(index, select(deeper, x).index_BC)
            keep, _ = router(torch.zeros(1, 4096, 16), torch.arange(4096).unsqueeze(0))
            assert keep.float().mean().item() == pytest.approx(0.35, abs=0.03)


@pytest.mark.parametrize("kind", ["dense", "moe", "mod", "hybrid"])
def test_the_future_changes_no_past_output_in_decode_mode(kind: str) -> None:
    model = Transformer(model_config(kind))
    spread(model)
    ids, _, _ = batch(model, sequences=1)
    cut = 30
    changed = ids.clone()
    changed[:, cut:] = (changed[:, cut:] + 7) % model.config.vocab
    torch.testing.assert_close(model.logits(ids)[:, :cut], model.logits(changed)[:, :cut], rtol=0, atol=1e-5)
    assert not torch.allclose(model.logits(ids)[:, cut:], model.logits(changed)[:, cut:], atol=1e-3)


def test_the_predictor_learns_the_choice_and_not_its_opposite() -> None:
    router = depth_router(16, 0.25)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
        router.weight[0] = 1.0
    router.reset()
    x = torch.randn(4, 40, 16, generator=torch.Generator().manual_seed(0))
    score = router.score(x)
    cut = score.sort(dim=1, descending=True).values[:, 9:11].mean(1, keepdim=True)
    results = []
    for sign in (1.0, -1.0):
        router.predictor.forward = lambda _, sign=sign: 1e3 * sign * (score - cut)  # type: ignore[method-assign]
        router.quantile.zero_()
        results.append(select(router, x))
    right, wrong = results
    told, opposite = (dict(zip(SUMS, one.sums_X.tolist(), strict=True)) for one in results)
    assert told["agreement"] == told["tokens"] == x.shape[0] * x.shape[1]
    assert told["taken"] == told["chosen"] == 40
    assert opposite["agreement"] == 0
    assert right.predictor_loss < 1e-2 * wrong.predictor_loss


def test_statistics_are_those_counted_by_hand() -> None:
    router = depth_router(16, 0.25).requires_grad_(False)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    router.reset()
    router.quantile.fill_(0.5)
    x = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(0))
    selected, logit, r = select(router, x), router.predictor(x), router.score(x)
    target = torch.zeros(3, 20).scatter(1, selected.index_BC, 1.0)
    want = {
        "tokens": 60,
        "chosen": 15,
        "agreement": ((logit > 0.5).float() == target).sum(),
        "taken": (logit > 0.5).sum(),
        "nats": torch.nn.functional.binary_cross_entropy_with_logits(logit, target, reduction="sum"),
        "square": r.square().sum(),
        "position": (selected.index_BC / 19).sum(),
    }
    for name, value in zip(SUMS, selected.sums_X.tolist(), strict=True):
        assert value == pytest.approx(float(want[name]), rel=1e-5), name


def test_a_router_that_takes_all_teaches_its_predictor_nothing_and_writes_with_nearly_all() -> None:
    """The beginning of `mod.anneal`: targets without zeros would drive the logits up for ever."""
    model = Transformer(model_config("mod", capacity=0.25))
    spread(model)
    ids, segments, targets = batch(model)
    for router in model.routers:
        router.capacity = 1.0
    _, stats = model(ids, segments, targets)
    stats.predictor_loss.backward()
    assert all(
        not p.grad.any() for router in model.routers for p in router.predictor.parameters() if p.grad is not None
    )
    for router, quantile, threshold in zip(model.routers, stats.quantile_L, stats.threshold_L, strict=True):
        router.follow(quantile / len(ids), threshold / len(ids), torch.tensor(True))
    _, taken_L = model.evaluate(ids, segments, targets)
    assert (taken_L >= 0.97 * ids.numel()).all()


def test_a_routed_block_computes_only_the_chosen_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is real: rows that enter blocks, and rows that enter the experts inside them."""
    model = Transformer(model_config("hybrid"))
    ids, segments, targets = batch(model)
    rows: list[int] = []
    expert_rows: list[int] = []
    branch, grouped = Block.branch, moe.grouped_linear

    def counted_branch(self: Block, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        rows.append(x.shape[1])
        return branch(self, x, *rest, **named)

    def counted_grouped(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        expert_rows.append(len(x))
        return grouped(x, *rest)

    monkeypatch.setattr(Block, "branch", counted_branch)
    monkeypatch.setattr(moe, "grouped_linear", counted_grouped)
    model(ids, segments, targets)
    S, config = ids.shape[1], model.config
    assert config.mod is not None
    assert config.moe is not None
    assert rows == [S if block.router is None else math.ceil(config.mod.capacity * S) for block in model.units]
    assert expert_rows == [len(ids) * n * config.moe.top_k for n in rows for _ in range(2)]


def test_torch_counts_the_flops_that_are_promised() -> None:
    """Alternate blocks at c = 1/8: 0.5625 of the matrix products and 0.508 of the attention of the dense blocks."""
    flops = {}
    for kind in ("dense", "mod"):
        # The head is small and the sequence long, so that the blocks are what counts.
        options = {"capacity": 0.125} if kind == "mod" else {}
        model = Transformer(model_config(kind, seq_len=256, **options))
        ids, segments, targets = batch(model)
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(ids, segments, targets)
        by_op = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        config = model.config
        head = 3 * 2 * ids.numel() * config.width * config.vocab  # logits and both gradients
        hidden = config.width // 4
        predictors = len(model.routers) * 2 * ids.numel() * (config.width * hidden + hidden + config.width)
        flops[kind] = by_op["aten.mm"] + by_op.get("aten.mv", 0) - head - predictors, by_op["aten.bmm"]
    products, scores = (mod / dense for mod, dense in zip(flops["mod"], flops["dense"], strict=True))
    assert products == pytest.approx(0.5625, abs=2e-3)
    assert scores == pytest.approx((1 + 1 / 64) / 2, abs=2e-3)
