"""Fair timing: turns, intervals that hold, memory of a process of its own, and reports that keep every number."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lumina.bench import harness, report, speed
from lumina.bench.harness import MATMUL, TOTAL, Arm, Parts, Run
from lumina.cli import main
from lumina.errors import UserError

MIB = 2**20


class Machine:
    """A clock that arms move on; from the middle on, everything takes three times as long."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, list[str]()

    def arm(self, name: str, cost: float) -> Arm:
        def build() -> Run:
            def run() -> Parts:
                self.order.append(name)
                start = self.now
                self.now += cost * (3 if len(self.order) > 40 else 1)
                return {TOTAL: self.now - start}

            return run

        return Arm(name, build, amount=10.0)


def test_a_machine_that_slows_down_leaves_the_ratio_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    monkeypatch.setattr(harness, "ceilings", lambda *_: [machine.arm(MATMUL, 1.0)])
    measured = harness.measure([machine.arm("a", 2.0), machine.arm("b", 5.0)], rounds=25, warm=2)
    found = measured.ratio("b", "a")
    assert found.median == 2.5
    assert found.low == found.high == 2.5 or found.low < 2.5 < found.high  # one round holds the break
    assert len(measured.seconds["a"][TOTAL]) == 25  # the warm-up does not count
    turns = [machine.order[i : i + 3] for i in range(0, len(machine.order), 3)]
    assert all(sorted(turn) == ["a", "b", MATMUL] for turn in turns)
    assert {turn[0] for turn in turns} == {"a", "b", MATMUL}  # nobody is always first
    means = [sum(measured.seconds[name][TOTAL]) / 25 for name in "ab"]
    assert measured.rate("a") == 10.0 / measured.median("a")
    assert means[0] > 3.5  # what comparing with yesterday's 2.0 would show


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draw = random.Random(0)
    for n in (6, 12, 25):
        held = 0
        for _ in range(400):
            found = harness.interval([draw.expovariate(1.0) for _ in range(n)])
            held += found.low <= 0.6931 <= found.high
        assert held / 400 > 0.93, n


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_values_have_their_extremes_as_interval(n: int) -> None:
    values = [float(i) for i in range(n)]
    found = harness.interval(values)
    assert (found.low, found.high) == (values[0], values[-1])


def test_many_values_have_a_narrower_one() -> None:
    found = harness.interval([float(i) for i in range(25)])
    assert (found.low, found.median, found.high) == (7.0, 12.0, 17.0)  # the 8th and the 18th: 95.7 %


def allocating(sizes: Sequence[int]) -> list[Arm]:
    """Arms that hold so many MiB at once."""

    def build(size: int) -> Run:
        def run() -> Parts:
            return {TOTAL: float(torch.ones(size * MIB // 4).sum() * 0 + 1)}

        return run

    return [Arm(f"{size}", lambda size=size: build(size), 1.0) for size in sizes]  # type: ignore[misc]


def test_memory_is_that_of_each_arm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    held = torch.ones(1200 * MIB // 4)  # by the process that asks
    found = harness.memory_of(allocating, ["400", "100"], sizes=[400, 100])
    assert found["400"] == pytest.approx(400 * MIB, rel=0.15)
    assert found["100"] == pytest.approx(100 * MIB, rel=0.4)
    assert held.sum() > 0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape P made tiny."""
    sizes = {"model.width": 32, "model.layers": 2, "model.heads": 2, "model.kv_heads": 1, "model.head_dim": 16}
    monkeypatch.setattr(speed, "SHAPE", {**speed.SHAPE, **sizes, "model.vocab": 320})
    monkeypatch.setattr(speed, "SEQUENCES", 2)
    monkeypatch.setattr(harness, "MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr(harness, "COPY_BYTES", 1 << 16)


@pytest.mark.usefixtures("small")
def test_the_kinds_are_measured_and_every_number_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "speed", "--seq-len", "32", "--rounds", "3", "--no-memory", "precision.mode=fp32"]
    command.append("parallel.threads=1")
    assert main([*command, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{kind}  " in said for kind in ("dense", "moe", "mod", "hybrid"))
    (page,) = tmp_path.glob("*.md")
    table = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "| dense |" in table[2]
    ((_, content),) = json.loads(page.with_suffix(".json").read_text()).items()
    assert content["about"]["commit"] is not None
    for kind in ("dense", "moe", "mod", "hybrid"):
        arm = content["arms"][kind]
        assert set(arm["seconds"]) == {speed.FORWARD_BACKWARD, speed.OPTIMIZER, "metrics", TOTAL}
        for values in zip(*arm["seconds"].values(), strict=True):
            assert sum(values[:-1]) == pytest.approx(values[-1])
        assert len(arm["seconds"][TOTAL]) == 3
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arms"]["moe"]["kind"] == "moe"


@pytest.mark.usefixtures("small")
def test_equal_active_parameters_are_compared() -> None:
    arms = {arm.name: arm for arm in speed.suite(seq_len=32)}
    routers = 2 * 32 * 8  # of two layers
    assert arms["moe"].facts["active"] - routers == arms["dense"].facts["active"]
    assert arms["mod"].flops < arms["dense"].flops


def test_a_wrong_setting_is_named_as_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "speed", "precision.mod=fp32"]) == 2
    said = capsys.readouterr().err
    assert "precision.mod=fp32 (command line): unknown key; did you mean precision.mode?" in said


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        report.write(tmp_path / "file", "x", "", {})
