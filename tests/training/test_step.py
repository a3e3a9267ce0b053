"""One step: any split into micro-batches gives the same gradient, and a broken batch moves nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support import KINDS, model_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lumina.config.resolve import resolve
from lumina.data.loader import Batch
from lumina.model.mod import SUMS
from lumina.model.transformer import Transformer
from lumina.training.optim import Optimizer
from lumina.training.precision import LossScale, Precision
from lumina.training.step import METRICS, Step, train_step

FP32 = Precision("fp32", "fp32", "cpu")


def batch(sequences: int = 8, seed: int = 0) -> Batch:
    """Random tokens in two documents; part of the targets is not counted, unevenly over the sequences."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 260, (sequences, 64), generator=generator)
    targets = ids.roll(-1, 1).clone()
    targets[0, :50] = -1
    segments = (torch.arange(64) > 20).int().expand(sequences, 64).contiguous()
    return Batch(ids, targets, segments, torch.arange(sequences))


EVERYTHING = {
    "moe.score": "softmax", "moe.balance": 0.3, "moe.seq_balance": 0.2, "moe.z_loss": 0.1, "moe.dropout": 0.3,
    "moe.capacity": 0.9, "moe.spare": 1, "moe.temperature": 0.5, "mod.routing": "random",
}  # fmt: skip


def take_step(
    kind: str, micro_batches: int, data: Batch, frozen: bool = False, **options: object
) -> tuple[Transformer, Optimizer, dict[str, float]]:
    model = Transformer(model_config(kind, **options))
    for moe in model.moes:  # as after a step that was not balanced
        moe.router.fraction_E.copy_(moe.router.active_E * torch.arange(1, 1 + len(moe.router.active_E)) / 10)
    with torch.no_grad():
        for router in model.routers:  # at its prior the bias's gradient is zero but for rounding
            router.predictor.bias.add_(0.5)
    optimizer = Optimizer(model, resolve("tiny").config.train)
    plan = Step(micro_batches, clip=1e9, z_loss=1e-3, bias_rate=0.01)
    metrics = train_step(model, optimizer, data, 1e-3, plan, FP32, freeze_bias=frozen)
    rows = {f"row {i}": value for i, value in enumerate(metrics.tolist()[len(METRICS) :])}
    return model, optimizer, dict(zip(METRICS, metrics.tolist(), strict=False)) | rows


