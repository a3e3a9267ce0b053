"""The `mod` event, and a capacity that falls: figures by hand, counts that no split changes, runs that go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import settings

from lumina.config.resolve import resolve
from lumina.errors import UserError
from lumina.model import cost
from lumina.model.mod import SUMS
from lumina.training import depth, setup
from lumina.training.trainer import Trainer


def row(quantile: float = 0.5, threshold: float = -0.25, **sums: float) -> list[float]:
    return [*(sums[name] for name in SUMS), quantile, threshold]


def test_figures_are_those_of_the_definition() -> None:
    layer = row(tokens=200, chosen=50, agreement=180, taken=40, nats=30, square=800, position=20)
    told = depth.describe(layer + layer, layers=2)
    assert {name: values[1] for name, values in told.items()} == {
        "capacity": 0.25, "taken": 0.2, "agree": 0.9, "nats": 0.15, "score": 2.0, "position": 0.4,
        "quantile": 0.5, "threshold": -0.25,
    }  # fmt: skip


def events(folder: Path, *types: str, **keys: Any) -> list[dict[str, Any]]:
    request = settings(folder) | {"train.steps": 9, "telemetry.log_every": 4, "checkpoint.every": 3} | keys
    run = Trainer("tiny", root=folder / "runs", **request).fit()
    return [event for event in run.events() if event["t"] in types]


def test_a_run_tells_of_its_depth_in_any_split(tmp_path: Path) -> None:
    whole, split = (events(tmp_path, "mod", **{"train.micro_batch": n}) for n in (8, 2))
    assert [event["step"] for event in whole] == [4, 8, 9]
    for a, b in zip(whole, split, strict=True):
        assert a["capacity"] == b["capacity"] == [0.25, 0.25]
        assert all(0 <= share <= 1 for name in ("taken", "agree", "position") for share in a[name])
        for name in ("score", "nats", "position"):
            assert a[name] == pytest.approx(b[name], abs=5e-3), name
    assert events(tmp_path, "mod", **{"model.kind": "moe"}) == []


def test_an_interruption_changes_none_of_it(tmp_path: Path) -> None:
    def crash(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == 7:
            raise RuntimeError("power cut")

    keys = {"model.mod.anneal": 5}
    whole = events(tmp_path, "mod", "step", **keys)
    (tmp_path / "again").mkdir()
    request = settings(tmp_path / "again") | {"train.steps": 9, "telemetry.log_every": 4, "checkpoint.every": 3} | keys
    with pytest.raises(RuntimeError, match="power cut"):
        Trainer("tiny", root=tmp_path / "again" / "runs", listeners=[crash], **request).fit()
    again = {
        (e["t"], e["step"]): e for e in Trainer("tiny", root=tmp_path / "again" / "runs", **request).fit().events()
    }
    for event in whole:
        other = again[event["t"], event["step"]]
        for name in event.keys() - {"attempt", "wall", "tok_s", "mfu", "mem"}:
            assert other[name] == event[name], (event["t"], event["step"], name)


def test_the_capacity_falls_and_only_then_is_an_evaluation_comparable(tmp_path: Path) -> None:
    keys = {"model.mod.anneal": 4, "telemetry.log_every": 1, "train.eval_every": 3, "train.batch_tokens": 4096}
    told = events(tmp_path, "mod", "eval", "step", **keys)
    assert [event["capacity"][0] for event in told if event["t"] == "mod"] == [1, 1, 0.5, 0.5] + [0.25] * 5
    assert not next(event["comparable"] for event in told if event["t"] == "eval" and event["step"] == 3)
    first, last = (next(e for e in told if e["t"] == "step" and e["step"] == step) for step in (1, 9))
    model = resolve("tiny").config.model
    flops = [cost.count(model, capacity=c).flops_per_token for c in (1.0, 0.25)]
    # Utilisation counts what each step computed.
    assert first["mfu"] / first["tok_s"] / (last["mfu"] / last["tok_s"]) == pytest.approx(flops[0] / flops[1], rel=0.08)


def test_the_whole_run_costs_the_mean_of_its_stages() -> None:
    config = resolve("tiny", {"model.mod.anneal": 0.2}).config
    flops = [cost.count(config.model, capacity=c).flops_per_token for c in (1.0, 0.5, 0.25)]
    assert setup.mean_flops(config, 100) == pytest.approx(0.1 * flops[0] + 0.1 * flops[1] + 0.8 * flops[2])
    (steps, why), *_ = setup._deadline_choice(config, 100.0, 0.1).values()
    assert steps == pytest.approx(950 * flops[2] / setup.mean_flops(config, 950), abs=1)
    assert "while the depth settles" in why
    dense = resolve("tiny", {"model.kind": "dense"}).config
    assert setup._deadline_choice(dense, 100.0, 0.1)["train.steps"][0] == 950


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["model.mod.anneal=20"], "the run has 20 steps"),
        (["model.mod.anneal=0.99"], "the run has 20 steps"),
        (["model.mod.anneal=5", "model.mod.capacity=1"], "nowhere to fall"),
    ],
)
def test_a_capacity_that_never_falls_is_refused(keys: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve("tiny", keys)
