"""What sparsity keeps of dense speed at shape P, against the bars we set ourselves, and where a step's time goes.

    keeps            dense step time / MoE step time: equal active FLOPs, the same optimizer
    ideal            dense forward + backward x ratio of counted FLOPs + the kind's own optimizer
    router share     layers x (an expert layer - the same products on rows that are sorted already) / MoE step
    floor            counted FLOPs at the matmul rate, optimizer bytes at the copy rate

Ratios are medians over the rounds of what was found inside a round; floors are of median rates and times. A bar is met
where the whole interval is on its side.

Shapes: B sequences, S tokens, D width, R rows (token, expert).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lumina.bench import harness, report, speed
from lumina.bench.harness import COPY, MATMUL, TOTAL, Arm, Measurement, Ratio, Run
from lumina.config.schema.config import Config
from lumina.config.schema.model import KINDS
from lumina.model.attention import Attention, rope_table
from lumina.model.feedforward import FeedForward, swiglu
from lumina.model.grouped import grouped_linear
from lumina.model.head import Head
from lumina.model.moe import MoE
from lumina.model.transformer import document_mask
from lumina.training.precision import Precision

MUON = ", Muon"
LAYER, EXPERTS = "expert layer", "experts alone"
ATTENTION, NETWORK, HEAD = "attention", "dense network", "head and loss"
DEPTHS = (1.0, 0.5, 0.25)  # besides 0.125, which is shape P's
MOE_BAR, MOD_BAR, HYBRID_BAR, ROUTER_BAR = 0.85, 0.9, 0.85, 0.08
# AdamW's passes over memory as large as the parameters: it reads weights, gradients and two moments, and writes all but
# the gradients.
ADAMW_PASSES = 7
# A layer, what is done with its input, and the input's shape.
Made = tuple[nn.Module, Callable[[Tensor], Tensor], tuple[int, ...]]


def suite(
    seq_len: int, keys: Mapping[str, Any], muon: bool = False, parts: bool = False, depths: bool = False
) -> list[Arm]:
    """The four kinds under AdamW; dense and MoE under Muon; one layer of each sort; MoD at other capacities."""
    adamw = {**keys, "train.optimizer": "adamw"}
    arms = speed.suite(KINDS, seq_len, adamw)
    if muon:
        arms += speed.suite(("dense", "moe"), seq_len, {**keys, "train.optimizer": "muon"}, MUON)
    if depths:
        arms += [speed.arm(depth(c), "mod", seq_len, {**adamw, "model.mod.capacity": c}) for c in DEPTHS]
    if parts and adamw.get("train.compile") != "on":  # a layer by itself is not what a compiled block fuses
        arms += layers(speed.configure("moe", seq_len, adamw))
    return arms


def depth(capacity: float) -> str:
    """The arm's name of MoD at this capacity."""
    return f"mod, c {capacity:g}"


