"""The bars of the sparse layers: ideals and floors by hand, verdicts that the interval must bear, the gap of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import settings

from lumina.bench import gap, harness, sparse, speed
from lumina.bench.harness import COPY, MATMUL, TOTAL, Arm, Measurement, Ratio
from lumina.cli import main
from lumina.training.trainer import Trainer

ROUNDS = 8


def arm(name: str, flops: float, unit: str = "tok") -> Arm:
    return Arm(name, lambda: lambda: {}, 100.0, unit, flops, {"total": 1000})


@pytest.fixture
def measured() -> Measurement:
    """Dense takes 10 and 1 seconds; MoD has half the FLOPs and takes 6 and 1. The matmul makes 100 FLOP/s."""

    def times(work: float, optimizer: float) -> dict[str, list[float]]:
        return {
            speed.FORWARD_BACKWARD: [work] * ROUNDS, speed.OPTIMIZER: [optimizer] * ROUNDS,
            TOTAL: [work + optimizer] * ROUNDS,
        }  # fmt: skip

    seconds = {
        "dense": times(10, 1), "moe": times(11, 2), "mod": times(6, 1), "hybrid": times(6, 2),
        sparse.LAYER: {TOTAL: [1.0] * ROUNDS}, sparse.EXPERTS: {TOTAL: [0.9] * ROUNDS},
        MATMUL: {TOTAL: [1.0] * ROUNDS}, COPY: {TOTAL: [1.0] * ROUNDS},
    }  # fmt: skip
    arms = [arm("dense", 800), arm("moe", 800), arm("mod", 400), arm("hybrid", 400)]
    arms += [arm(name, 60, "row") for name in (sparse.LAYER, sparse.EXPERTS)]
    arms += [Arm(MATMUL, arms[0].build, 100.0), Arm(COPY, arms[0].build, 56000.0)]
    return Measurement(arms, seconds, {}, {})


def test_ideals_and_shares_are_those_of_the_definition(measured: Measurement) -> None:
    found, ideal = sparse.of_ideal(measured, "mod")
    assert ideal == 0.5 * 10 + 1
    assert found.median == pytest.approx(6 / 7)
    config = speed.configure("moe", 512, {"precision.mode": "fp32"})
    calls = 6 * (8 // int(config.train.micro_batch))
    assert sparse.router_share(measured, config).median == pytest.approx(calls * 0.1 / 13)
    rows = {row[0]: row[1:] for row in sparse.bars(measured, config)}
    assert rows["MoE keeps of dense, step"][2] == "missed"  # 11 / 13
    assert rows["mod of its ideal, 6000 ms"] == ["86 % [86, 86]", ">= 90%", "missed"]
    assert rows["hybrid of its ideal, 7000 ms"][2] == "met"  # 7 / 8


def test_floors_are_products_and_bytes_at_the_rates_of_the_same_rounds(measured: Measurement) -> None:
    config = speed.configure("moe", 512, {"precision.mode": "fp32"})
    rows = {row[0]: row[1:] for row in sparse.floors(measured, config)}
    # 800 FLOP at 100 a second; 7 passes over 4,000 bytes at 56,000 a second.
    assert rows["dense"] == ["8000", "500", "11000", "2500", "77%"]
    calls = 6 * (8 // int(config.train.micro_batch))
    assert rows[f"{calls} x {sparse.LAYER}"][:3] == [f"{calls * 600}", "0", f"{calls * 1000}"]


@pytest.mark.parametrize(
    ("found", "most", "verdict"),
    [
        (Ratio(0.9, 0.86, 0.95), False, "met"),
        (Ratio(0.9, 0.62, 1.1), False, "median met, interval not"),
        (Ratio(0.84, 0.8, 0.9), False, "missed"),
        (Ratio(0.84, 0.8, 0.849), True, "met"),
        (Ratio(0.84, 0.8, 0.9), True, "median met, interval not"),
        (Ratio(0.86, 0.8, 0.9), True, "missed"),
    ],
)
def test_a_bar_is_met_where_the_whole_interval_is(found: Ratio, most: bool, verdict: str) -> None:
    assert sparse._bar("x", found, 0.85, most)[3] == verdict
    assert sparse._bar("x", found)[3] == "printed"


def test_the_report_has_every_arm_and_every_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"model.width": 32, "model.layers": 2, "model.heads": 2, "model.kv_heads": 1, "model.head_dim": 16}
    monkeypatch.setattr(speed, "SHAPE", {**speed.SHAPE, **sizes, "model.vocab": 320})
    monkeypatch.setattr(speed, "SEQUENCES", 2)
    monkeypatch.setattr(harness, "MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr(harness, "COPY_BYTES", 1 << 16)
    command = ["bench", "sparse", "--seq-len", "32", "--rounds", "2", "--no-memory", "--depths", "precision.mode=bf16"]
    command.append("parallel.threads=1")
    assert main([*command, "--out", str(tmp_path)]) == 0
    (page,) = tmp_path.glob("*-bf16-eager-32.md")
    text = page.read_text()
    assert text in capsys.readouterr().out
    steps = ["dense", "moe", "mod", "hybrid", "dense, Muon", "moe, Muon", "mod, c 1", "mod, c 0.5", "mod, c 0.25"]
    layers = [sparse.ATTENTION, sparse.NETWORK, sparse.LAYER, sparse.EXPERTS, sparse.HEAD]
    assert all(f"\n| {name} |" in text for name in steps + layers)
    assert all(f"\n| 2 x {name} |" in text for name in layers[:-1])
    assert f"\n| 1 x {sparse.HEAD} |" in text
    assert "| bf16 " not in text
    ((_, content),) = json.loads(page.with_suffix(".json").read_text()).items()
    assert set(content["arms"]) == {*steps, *layers, MATMUL, COPY}
    assert all(len(one["seconds"][TOTAL]) == 2 for one in content["arms"].values())


def test_what_the_bars_are_for_is_no_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sparse", "train.optimizer=muon"]) == 2
    assert "the bars are for AdamW" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["fp32", "bf16", "bf16_pure"])
def test_layers_run_in_every_format_and_not_beside_compiled_ones(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SHAPE", {**speed.SHAPE, "model.width": 32, "model.layers": 2, "model.vocab": 320})
    keys = {"precision.mode": mode, "parallel.threads": 1}
    for one in sparse.suite(32, keys, parts=True):
        if one.unit == "row":
            assert one.build()()[TOTAL] > 0
    compiled = sparse.suite(32, {**keys, "train.compile": "on"}, parts=True)
    assert [one.name for one in compiled] == ["dense", "moe", "mod", "hybrid"]


def test_the_gap_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = settings(tmp_path, "hybrid") | {"model.moe.dropout": 0.5}
    run = Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    step, found = gap.measure(run)
    assert step == 6
    assert list(found) == ["top", "predictor", "threshold"]
    assert found["top"].mean == found["top"].p99 == 0.25  # exactly, in every sequence
    assert found["predictor"].mean != 0.25
    assert found["top"].agree == 1 > found["predictor"].agree > 0.3
    assert len({one.loss for one in found.values()}) == 3
    assert main(["bench", "gap", str(run.path)]) == 0
    said = capsys.readouterr().out
    assert f"{found['predictor'].loss:.4f}" in said
    assert main(["bench", "gap", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["threshold"]["loss"] == found["threshold"].loss


def test_where_all_tokens_are_taken_there_is_no_gap(tmp_path: Path) -> None:
    """Whatever training hides at random, too: `top` is another choice of tokens and nothing else."""
    keys = settings(tmp_path, "hybrid") | {"model.moe.dropout": 0.5, "model.mod.capacity": 1}
    run = Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    _, found = gap.measure(run)
    taken_by_all = [one.loss for one in found.values() if one.mean == 1]
    assert len(taken_by_all) >= 2
    assert len(set(taken_by_all)) == 1


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        ("moe", {}, "a moe model chooses no tokens"),
        ("mod", {"model.mod.routing": "random"}, "with model.mod.routing=random nothing looks ahead"),
    ],
)
def test_a_run_that_does_not_look_ahead_has_no_gap(
    kind: str, keys: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Trainer("tiny", root=tmp_path / "runs", **(settings(tmp_path, kind) | keys)).fit()
    assert main(["bench", "gap", str(run.path)]) == 2
    assert said in capsys.readouterr().err
