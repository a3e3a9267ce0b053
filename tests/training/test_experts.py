"""The `moe` event: figures by hand, noise named as such, and the same after an interruption."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import model_config, settings

from lumina.model.router import SUMS
from lumina.model.transformer import Transformer
from lumina.training import experts
from lumina.training.observer import _added
from lumina.training.trainer import Trainer


def row(load: list[float], active: list[float], bias: float = 0.2, **sums: float) -> list[float]:
    return [*load, *(sums.get(name, 0.0) for name in SUMS), *active, bias]


def test_figures_are_those_of_the_definition() -> None:
    load = [3000.0, 1000.0, 1900.0, 100.0, 0.0]
    layer = row(load, [1, 1, 1, 1, 0], entropy=1500.0, mass=2400.0, logsumexp=-3000.0, dropped=60.0, lost=3.0)
    told = experts.describe(layer + layer, layers=2, top_k=2)
    assert all(len(values) == 2 for values in told.values())
    first = {name: values[0] for name, values in told.items()}
    assert first["load"] == [2.0, 0.667, 1.267, 0.067]
    assert first["maxvio"] == 1.0
    assert first["floor"] == pytest.approx(math.sqrt(2 * math.log(4) * 4 / 6000), abs=1e-5)
    shares = [count / 6000 for count in load if count]
    assert first["balance"] == pytest.approx(-sum(s * math.log(s) for s in shares) / math.log(4), abs=1e-5)
    assert (first["entropy"], first["mass"], first["logsumexp"]) == (0.5, 0.8, -1.0)
    assert (first["dropped"], first["lost"], first["bias_range"]) == (0.01, 0.001, 0.2)
    assert first["dead"] == 0
    assert experts.describe(row([5990.0, 5.0, 5.0, 0.0], [1.0] * 4), 1, 2)["dead"] == [3]
    assert experts.describe(row([1500.0, 5.0, 5.0, 0.0], [1.0] * 4), 1, 2)["dead"] == [None]  # too few to tell


def test_counts_add_up_and_states_are_the_newest() -> None:
    first, second = row([1.0, 2.0], [1.0, 0.0], 0.1, mass=3.0), row([4.0, 5.0], [1.0, 1.0], 0.3, mass=6.0)
    width = len(first)
    window = _added(list(first * 2), second * 2, width, experts.counts(width))
    assert window == row([5.0, 7.0], [1.0, 1.0], 0.3, mass=9.0) * 2


def test_the_noise_floor_is_what_balanced_random_routing_shows() -> None:
    generator = torch.Generator().manual_seed(0)
    for E, n in ((8, 2048), (64, 16384)):
        draws = torch.randint(0, E, (200, n), generator=generator)
        loads = torch.stack([torch.bincount(draw, minlength=E) for draw in draws]).double()
        seen = (loads.amax(1) / (n / E) - 1).mean().item()
        assert seen == pytest.approx(math.sqrt(2 * math.log(E) * E / n), rel=0.35)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_rows_count_every_assignment_once(recompute: str) -> None:
    model = Transformer(model_config("hybrid"))
    for block in model.units:
        block.recompute = recompute
    ids = torch.randint(0, 260, (2, 64), generator=torch.Generator().manual_seed(0))
    loss, routing = model(ids, torch.zeros_like(ids, dtype=torch.int32), ids.roll(-1, 1))
    loss.loss.backward()
    table = experts.rows(model, routing)
    assert model.config.moe is not None
    assert model.config.mod is not None
    S = [64 if block.router is None else math.ceil(model.config.mod.capacity * 64) for block in model.units]
    assert table[:, :4].sum(1).tolist() == [2 * s * model.config.moe.top_k for s in S]


def events(folder: Path, **keys: Any) -> list[dict[str, Any]]:
    request = settings(folder) | {"train.steps": 9, "telemetry.log_every": 4, "checkpoint.every": 3} | keys
    run = Trainer("tiny", root=folder / "runs", **request).fit()
    return [event for event in run.events() if event["t"] == "moe"]


def test_a_run_tells_of_its_experts_and_of_drops(tmp_path: Path) -> None:
    told = events(tmp_path, **{"model.moe.capacity": 0.5})
    assert [event["step"] for event in told] == [4, 8, 9]
    for event in told:
        assert all(sum(load) == pytest.approx(4, abs=0.01) for load in event["load"])
        assert all(0 < drop < 1 for drop in event["dropped"])
        assert all(0 < value <= 1 for name in ("entropy", "mass", "balance") for value in event[name])
    assert events(tmp_path, **{"model.kind": "dense"}) == []


def test_micro_batches_do_not_change_it(tmp_path: Path) -> None:
    whole, split = (events(tmp_path, **{"train.micro_batch": n}) for n in (8, 2))
    for a, b in zip(whole[:2], split[:2], strict=True):  # a single step has few tokens, and one near-tie shows
        for name in ("load", "mass", "entropy"):
            assert torch.tensor(a[name]) == pytest.approx(torch.tensor(b[name]), abs=5e-3), name