@pytest.mark.parametrize(
    ("kind", "options"), [*((kind, {}) for kind in KINDS), ("hybrid", EVERYTHING)], ids=[*KINDS, "every option"]
)
def test_one_batch_of_eight_equals_eight_of_one(kind: str, options: dict[str, object]) -> None:
    whole, _, a = take_step(kind, 1, batch(), **options)
    split, _, b = take_step(kind, 8, batch(), **options)
    for (name, p), q in zip(whole.named_parameters(), split.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        difference = (p.grad - q.grad).norm() / p.grad.norm().clamp_min(1e-12)
        assert difference < 1e-5, name
    assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    values, tokens = list(a.values()), 8.0 * 64
    if whole.routers:  # the last rows are of depth: every token once, and the thresholds as the step left them
        width = len(SUMS) + 2
        for router, end in zip(reversed(whole.routers), range(len(values), 0, -width), strict=False):
            row = dict(zip(SUMS, values[end - width : end - 2], strict=True))
            assert row["tokens"] == tokens
            assert row["chosen"] == tokens / 4
            assert values[end - 2 : end] == [router.quantile.item(), router.threshold.item()]
    if whole.moes:  # the first are of experts: every assignment once
        slots = len(whole.moes[0].router.active_E)
        assert sum(values[len(METRICS) : len(METRICS) + slots]) == 2 * tokens
    for x, y in zip(whole.buffers(), split.buffers(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_finite_moves_nothing_and_says_so(kind: str) -> None:
    model = Transformer(model_config(kind))
    optimizer = Optimizer(model, resolve("tiny").config.train)
    plan = Step(2, clip=1.0, z_loss=0.0, bias_rate=0.01)
    train_step(model, optimizer, batch(), 1e-3, plan, FP32, freeze_bias=False)
    with torch.no_grad():
        healthy = model.norm.weight.clone()
        model.norm.weight[0] = float("inf")
    before = {name: tensor.clone() for name, tensor in (model.tensors() | optimizer.tensors()).items()}
    metrics = train_step(model, optimizer, batch(seed=1), 1e-3, plan, FP32, freeze_bias=False)
    after = model.tensors() | optimizer.tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert dict(zip(METRICS, metrics.tolist(), strict=False))["skipped"] == 1
    assert optimizer.steps_taken == 1
    with torch.no_grad():
        model.norm.weight.copy_(healthy)
    metrics = train_step(model, optimizer, batch(seed=1), 1e-3, plan, FP32, freeze_bias=False)
    assert dict(zip(METRICS, metrics.tolist(), strict=False))["skipped"] == 0
    assert optimizer.steps_taken == 2


def test_a_predictor_gradient_that_is_not_finite_moves_nothing() -> None:
    """It is outside the norm that is clipped, and its loss can be finite all the same."""
    model = Transformer(model_config("mod"))
    optimizer = Optimizer(model, resolve("tiny").config.train)
    model.routers[0].predictor.w_out.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: tensor.clone() for name, tensor in (model.tensors() | optimizer.tensors()).items()}
    metrics = train_step(model, optimizer, batch(), 1e-3, Step(1, 1.0, 0.0, 0.0), FP32, freeze_bias=False)
    told = dict(zip(METRICS, metrics.tolist(), strict=False))
    assert told["skipped"] == 1
    assert torch.tensor([told["grad_norm"], told["nats"]]).isfinite().all()
    after = model.tensors() | optimizer.tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_bias_moves_towards_balance_and_freezes() -> None:
    model, _, _ = take_step("moe", 1, batch())
    fresh = Transformer(model_config("moe"))
    _, routing = fresh(batch().ids_BS, batch().segments_BS, batch().targets_BS)
    for moe, load_E in zip(model.moes, routing.load_LE, strict=True):
        assert torch.equal(moe.router.bias_E, 0.01 * torch.sign(load_E.mean() - load_E))
    frozen, _, _ = take_step("moe", 1, batch(), frozen=True)
    assert all((moe.router.bias_E == 0).all() for moe in frozen.moes)


def test_clipping_bounds_the_gradient_and_reports_it_unclipped() -> None:
    norms = []
    for clip in (1e9, 0.01):
        model = Transformer(model_config("dense"))
        optimizer = Optimizer(model, resolve("tiny").config.train)
        metrics = train_step(model, optimizer, batch(), 1e-3, Step(1, clip, 0.0, 0.0), FP32, freeze_bias=False)
        norms.append(metrics[METRICS.index("grad_norm")].item())
        actual = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
        assert actual == pytest.approx(min(clip, norms[-1]), rel=1e-3)
    assert norms[0] == norms[1]


def test_bf16_trains_on_fp32_weights() -> None:
    model = Transformer(model_config("hybrid"))
    optimizer = Optimizer(model, resolve("tiny").config.train)
    train_step(
        model, optimizer, batch(), 1e-3, Step(1, 1.0, 0.0, 0.0), Precision("bf16", "bf16", "cpu"), freeze_bias=False
    )
    assert all(p.dtype == torch.float32 and p.grad is not None for p in model.parameters())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_scaled_losses_give_the_gradients_of_unscaled_ones() -> None:
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    for mode in ("fp32", "fp16"):
        model = Transformer(model_config("hybrid"))
        with torch.no_grad():
            for router in model.routers:
                router.predictor.bias.add_(0.5)
        scale = LossScale("cpu") if mode == "fp16" else None
        optimizer = Optimizer(model, resolve("tiny").config.train, loss_scale=scale)
        metrics = train_step(
            # In this batch no near-tie of the depth router falls differently in fp16.
            model,
            optimizer,
            batch(seed=1),
            1e-3,
            Step(2, 1e9, 1e-3, 0.0),
            Precision(mode, mode, "cpu"),
            freeze_bias=False,
        )
        assert dict(zip(METRICS, metrics.tolist(), strict=False))["loss_scale"] == (2.0**16 if scale else 1.0)
        gradients[mode] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, want in gradients["fp32"].items():
        assert (gradients["fp16"][name] - want).norm() <= 0.05 * want.norm(), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a_step_reads_no_value_from_the_device(optimizer: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values cannot be asked for one: what reads a value, outside our own operators, raises here."""
    monkeypatch.setattr(Batch, "targets", 512)  # read on the host, before the batch moves
    options = {**EVERYTHING, "mod.routing": "learned"}
    for kernel in ("grouped", "loop"):
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = Transformer(model_config("hybrid", **options, **{"moe.kernel": kernel}))
            config = resolve("tiny", {"train.optimizer": optimizer}).config.train
            scale = LossScale("cpu") if mode == "fp16" else None
            ids = torch.zeros(8, 64, dtype=torch.int64)
            data, plan = Batch(ids, ids, ids.int(), torch.arange(8)), Step(2, 1.0, 1e-3, 1e-2)
            step = partial(train_step, model, Optimizer(model, config, loss_scale=scale), data, 1e-3, plan)
            if kernel == "grouped":
                assert len(step(Precision(mode, mode, "cpu"), freeze_bias=False)) > len(METRICS)
                continue
            with pytest.raises(DataDependentOutputException):  # as it says
                step(Precision(mode, mode, "cpu"), freeze_bias=False)