def layers(config: Config) -> list[Arm]:
    """One layer of each sort, forward and backward, on one micro-batch in the training's format."""
    model, moe = config.model, config.model.moe
    assert moe is not None
    B, S, D = int(config.train.micro_batch), model.seq_len, model.width
    device, precision = config.parallel.device, Precision.of(config.precision, config.parallel.device)
    rows = B * S * moe.top_k
    generator = torch.Generator().manual_seed(0)

    def drawn(layer: nn.Module) -> nn.Module:
        layer.to(device)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.data = parameter.data.to(precision.weights)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        return layer

    def arm(name: str, make: Callable[[], Made], work: float, dtype: torch.dtype = precision.weights) -> Arm:
        """`dtype` is that of the input: the residual stream's, or that of products."""

        def build() -> Run:
            layer, forward, shape = make()
            x = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

            def run() -> None:
                layer.zero_grad()
                x.grad = None
                with precision.training():
                    y = forward(x)
                y.backward(torch.ones_like(y))

            return harness.timed(run, device)

        return Arm(name, build, B * S, "row", 6.0 * work)

    def attention() -> Made:
        layer = drawn(Attention(D, model.heads, model.kv_heads, model.head_dim))
        position_BS = torch.arange(S, device=device).expand(B, S)
        rope = [t.to(device).expand(B, -1, -1) for t in rope_table(S, model.head_dim, model.rope_theta)]
        mask = document_mask(position_BS, torch.zeros_like(position_BS))
        return layer, lambda x: layer(x, (rope[0], rope[1]), mask), (B, S, D)

    def network() -> Made:
        layer = drawn(FeedForward(D, moe.top_k * moe.ffn))
        return layer, layer, (B, S, D)

    def experts() -> Made:
        layer = drawn(MoE(D, moe))
        assert isinstance(layer, MoE)
        layer.router.reset()
        key_BS = torch.zeros(B, S, dtype=torch.int64, device=device)
        return layer, lambda x: layer(x, key_BS)[0], (B, S, D)

    def alone() -> Made:
        layer = drawn(MoE(D, moe))
        assert isinstance(layer, MoE)
        offs_E = (torch.arange(1, moe.experts + 1, device=device) * rows // moe.experts).int()

        def multiply(x_RD: Tensor) -> Tensor:
            h_RF = swiglu(grouped_linear(x_RD, layer.w_gate_up, offs_E, layer.kernel))
            return grouped_linear(h_RF, layer.w_down, offs_E, layer.kernel)

        return layer, multiply, (rows, D)

    def head() -> Made:
        layer = drawn(Head(D, model.vocab))
        targets = torch.randint(0, model.vocab, (B, S), generator=generator).to(device)
        return layer, lambda x: layer(x, targets, 0.0).loss, (B, S, D)

    projections = D * model.head_dim * 2 * (model.heads + model.kv_heads)
    products = 3 * D * moe.top_k * moe.ffn
    return [
        arm(ATTENTION, attention, B * S * (projections + model.heads * model.head_dim * S)),
        arm(NETWORK, network, B * S * products),
        arm(LAYER, experts, B * S * (products + D * moe.experts)),
        arm(EXPERTS, alone, B * S * products, precision.dtype),
        arm(HEAD, head, B * S * D * model.vocab),
    ]


# -- what is read from the times --------------------------------------------------------------------------------


def of_ideal(measured: Measurement, arm: str) -> tuple[Ratio, float]:
    """Ideal over measured step time, and the median ideal in seconds."""
    flops = {one.name: one.flops for one in measured.arms}
    ratio = flops[arm] / flops["dense"]
    dense, own = measured.seconds["dense"][speed.FORWARD_BACKWARD], measured.seconds[arm]
    ideal = [ratio * d + o for d, o in zip(dense, own[speed.OPTIMIZER], strict=True)]
    found = harness.interval([i / t for i, t in zip(ideal, own[TOTAL], strict=True)])
    return found, harness.interval(ideal).median


def router_share(measured: Measurement, config: Config) -> Ratio:
    """Of a MoE step: what its expert layers take beyond their products."""
    times = (measured.seconds[name][TOTAL] for name in (LAYER, EXPERTS, "moe"))
    calls = _calls(config)
    return harness.interval([calls * (layer - alone) / step for layer, alone, step in zip(*times, strict=True)])


def bars(measured: Measurement, config: Config) -> list[list[str]]:
    """Each bar, what was measured, and whether it is met."""
    names = {arm.name for arm in measured.arms}
    part = speed.FORWARD_BACKWARD
    table = [
        _bar("MoE keeps of dense, step", measured.ratio("dense", "moe"), MOE_BAR),
        _bar("MoE keeps of dense, forward + backward", measured.ratio("dense", "moe", part)),
    ]
    if "moe" + MUON in names:
        table.append(_bar("MoE keeps of dense under Muon, step", measured.ratio("dense" + MUON, "moe" + MUON)))
    for arm, bar in (("mod", MOD_BAR), ("hybrid", HYBRID_BAR), *((depth(c), None) for c in DEPTHS)):
        if arm in names:
            found, ideal = of_ideal(measured, arm)
            table.append(_bar(f"{arm} of its ideal, {1e3 * ideal:.0f} ms", found, bar))
    if LAYER in names:
        table.append(_bar("router and dispatch of a MoE step", router_share(measured, config), ROUTER_BAR, most=True))
    return table


def floors(measured: Measurement, config: Config) -> list[list[str]]:
    """For each arm under AdamW its floor, what it took, and the gap; layers as often as a step has them."""
    table, size = [], Precision.of(config.precision, config.parallel.device).weights.itemsize
    for arm in measured.arms:
        if arm.name in (MATMUL, COPY) or arm.name.endswith(MUON):  # whose products are not counted
            continue
        single = arm.unit == "row"
        calls = 1 if not single else _calls(config) // (config.model.layers if arm.name == HEAD else 1)
        matmul, copy = measured.rate(MATMUL), measured.rate(COPY)
        products = calls * arm.flops / matmul
        memory = 0.0 if single else ADAMW_PASSES * size * arm.facts["total"] / copy
        took = calls * measured.median(arm.name)
        name = f"{calls} x {arm.name}" if single else arm.name
        cells = (products, memory, took, took - products - memory)
        table.append([name, *(f"{1e3 * seconds:.0f}" for seconds in cells), f"{(products + memory) / took:.0%}"])
    return table


def page(title: str, measured: Measurement, config: Config) -> str:
    """The whole report in Markdown."""
    parts = (speed.FORWARD_BACKWARD, speed.OPTIMIZER)
    text = report.markdown(title, {"Times": (measured, "dense", parts)})
    text += report.table("Bars", ["what", "measured", "bar", ""], bars(measured, config))
    header = ["step, or its layers", "FLOPs at the matmul rate, ms", "optimizer bytes at the copy rate, ms", "took, ms"]
    return text + report.table("Floors", [*header, "gap, ms", "floor / took"], floors(measured, config))


def _bar(what: str, found: Ratio, bar: float | None = None, most: bool = False) -> list[str]:
    measured = report.between(found, 100, " %")
    if bar is None:
        return [what, measured, "-", "printed"]
    sure = found.high <= bar if most else found.low >= bar
    likely = found.median <= bar if most else found.median >= bar
    verdict = "met" if sure else "median met, interval not" if likely else "missed"
    return [what, measured, f"{'<=' if most else '>='} {bar:.0%}", verdict]


def _calls(config: Config) -> int:
    """How often a step computes one layer of each block."""
    return config.model.layers * (speed.SEQUENCES // int(config.train.micro_batch))
