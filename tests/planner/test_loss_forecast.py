"""Forecasts of the final loss: of curves whose end is known they hold it, and of no other do they speak."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lumina.config.resolve import resolve
from lumina.planner.curve import Change, Curve, Evaluated, width_for
from lumina.planner.deviation import SHARES, Reference, deviation, normalised
from lumina.planner.forecast import Aim, Forecast, Refusal, View, forecast, window
from lumina.planner.outlook import Optimum, aim_of, outlook
from lumina.planner.prior import SHIPPED
from lumina.planner.schedule import Part, Schedule

STEPS = 1000
SCHEDULE = Schedule("wsd", (Part(0, STEPS, 1e-3, 50, 300),))
AIM = Aim(SCHEDULE)
GAP = 0.1


def truth(schedule: Schedule, steps: np.ndarray, gain: float = 0.2) -> np.ndarray:
    """Losses of the form itself: 2 + 1.5·x^-0.3 - gain·y."""
    x = schedule.area(steps) / SCHEDULE.area(np.array([float(STEPS)]))
    return 2 + 1.5 * x**-0.3 - gain * schedule.fallen(steps)


def curve(
    until: int = STEPS, noise: float = 0.02, seed: int = 0, schedule: Schedule = SCHEDULE, every: int = 100
) -> Curve:
    """That of a run which is so far, and evaluates."""
    width = width_for(schedule.steps)
    ends = np.arange(width, until + 1.0, width)
    losses = truth(schedule, ends - (width - 1) / 2) + noise * np.random.default_rng(seed).standard_normal(len(ends))
    evals = [n for n in range(every, until + 1, every)] if every else []
    heldout = truth(schedule, np.array(evals, float)) + GAP
    return Curve(width, ends, losses, np.full(len(ends), float(width)), tuple(map(Evaluated, evals, heldout.tolist())))


def said(*arguments: object, **keys: object) -> Forecast:
    found = forecast(*arguments, **keys)  # type: ignore[arg-type]
    assert isinstance(found, Forecast), found
    return found


def changed(step: int, why: str) -> Curve:
    return replace(curve(600), changes=(Change(step, why),))


def width(found: Forecast) -> float:
    return found.train.high - found.train.low


@pytest.mark.parametrize("until", [250, 400, 600, 750, 900])
def test_the_final_loss_lies_in_the_interval_before_and_in_the_decay(until: int) -> None:
    """A gain of 0.2 of 3.5 nats is one that finished runs had; whoever does not expect it is 0.2 off."""
    final = float(truth(SCHEDULE, np.array([float(STEPS)]))[0])
    found = said(curve(until), AIM)
    assert found.heldout is not None
    assert found.train.low < final < found.train.high
    assert found.heldout.low < final + GAP < found.heldout.high
    assert found.train.mid == pytest.approx(final, abs=0.12)
    assert found.heldout.mid - found.train.mid == pytest.approx(GAP, abs=0.03)
    plateau = float(truth(replace(SCHEDULE, parts=(Part(0, STEPS, 1e-3, 50, 0),)), np.array([float(STEPS)]))[0])
    assert found.train.mid < plateau - 0.05


def test_the_interval_is_the_wider_the_more_is_to_come() -> None:
    widths = [width(said(curve(until), AIM)) for until in (250, 500, 800, 990)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 3 * widths[-1]


def test_more_of_the_decay_still_to_come_makes_it_wider_too() -> None:
    steady = replace(SCHEDULE, parts=(Part(0, STEPS, 1e-3, 50, 0),))
    with_decay, without = said(curve(600), AIM), said(curve(600, schedule=steady), Aim(steady))
    assert width(with_decay) > 1.3 * width(without)


def test_intervals_hold_four_of_five_ends_and_not_nearly_all() -> None:
    """Of curves whose gain is drawn from the prior and whose noise is what it seems."""
    inside = []
    for seed in range(60):
        mine = AIM.prior(SHIPPED)
        gain = (mine.gain + mine.gain_spread * np.random.default_rng(1000 + seed).standard_normal()) * 3.5
        ends = np.arange(5.0, 501.0, 5.0)
        noise = 0.05 * np.random.default_rng(seed).standard_normal(len(ends))
        known = Curve(5, ends, truth(SCHEDULE, ends - 2, gain) + noise, np.full(len(ends), 5.0))
        found = said(known, AIM, replace(SHIPPED, ahead=0.0))
        inside.append(found.train.low < truth(SCHEDULE, np.array([float(STEPS)]), gain)[0] < found.train.high)
    assert 0.6 < np.mean(inside) < 0.97


def test_an_outlier_hardly_counts() -> None:
    clean = curve(600)
    spiked = replace(clean, losses=np.where(clean.steps == 400, 9.0, clean.losses))
    assert said(spiked, AIM).train.mid == pytest.approx(said(clean, AIM).train.mid, abs=0.02)


def test_losses_that_do_not_follow_the_form_are_less_certain() -> None:
    clean = curve(600)
    bent = replace(clean, losses=clean.losses + np.where((clean.steps // 100) % 2, 0.2, 0.0))
    alone = replace(SHIPPED, ahead=0.0)
    assert width(said(bent, AIM, alone)) > 2 * width(said(clean, AIM, alone))


def test_what_starting_the_decay_now_costs() -> None:
    now = 400
    sooner = SCHEDULE.decayed_after(now)
    lost = truth(sooner, np.array([float(sooner.steps)]))[0] - truth(SCHEDULE, np.array([float(STEPS)]))[0]
    found = said(curve(now, noise=0.005), AIM).decay_now
    assert found is not None
    assert (found.end, found.saved) == (700, 300)
    assert found.cost.low < lost < found.cost.high
    assert found.cost.mid == pytest.approx(lost, rel=0.3)
    assert said(curve(800), AIM).decay_now is None


@pytest.mark.parametrize(
    ("known", "aim", "why", "early"),
    [
        (curve(140), AIM, "the warm-up", True),
        (changed(550, "lr.scale=0.5 was laid over the plan"), AIM, "lr.scale=0.5", False),
        (changed(590, "the loss was not finite"), AIM, "not finite", False),
        (changed(580, "the run went back to this step"), AIM, "went back", False),
        (curve(400), replace(AIM, settled=350, because="the depth that settles"), "the depth", True),
        (curve(400), replace(AIM, never="adapters are trained"), "adapters", False),
        (curve(400), Aim(Schedule("wsd", (Part(0, 500, 1e-3, 50, 50), Part(500, 1000, 1e-3, 0, 200)))), "phase", True),
    ],
)
def test_of_what_it_does_not_know_it_says_nothing(known: Curve, aim: Aim, why: str, early: bool) -> None:
    found = forecast(known, aim)
    assert isinstance(found, Refusal)
    assert why in found.reason
    assert found.early is early


def test_few_points_are_too_few() -> None:
    short = Schedule("wsd", (Part(0, 60, 1e-3, 5, 20),))
    known = Curve(1, np.arange(1.0, 15.0), np.linspace(5, 4, 14), np.ones(14))
    found = forecast(known, Aim(short))
    assert isinstance(found, Refusal)
    assert "9 points are too few" in found.reason


def test_behind_a_change_the_points_before_it_do_not_count() -> None:
    known = curve(800)
    broken = replace(known, losses=known.losses + np.where(known.steps <= 500, 3.0, 0.0), changes=(Change(500, "x"),))
    assert window(broken, AIM) == (500, "x")
    assert said(broken, AIM).begin == 500
    assert said(broken, AIM).train.mid == pytest.approx(said(known, AIM).train.mid, abs=0.15)


def test_text_that_is_read_again_may_be_learnt_by_heart() -> None:
    """The held-out loss parts from the training loss, and goes on to: in one epoch that would be chance."""
    fresh = curve(500)
    parting = tuple(Evaluated(one.step, one.loss + one.step / STEPS) for one in fresh.heldout)
    known, final = replace(fresh, heldout=parting), float(truth(SCHEDULE, np.array([float(STEPS)]))[0]) + GAP + 1
    once, often = (said(known, replace(AIM, epochs=epochs)).heldout for epochs in (1.0, 6.0))
    assert once is not None
    assert often is not None
    assert often.low < final < often.high
    assert final - once.mid > 0.2


def test_a_run_without_evaluations_has_no_held_out_forecast() -> None:
    assert said(curve(500, every=0), AIM).heldout is None


# -- whether the newest losses are what they should be ---------------------------------------------------------------


def test_a_healthy_run_does_not_deviate_and_one_that_jumps_does() -> None:
    view = View(SCHEDULE, 50)
    healthy = [deviation(view.points(curve(n, seed=n)), 10, SHIPPED) for n in range(400, 1001, 100)]
    assert all(one is not None and abs(one.z) < 3 for one in healthy)
    jumped = curve(600)
    jumped = replace(jumped, losses=jumped.losses + np.where(jumped.steps > 550, 0.1, 0.0))
    found = deviation(view.points(jumped), 10, SHIPPED)
    assert found is not None
    assert found.z > 5
    assert found.nats == pytest.approx(0.1, abs=0.03)


def test_the_reference_is_another_run_whatever_its_level() -> None:
    """A curve twice as high is the same curve; one that stopped falling is not."""
    whole = curve()
    reference = Reference("a run of before", normalised(whole.steps, 2 * whole.losses, STEPS))
    assert reference.losses[-1] == 1
    assert len(reference.losses) == len(SHARES)
    view = View(SCHEDULE, 50)
    same = deviation(view.points(curve(600, seed=3)), 10, SHIPPED, reference)
    stuck = curve(600, seed=3)
    stuck = replace(stuck, losses=np.where(stuck.steps > 300, np.maximum(stuck.losses, stuck.losses[59]), stuck.losses))
    other = deviation(view.points(stuck), 10, SHIPPED, reference)
    assert same is not None
    assert other is not None
    assert (same.against, abs(same.z) < 3) == ("a run of before", True)
    assert other.z > abs(same.z) + 1
    assert other.nats > 0.03


def test_too_little_before_the_newest_is_nothing_to_hold_them_against() -> None:
    assert deviation(View(SCHEDULE, 50).points(curve(150)), 10, SHIPPED) is None


# -- what a run is told ------------------------------------------------------------------------------------------------


def test_the_fields_of_an_event_are_plain_and_short() -> None:
    told = outlook(curve(500), AIM, SHIPPED, Optimum("besiroglu", 1e6), 512)
    assert told["optimum"] == {"law": "besiroglu", "tokens": 1_000_000, "share": 0.256}
    assert told["share"] == 0.5
    assert told["train"]["low"] < told["train"]["mid"] < told["train"]["high"]
    assert all(value == float(f"{value:.5g}") for value in told["heldout"].values())
    refused = outlook(curve(120), AIM, SHIPPED, None, 512)
    assert (refused["early"], refused["optimum"]) == (True, None)
    assert "too early" in refused["refused"]


def test_what_is_no_run_from_the_beginning_or_not_yet_what_it_will_be() -> None:
    phases = [{"begin": 0, "end": 100, "lr": 1e-3, "warmup": 5, "decay": 20}]
    begun = {"phases": phases, "steps": 100, "batch_tokens": 512, "data": {"tokens": {"train": 25_600}}}
    assert "weights of another" in aim_of(resolve("tiny", {"train.init_from": "x"}).config, begun).never
    assert "adapters" in aim_of(resolve("tiny", {"train.lora.rank": 4, "model.kind": "dense"}).config, begun).never
    anneal = aim_of(resolve("tiny", {"model.mod.anneal": 0.2, "train.steps": 100}).config, begun)
    assert (anneal.settled, anneal.because, anneal.never) == (20, "the depth that settles", "")
    assert aim_of(resolve("tiny").config, begun) == Aim(Schedule("wsd", (Part(0, 100, 1e-3, 5, 20),)), epochs=2.0)


def test_noise_alone_is_finite() -> None:
    flat = replace(curve(500), losses=np.full(100, 3.0))
    found = said(flat, AIM)
    assert math.isfinite(found.train.mid)
    assert found.train.low < found.train.high
