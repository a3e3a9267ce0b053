"""What sparsity keeps of dense speed, at benchmark shape P: the four kinds in turns, against their ideals.

    python benchmarks/sparse/run.py [--precision bf16] [--compile] [--seq-len 512] [--rounds 12]

Writes `<date>-<precision>-<eager|compiled>-<seq_len>.md` and `.json` beside itself. Definitions, inside each round:

    keeps            dense step time / MoE step time: equal active FLOPs, AdamW in both
    ideal            dense forward + backward x ratio of counted FLOPs + the kind's own optimizer
    router share     layers x (an expert layer - the same with sorted rows and no router) / MoE step
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lumina.bench import harness, report, speed
from lumina.bench.harness import TOTAL, Arm, Measurement, Parts, Ratio, Run, Watch
from lumina.config.schema.config import Config
from lumina.model.feedforward import swiglu
from lumina.model.grouped import grouped_linear
from lumina.model.moe import MoE
from lumina.training.precision import DTYPES, Precision

LAYER, EXPERTS = "expert layer", "experts alone"
HERE = Path(__file__).parent


def layers(config: Config) -> list[Arm]:
    """One expert layer, forward and backward, as it is; and its products alone, on rows that are sorted already."""
    moe, width, seq_len = config.model.moe, config.model.width, config.model.seq_len
    assert moe is not None
    micro, precision = int(config.train.micro_batch), Precision.of(config.precision, config.parallel.device)
    rows = micro * seq_len * moe.top_k

    def build(alone: bool) -> Run:
        layer = MoE(width, moe).to(config.parallel.device)
        layer.router.reset()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        x = torch.randn(rows, width, generator=generator).to(config.parallel.device).requires_grad_()
        x_BSD = x.detach()[: micro * seq_len].view(micro, seq_len, width).requires_grad_()
        key_BS = torch.zeros(micro, seq_len, dtype=torch.int64, device=x.device)
        offs = (torch.arange(1, moe.experts + 1, device=x.device) * rows // moe.experts).int()

        def run() -> Parts:
            watch = Watch(config.parallel.device)
            layer.zero_grad()
            with precision.training():
                if alone:
                    h = swiglu(grouped_linear(x, layer.w_gate_up, offs, layer.kernel))
                    y = grouped_linear(h, layer.w_down, offs, layer.kernel)
                else:
                    y = layer(x_BSD, key_BS)[0]
            y.backward(torch.ones_like(y))
            watch(TOTAL)
            return {TOTAL: watch.parts[TOTAL]}

        return run

    return [Arm(LAYER, lambda: build(False), rows, "row"), Arm(EXPERTS, lambda: build(True), rows, "row")]


def of_ideal(measured: Measurement, kind: str) -> tuple[Ratio, float]:
    """Ideal over measured step time, and the median ideal in seconds."""
    flops = {arm.name: arm.flops for arm in measured.arms}
    ratio = flops[kind] / flops["dense"]
    dense = measured.seconds["dense"][speed.FORWARD_BACKWARD]
    own = measured.seconds[kind]
    ideal = [ratio * d + o for d, o in zip(dense, own[speed.OPTIMIZER], strict=True)]
    found = harness.interval([i / t for i, t in zip(ideal, own[TOTAL], strict=True)])
    return found, harness.interval(ideal).median


def router_share(measured: Measurement, config: Config) -> Ratio:
    micro_batches = speed.SEQUENCES // int(config.train.micro_batch)
    times = (measured.seconds[name][TOTAL] for name in (LAYER, EXPERTS, "moe"))
    calls = config.model.layers * micro_batches
    return harness.interval([calls * (layer - alone) / step for layer, alone, step in zip(*times, strict=True)])


def bars(measured: Measurement, config: Config) -> list[str]:
    """Each bar with what was measured."""
    rows = [
        ("MoE keeps of dense, step", measured.ratio("dense", "moe"), 0.85, ""),
        ("MoE keeps of dense, forward + backward", measured.ratio("dense", "moe", speed.FORWARD_BACKWARD), 0.0, ""),
        ("MoE keeps of dense with Muon, step", measured.ratio("dense, Muon", "moe, Muon"), 0.0, ""),
    ]
    for kind, bar in (("mod", 0.9), ("hybrid", 0.85)):
        found, ideal = of_ideal(measured, kind)
        rows.append((f"{kind} of its ideal", found, bar, f"ideal {1e3 * ideal:.0f} ms"))
    lines = ["| what | measured | bar | |", "| --- | ---: | ---: | --- |"]
    for what, found, bar, note in rows:
        verdict = ("met" if found.median >= bar else "missed") if bar else "printed"
        lines.append(
            f"| {what} | {report.between(found, 100, ' %')} | {f'{bar:.0%}' if bar else '-'} | {verdict} {note} |"
        )
    if any(arm.name == LAYER for arm in measured.arms):
        share = router_share(measured, config)
        verdict = "met" if share.median <= 0.08 else "missed"
        lines.append(f"| router and dispatch of a MoE step | {report.between(share, 100, ' %')} | <= 8% | {verdict} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args(arguments)
    mode = "compiled" if options.compile else "eager"
    keys = {"precision.mode": options.precision, "train.compile": "on" if options.compile else "off"}
    adamw, muon = ({**keys, "train.optimizer": name} for name in ("adamw", "muon"))
    config = speed.configure("moe", options.seq_len, adamw)
    arms = speed.suite(seq_len=options.seq_len, keys=adamw)
    arms += speed.suite(("dense", "moe"), options.seq_len, muon, ", Muon")
    if not options.compile:  # a layer by itself is not what a compiled block fuses
        arms += layers(config)
    measured = harness.measure(
        arms, options.rounds, device=config.parallel.device, dtype=DTYPES[options.precision], settings=keys
    )
    title = f"Sparse layers at shape P: {options.precision}, {mode}, {options.seq_len} tokens a sequence"
    parts = (speed.FORWARD_BACKWARD, speed.OPTIMIZER)
    page = report.markdown(title, {"Times": (measured, "dense", parts)})
    page += "\n".join(["", "## Bars", "", *bars(measured, config), ""])
    name = f"{time.strftime('%Y-%m-%d')}-{options.precision}-{mode}-{options.seq_len}"
    print(page)
    report.write(HERE, name, page, {title: measured})


if __name__ == "__main__":
    main()
