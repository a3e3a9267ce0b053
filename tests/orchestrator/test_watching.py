"""Signals: what they remember is bounded, plain, and the same after a checkpoint and a way back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from watched import FACTS, MOD, MOE, look, seen, watched

from lumina.config.resolve import resolve
from lumina.orchestrator.detectors.table import DETECTORS
from lumina.orchestrator.signals import Facts, Signals, not_finite


def feed(signals: Signals, steps: int, **changes: Any) -> None:
    """More steps, each with these values (functions are of the step)."""
    for step in range(signals.step + 1, signals.step + steps + 1):
        signals.observe(seen(step, **{name: f(step) if callable(f) else f for name, f in changes.items()}))


def fed() -> Signals:
    """All there is to feed, with values that JSON does not have."""
    signals = Signals(MOE._replace(capacity=0.25, routed=0.25))
    for step in range(1, 401):
        odd = {"loss": math.nan, "grad_norm": math.inf, "skipped": True} if step in (150, 151) else {}
        load = ((1.2, 0.8, 1.1, 0.9), (0.4, 1.6, 1.0, 1.0))
        broken = ("batch: number 7 comes after 9",) if step == 160 else ()
        routed = {"load": load, "entropy": (1.1, 1.2), "capacity": (0.25, 0.3), "agreement": 0.9, "broken": broken}
        signals.observe(seen(step, **(routed | odd)))
        if step % 50 == 0:
            signals.looked(look(step, churn=(None, 0.1), golden=math.nan if step == 100 else 2.1))
            found = {"nats": 0.01, "z": 0.5, "points": 10, "against": "itself"}
            signals.forecast({"t": "forecast", "step": step, "deviation": found})
    return signals


def test_equal_to_the_bit_after_a_round_trip_and_ever_after() -> None:
    one = fed()
    text = json.dumps(one.pack(), allow_nan=False)
    other = Signals.unpack(json.loads(text), one.facts)
    assert json.dumps(other.pack(), allow_nan=False) == text
    assert other == one
    for step in range(401, 500):
        for signals in (one, other):
            signals.observe(seen(step, loss=9.0 if step > 420 else 2.0))
        assert [d(one) for d in DETECTORS] == [d(other) for d in DETECTORS]
    assert one.pack() == other.pack()


def test_what_is_not_finite_comes_back_from_a_checkpoint() -> None:
    signals = watched(60)
    signals.observe(seen(61, loss=math.nan, grad_norm=-math.inf, skipped=True))
    back = Signals.unpack(json.loads(json.dumps(signals.pack(), allow_nan=False)), FACTS)
    assert back.seen is not None
    assert math.isnan(back.seen.loss)
    assert back.seen.grad_norm == -math.inf


def test_memory_is_bounded() -> None:
    long, longer = (watched(steps, MOE, load=((1.0, 1.0),)) for steps in (1500, 3000))
    assert len(json.dumps(longer.pack())) == pytest.approx(len(json.dumps(long.pack())), rel=0.05)


def test_a_planned_change_is_learned_anew() -> None:
    signals = watched(300)
    signals.observe(seen(301, loss=3.0, changed="phase"))
    for step in range(302, 600):
        signals.observe(seen(step, loss=3.0 + seen(step).loss - 2.0))
        assert [found for d in DETECTORS if (found := d(signals))] == []


def test_the_facts_are_those_of_the_configuration() -> None:
    facts = Facts.of(resolve("tiny", {"model.kind": "hybrid", "model.mod.anneal": 0.5}).config)
    routed: dict[str, Any] = {"top_k": 2, "bias_rate": 1e-3, "routed": 0.25, "capacity": 0.25, "settles": 10}
    assert facts == Facts(260, 512, 0.95, **routed, steps=20, budget=0.03, decay=13, exact=True)
    assert facts.uniform == math.log(260)
    assert facts.assignments == 512 * 2 * 0.25
    dense = Facts.of(resolve("tiny", {"model.kind": "dense"}).config)
    assert (dense.top_k, dense.capacity) == (0, None)
    assert Facts.of(resolve("tiny", {"model.kind": "mod"}).config).capacity == MOD.capacity


def test_the_warm_up_of_a_later_phase_is_not_held_against_the_best_before_it() -> None:
    signals = watched(300)
    feed(signals, 1, changed="phase", stage="warmup")
    feed(signals, 100, stage="warmup", loss=lambda step: 1.5 + (step - 300) / 100)
    assert (signals.level.best, signals.level.above) == (None, 0)
    feed(signals, 40, loss=2.5)
    assert signals.level.best is not None


def test_a_loss_scale_that_has_fallen_below_one_excuses_nothing() -> None:
    assert not not_finite(seen(1, skipped=True, grad_norm=math.inf, loss_scale=2.0))
    assert not_finite(seen(1, skipped=True, grad_norm=math.inf, loss_scale=0.5))


def test_batches_that_are_planned_to_come_again_are_no_repeat() -> None:
    signals = watched(300)
    feed(signals, 1, content="0")  # by chance as another
    feed(signals, 5, content="")
    assert (signals.contents.again, signals.contents.period) == (0, 0)


def test_how_often_gradients_are_clipped_is_known() -> None:
    signals = watched(50, grad_norm=2.0, clip=1.0)
    assert signals.series["clipped"] == [1.0] * 50
    assert watched(50, grad_norm=0.5, clip=1.0).series["clipped"] == [0.0] * 50
