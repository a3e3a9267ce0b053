"""Memory that is measured beside what was forecast: the way of a step, and what is made of a measurement."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lumina.bench import allocator, resident, tracker
from lumina.bench import memory as walks
from lumina.cli import main
from lumina.model.transformer import Transformer
from lumina.planner.memory import LIBRARIES
from lumina.training.optim import Optimizer

SMALL = {
    **resident.CPU, "model.width": 64, "model.layers": 2, "model.ffn": 64, "model.vocab": 320, "model.seq_len": 32,
    "model.heads": 2, "model.kv_heads": 1, "model.head_dim": 32, "train.micro_batch": 2, "train.batch_tokens": 128,
}  # fmt: skip


class Counting:
    """A meter that counts how often it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def begin(self, model: Transformer, optimizer: Optimizer) -> None:
        assert optimizer.tensors()
        assert not any(parameter.grad is not None for parameter in model.parameters())

    def now(self) -> int:
        return self.reads

    def most(self) -> int:
        self.reads += 1
        return self.reads


def test_a_walk_reads_the_meter_in_every_moment_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walks, "EVAL_TOKENS", 64)
    config = walks.configure(SMALL)
    model = Transformer(config.model)
    before = model.head.weight.detach().clone()
    took = walks.walk(config, model, Counting(), steps=1)
    order = sorted(took.end, key=took.end.__getitem__)
    assert order == ["state", "forward", "backward", "optimizer", "evaluation"]
    assert took.peak == took.most["evaluation"]
    assert took.end["forward"] == 5  # that of the second micro-batch: after state and both moments of the first
    assert not torch.equal(before, model.head.weight)


def test_a_case_that_failed_is_a_row_and_the_others_are_judged() -> None:
    moments = dict.fromkeys(walks.MOMENTS, 3 * 2**20)
    good = {"attention": "cudnn", "most": moments, "peak": 4 * 2**20, "forecast": {"peak": 5 * 2**20}}
    failed, judged = allocator.rows({"a": {"error": "OutOfMemory: no\nmore"}, "b": good})
    assert failed == ["a", "OutOfMemory: no", *["-"] * 7]
    assert judged == ["b", "cudnn", "3", "3", "3", "3", "4", "5", "+25.0%"]
    assert {len(failed), len(judged)} == {len(allocator.HEADER)}


def test_every_case_is_a_valid_configuration_with_a_forecast() -> None:
    for name, keys in allocator.CASES.items():
        forecast = walks.forecast_of({**allocator.GPU, **keys}, "cuda")
        assert 2**30 < forecast.total < 40 * 2**30, name  # worth measuring, and below an H100's memory
    for name, keys in resident.CASES.items():
        assert 2**28 < walks.forecast_of({**resident.CPU, **keys}, "cpu").total < 2**32, name
    assert len(resident.JUDGING) >= 6
    assert not set(resident.JUDGING) & set(resident.FITTED)


def test_presets_are_walked_as_every_kind_and_some_in_every_way() -> None:
    cases = tracker.cases(("b1", "b7"))
    assert {(case.preset, case.kind, case.precision) for case in cases} >= {
        (preset, kind, precision)
        for preset in ("b1", "b7") for kind in ("dense", "moe", "mod", "hybrid") for precision in ("fp32", "bf16")
    }  # fmt: skip
    assert {case.recompute for case in cases if case.preset == "b1"} == {"none", "selective", "full"}
    config = tracker.Case("b7", "mod", "bf16", "selective").config(**{"model.layers": 2})
    assert config.train.batch_tokens == 2 * int(config.train.micro_batch) * config.model.seq_len
    assert config.model.layers == 2


def test_the_page_says_the_largest_and_the_median_error() -> None:
    def one(error: float) -> dict[str, Any]:
        walked = dict.fromkeys(walks.MOMENTS, 100)
        said = {moment: round(100 * (1 + error)) for moment in walks.MOMENTS}
        names = {"preset": "b1", "kind": "moe", "precision": "bf16", "recompute": "none"}
        return {**names, "walked": walked, "forecast": said, "peak": 2**30, "error": error}

    about = {"date": "2026-11-26", "commit": "", "torch": "2.13.0"}
    page = tracker.page([one(-0.03), one(0.01), one(0.02)], [one(0.0)], about)
    assert "The largest error of a peak is 3.0%, the median 2.0%, of 3." in page
    assert "| b1 | moe | bf16 | none | -3.0% | -3.0% | -3.0% | -3.0% | 1.00 | -3.0% |" in page


def test_libraries_are_not_held_against_a_count_of_tensors() -> None:
    forecast = walks.forecast_of(SMALL, "cpu")
    compared = tracker._compared({"forward": 1}, forecast)
    assert compared["forecast"]["forward"] == forecast.moments["forward"] - LIBRARIES["cpu"]


@pytest.mark.parametrize("arguments", [["--device", "tpu"], ["--device", "fake", "--case", "b8"]])
def test_what_is_not_there_is_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "memory", *arguments]) == 2
    assert "use one of: " in capsys.readouterr().err
