"""Forecast times: against what was measured and published, and never independent of what is computed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from support import KINDS

from lumina.bench.speed import OF_KIND, SHAPE
from lumina.config.resolve import presets, resolve
from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.planner import choices, time
from lumina.planner.hardware import CPU, Device, Fleet, parse_gpus
from lumina.planner.laws import Interval

H200 = parse_gpus("H200")
# Milliseconds a step on an H200, Muon, 2026-11-26 (benchmarks/planner): shape P, 4,096 tokens, eager; and 125M active,
# 8,192 tokens, compiled.
MEASURED = {"dense": 33.2, "moe": 56.1, "mod": 42.7, "hybrid": 61.9}
MEASURED_125M = {"dense": 40.5, "moe": 87.2, "mod": 51.5}
SHAPE_125M = {
    "model.width": 768, "model.layers": 12, "model.heads": 12, "model.kv_heads": 4, "model.head_dim": 64,
    "model.vocab": 32768, "model.tied": False, "model.seq_len": 1024, "train.batch_tokens": 8192, "train.compile": "on",
}  # fmt: skip
FFN_125M = {"dense": {"model.ffn": 2048}, "mod": {"model.ffn": 2048, "model.mod.capacity": 0.125},
            "moe": {"model.moe.experts": 16, "model.moe.top_k": 2, "model.moe.ffn": 1024}}  # fmt: skip
# llm-foundry 8c8dd48, scripts/train/benchmarking, MPT at 2,048 tokens: layers, width, tokens a batch, micro-batch,
# tokens a second.
PUBLISHED = {
    ("1b", "8xH100"): (24, 2048, 229376, 14, 363645),
    ("7b", "8xH100"): (32, 4096, 98304, 6, 85144),
    ("1b", "8xA100"): (24, 2048, 917504, 14, 164109),
    ("7b", "8xA100"): (32, 4096, 196608, 6, 37130),
    ("1b", "64xH100"): (24, 2048, 2621440, 20, 2841754),
    ("13b", "64xH100"): (40, 5120, 262144, 2, 307209),
    ("7b", "128xH100"): (32, 4096, 1572864, 6, 1340830),
}


def settled(source: str, fleet: Fleet, **keys: Any) -> Config:
    return choices.settled(resolve(source, keys).config, fleet)


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_model_on_a_large_gpu_waits_for_launches(kind: str) -> None:
    keys = {"model.kind": kind, **SHAPE, **OF_KIND[kind], "model.seq_len": 512, "train.batch_tokens": 4096}
    step = time.step_time(settled("debug", H200, **keys), H200)
    assert step.bound == "launches"
    assert step.seconds.low < MEASURED[kind] / 1000 < step.seconds.high
    assert step.mfu(settled("debug", H200, **keys), H200).high < 0.02


@pytest.mark.parametrize("kind", MEASURED_125M)
def test_a_compiled_model_of_125m_took_as_long_as_forecast(kind: str) -> None:
    config = settled("debug", H200, **{"model.kind": kind, **SHAPE_125M, **FFN_125M[kind]})
    step = time.step_time(config, H200)
    assert step.seconds.low < MEASURED_125M[kind] / 1000 < step.seconds.high
    assert step.seconds.high < 4 * step.seconds.low


@pytest.mark.parametrize("case", PUBLISHED, ids=" ".join)
def test_published_speeds_lie_inside(case: tuple[str, str]) -> None:
    """MPT has two maps in a feed-forward network of 4 times the width; three of 8/3 are as many parameters."""
    fleet, (_, _, batch, _, rate) = parse_gpus(case[1]), PUBLISHED[case]
    step = time.step_time(published(case, fleet), fleet)
    assert step.bound == "arithmetic"
    assert step.seconds.low < batch / rate < step.seconds.high


@pytest.mark.parametrize("case", [case for case in PUBLISHED if not case[1].startswith("8x")], ids=" ".join)
def test_more_machines_lose_next_to_nothing(case: tuple[str, str]) -> None:
    """llm-foundry's MFU on 64 H100 is 0.98 to 1 times that on 8, 7B's on 128 is 0.984 (1B's 0.97 on 128)."""
    many = parse_gpus(case[1])
    few = Fleet(many.device, 8)
    on_many, on_few = published(case, many), published(case, few)
    ratio = time.step_time(on_many, many).mfu(on_many, many).mid / time.step_time(on_few, few).mfu(on_few, few).mid
    assert ratio > (0.98 if many.count <= 64 else 0.93)


def published(case: tuple[str, str], fleet: Fleet) -> Config:
    layers, width, batch, micro, _ = PUBLISHED[case]
    batch = batch * fleet.count // int(case[1].split("x")[0])
    keys = {
        "model.kind": "dense", "model.layers": layers, "model.width": width, "model.heads": width // 128,
        "model.kv_heads": width // 128, "model.head_dim": 128, "model.ffn": width * 8 // 3 // 64 * 64,
        "model.vocab": 50368, "model.tied": True, "model.seq_len": 2048, "train.batch_tokens": batch,
        "train.micro_batch": micro, "train.optimizer": "adamw", "train.recompute": "none",
    }  # fmt: skip
    return settled("b1", fleet, **keys)


def test_no_time_is_independent_of_the_size() -> None:
    """Of any two presets the larger takes longer for the same tokens, down to the smallest on the largest GPU."""
    fleet = parse_gpus("B200")
    keys = {"model.kind": "dense", "model.seq_len": 64, "train.batch_tokens": 8192, "train.tokens": "1M"}
    steps = [time.step_seconds(settled(name, fleet, **keys), fleet) for name in presets()]
    assert all(small.mid < large.mid and small.high < large.high for small, large in pairwise(steps))
    assert steps[0].low > 0.01  # launching alone


def test_what_takes_longer() -> None:
    base = settled("b1", H200)
    shorter = time.step_seconds(base, H200)

    def of(**keys: Any) -> Interval:
        return time.step_seconds(settled("b1", H200, **keys), H200)

    assert of(**{"train.batch_tokens": 2 * base.train.batch_tokens}).mid == pytest.approx(2 * shorter.mid, rel=0.05)
    assert of(**{"train.optimizer": "adamw"}).mid < shorter.mid
    assert of(**{"precision.mode": "fp32"}).mid > 5 * shorter.mid
    assert time.step_seconds(base, parse_gpus("L4")).mid > 5 * shorter.mid


def test_recomputing_is_in_what_gpus_reach_and_comes_on_top_where_it_was_not_measured() -> None:
    """llm-foundry's MFU of an H100 is 35 to 46 % without and 36 to 44 % with full recomputation."""
    cpu = Fleet(Device("c", 10**11, 1e10, 1e10, 1e10, {"bf16": 1e11}, CPU, "test", is_cpu=True))
    for fleet, longer in ((H200, 1.0), (cpu, 4 / 3)):
        none, full = (
            time.step_time(settled("b1", fleet, **{"train.recompute": how, "train.optimizer": "adamw"}), fleet)
            for how in ("none", "full")
        )
        assert full.parts["arithmetic"].mid == pytest.approx(longer * none.parts["arithmetic"].mid)
        assert full.parts["launches"].mid > none.parts["launches"].mid


def test_a_slow_network_bounds_many_gpus() -> None:
    fleet = parse_gpus("16xL40S")
    step, fast = time.step_time(settled("b7", fleet), fleet), Fleet(replace(fleet.device, link=1e15), 8)
    assert step.bound == "exchange"
    assert time.step_time(settled("b7", fast), fast).bound == "arithmetic"


def test_more_gpus_are_never_slower_for_being_in_two_machines() -> None:
    eight, sixteen = (time.step_time(settled("b1", fleet), fleet) for fleet in map(parse_gpus, ("8xH100", "16xH100")))
    assert sixteen.seconds.mid < 0.6 * eight.seconds.mid


def test_a_device_without_units_for_the_precision_is_refused() -> None:
    with pytest.raises(UserError, match="V100-32GB has no bf16 units"):
        settled("b1", parse_gpus("V100"), **{"precision.mode": "bf16"})


def test_what_was_measured_is_taken_and_what_is_near_corrects() -> None:
    config = settled("b1", H200)
    forecast = time.step_time(config, H200)
    figures = {"step": 2.0, "step_low": 1.9, "step_high": 2.2}
    assert time.step_seconds(config, H200, figures) == Interval(1.9, 2.0, 2.2)
    corrected = time.step_time(config, H200, {}, {"arithmetic": [1.5, 1.5], "launches": [9.0]})
    assert corrected.seconds.mid == pytest.approx(1.5 * forecast.seconds.mid)
    assert corrected.seconds.low > forecast.seconds.low
    assert "2 other shapes" in corrected.source
    assert not corrected.measured


def test_a_measured_run_is_the_sum_of_its_parts() -> None:
    keys = {"train.steps": 400, "train.eval_every": 100, "checkpoint.every": 150, "orchestrator.probe_every": 50}
    fleet = Fleet(Device("c", 10**10, 1e10, 1e10, 1e10, {"fp32": 1e11}, H200.device.reached, "test", is_cpu=True))
    config = settled("debug", fleet, **keys)
    figures = {"step": 0.5, "step_low": 0.4, "step_high": 0.7, "start": 7.0, "end": 1.0, "evaluation": 6.0,
               "probe": 0.25, "save": 0.125}  # fmt: skip
    step = time.step_time(config, fleet, figures)
    run = time.run_time(config, step, fleet, None, figures)
    assert run.parts == {
        "steps": 200.0, "start": 7.0, "end": 1.0,
        "evaluations": 4 * 6.0,  # behind 100, 200 and 300 steps, and at the end
        "probes": 7 * 0.25,
        "saves": 3 * 0.125,
    }  # fmt: skip
    assert run.total.mid == sum(run.parts.values())
    assert run.total.low == pytest.approx(run.total.mid - 40)
    assert not run.uncounted


def test_an_unmeasured_run_says_what_it_does_not_count() -> None:
    config = settled("b1", H200)
    step = time.step_time(config, H200)
    run = time.run_time(config, step, H200)
    assert run.total.mid == pytest.approx(38147 * step.seconds.mid)
    assert run.uncounted == ("evaluating", "starting", "compiling", "saving")
    looked = time.run_time(config, step, H200, heldout=1e6)
    assert "evaluating" not in looked.uncounted
    # 38 evaluations behind every 1,000 steps and one at the end, forward alone: a third of a trained token
    extra = 39 * 1e6 / 3 / config.train.batch_tokens * step.seconds.mid
    assert looked.total.mid - run.total.mid == pytest.approx(extra)


def test_depth_that_falls_takes_longer() -> None:
    keys = {"model.kind": "mod", "train.steps": 1000}
    config = settled("b1", H200, **keys, **{"model.mod.anneal": 0.5})
    step = time.step_time(config, H200)
    whole, plain = (time.run_time(each, step, H200).total.mid for each in (config, settled("b1", H200, **keys)))
    assert 1.1 * plain < whole < 2 * plain


def test_steps_in_a_time_leave_room_for_what_surrounds_them() -> None:
    config = settled("debug", H200)
    assert time.steps_in(config, 0.5, 100.0) == 190  # 5 % are kept
    assert time.steps_in(config, 0.5, 100.0, {"start": 9.0, "end": 1.0}) == 180
    assert time.steps_in(config, 50.0, 1.0) == 0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(1, "1 second"), (10, "10 seconds"), (179, "179 seconds"), (600, "10 minutes"), (86400, "24 hours"),
     (4e6, "46.3 days"), (1e10, "317 years")],
)  # fmt: skip
def test_a_time_is_said_in_its_own_unit(seconds: float, said: str) -> None:
    assert time.lasting(seconds) == said


def test_saves_come_as_often_as_youngs_formula_says() -> None:
    config = settled("debug", H200, **{"checkpoint.every": "auto", "checkpoint.mtbf": "24h", "train.steps": 100_000})
    assert time.saves(config, 100_000, 0.5, {"save": 1.0}) == 99_999 // 831 + 1  # sqrt(2 · 86,400 s · 1 s) = 415.7 s
    assert time.saves(config, 100_000, 0.5, {}) == 1


def test_price_is_of_every_device_and_hour() -> None:
    cost = time.price(Interval(1800, 3600, 7200), parse_gpus("8xH100"), 2.5)
    assert cost == Interval(10, 20, 40)
