"""Each detector hears what it is for, once it can, and nothing else: on runs that are sound but for one thing."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from watched import FACTS, MOD, MOE, look, seen, watched

from lumina.orchestrator.detectors.table import DETECTORS
from lumina.orchestrator.finding import Finding
from lumina.orchestrator.signals import Facts, Signals

TABLE = {one.name: one for one in DETECTORS}


def heard(signals: Signals) -> dict[str, Finding]:
    return {one.name: found for one in DETECTORS if (found := one(signals)) is not None}


def feed(signals: Signals, steps: int, **changes: Any) -> list[tuple[int, dict[str, Finding]]]:
    """More steps, each with these values (functions are of the step); the steps in which something was heard."""
    said = []
    for step in range(signals.step + 1, signals.step + steps + 1):
        signals.observe(seen(step, **{name: f(step) if callable(f) else f for name, f in changes.items()}))
        if found := heard(signals):
            said.append((step, found))
    return said


def test_a_sound_run_is_silent() -> None:
    assert feed(Signals(FACTS), 1000) == []


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 5, 300])
@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"loss": math.inf}, {"grad_norm": math.nan}])
def test_what_is_not_finite_is_heard_in_its_step_from_the_first_on(step: int, bad: dict[str, float]) -> None:
    signals = watched(step - 1)
    (at, found), *_ = feed(signals, 1, skipped=True, **bad)
    assert at == step
    assert found["non_finite"].hard
    assert not found["non_finite"].values["lasting"]
    assert feed(signals, 200) == []  # nothing is poisoned


def test_twice_in_a_row_it_is_the_state() -> None:
    signals = watched(100)
    _, (at, found) = feed(signals, 2, loss=math.nan, skipped=True)
    assert (at, found["non_finite"].since) == (102, 101)
    assert found["non_finite"].values["lasting"]


def test_an_overflow_of_fp16_is_no_fault() -> None:
    signals = watched(100, loss_scale=65536.0)
    assert feed(signals, 1, grad_norm=math.inf, skipped=True, loss_scale=65536.0) == []


def test_a_spike_is_heard_in_its_step_and_is_soft() -> None:
    signals = watched(300)
    (at, found), *rest = feed(signals, 1, loss=4.0, grad_norm=8.0)
    assert list(found) == ["spike"]
    assert (at, found["spike"].hard, rest) == (301, False, [])
    assert feed(signals, 300) == []


def test_loss_and_norm_together_are_heard_sooner_than_the_loss_alone() -> None:
    signals = watched(300)
    level, spread = signals.loss.expected() or (0, 0)
    loss = math.exp(level + 7 * spread)
    assert feed(watched(300), 1, loss=loss) == []
    assert [list(found) for _, found in feed(watched(300), 1, loss=loss, grad_norm=8.0)] == [["spike"]]


def test_exploding_gradients_are_heard_when_they_last() -> None:
    assert feed(watched(300), 1, grad_norm=1000.0) == []
    (at, found), *_ = feed(watched(300), 10, grad_norm=1000.0)
    assert (at, list(found)) == (303, ["explosion"])


# -- divergence ------------------------------------------------------------------------------------------------------


def test_a_loss_that_leaves_and_stays_away_is_divergence() -> None:
    said = feed(watched(300), 200, loss=lambda step: seen(step).loss + 1.0)
    at, found = next((at, found) for at, found in said if "divergence" in found)
    assert 350 < at <= 400
    assert found["divergence"].hard
    assert 280 <= found["divergence"].since <= 301


def test_one_that_comes_back_in_time_is_none() -> None:
    signals = watched(300)
    said = feed(signals, 60, loss=lambda step: seen(step).loss + 3.0 * math.exp(-(step - 300) / 20))
    said += feed(signals, 300)
    assert not [found for _, found in said if "divergence" in found]


def test_one_that_comes_back_too_slowly_is_divergence_after_all() -> None:
    said = feed(watched(300), 140, loss=lambda step: seen(step).loss + 4.0 * 0.99 ** (step - 300))
    assert next(at for at, found in said if "divergence" in found) <= 300 + 12 + 100


def test_worse_than_a_uniform_guess_is_divergence_sooner() -> None:
    said = feed(watched(300), 40, loss=8.0)
    assert min(at for at, found in said if "divergence" in found) <= 325


def test_the_beginning_of_a_run_is_worse_than_a_uniform_guess_and_no_fault() -> None:
    signals = Signals(FACTS)
    assert feed(signals, 100, loss=5.7, stage="warmup") == []


def test_divergence_is_heard_in_warm_up_and_decay_where_soft_rules_are_silent() -> None:
    for stage in ("warmup", "decay"):
        said = feed(watched(300, stage=stage), 120, loss=lambda step: seen(step).loss + 2.0, stage=stage)
        assert [at for at, found in said if "divergence" in found]
        assert stage == "decay" or not [at for at, found in said if "spike" in found]


def test_noise_is_known_before_a_loss_is_held_against_its_best() -> None:
    """Batches of one or two short conversations: the first medians are luck."""
    for seed in range(40):
        noise = random.Random(seed)
        said = feed(Signals(FACTS), 200, loss=lambda step, noise=noise: 1.6 * math.exp(noise.gauss(0, 0.6)))
        assert not [found for _, found in said if "divergence" in found], seed


def test_what_becomes_harder_by_plan_is_no_divergence() -> None:
    facts = FACTS._replace(paced=400)
    signals = watched(300, facts)
    assert not [at for at, found in feed(signals, 100, loss=lambda step: 2.0 + step / 400) if "divergence" in found]
    said = feed(signals, 200, loss=3.0)
    said += feed(signals, 100, loss=4.5)
    assert min(at for at, found in said if "divergence" in found) > 600  # held against what it was when that ended


def test_a_rate_that_warms_up_again_is_not_held_against_what_had_decayed() -> None:
    facts = FACTS._replace(adopted=True)
    signals = Signals(facts)
    said = feed(signals, 150, stage="warmup", loss=lambda step: 1.0 + 0.6 * step / 150)
    said += feed(signals, 150, loss=lambda step: 1.6 * seen(step).loss / 2.0)
    assert not [found for _, found in said if "divergence" in found]


# -- the forecast ----------------------------------------------------------------------------------------------------


def forecast(signals: Signals, *z: float, nats: float = 0.2, apart: int = 40, slope: float = 0.0) -> list[str]:
    """Looks at these deviations; what was heard at the last."""
    for value in z:
        first = signals.step
        feed(signals, apart, loss=lambda step, first=first: seen(step).loss + slope * (step - first))
        found = {"nats": nats, "z": value, "points": 10, "against": "itself"}
        signals.forecast({"t": "forecast", "step": signals.step, "deviation": found})
    return [name for name in ("drift", "plateau") if TABLE[name](signals)]


def test_drift_and_plateau_need_two_looks_far_off_in_deviations_and_in_nats() -> None:
    assert forecast(watched(300), 6.0) == []
    assert forecast(watched(300), 6.0, 2.1, 6.0) == []  # |z| beyond 2 in 21 % of healthy looks
    assert forecast(watched(300), 6.0, 6.0, nats=0.05) == []
    assert forecast(watched(300), 6.0, 6.0) == ["plateau"]
    assert forecast(watched(300), 6.0, 6.0, slope=0.02) == ["drift"]
    assert forecast(watched(300), -6.0, -6.0) == []


def test_no_improvement_alone_is_no_plateau() -> None:
    """H7: losses stand still before they fall; without a forecast that says otherwise nothing is heard."""
    assert feed(watched(300), 600, loss=lambda step: 2.0 * math.exp(0.05 * math.sin(step))) == []


def test_the_decay_has_no_plateau() -> None:
    signals = watched(300)
    forecast(signals, 6.0, 6.0)
    signals.observe(seen(signals.step + 1, stage="decay"))
    assert not TABLE["plateau"](signals)


# -- the learning rate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [10.0, 0.02])
def test_a_rate_that_jumped_is_heard_as_often_as_it_is_asked_for(times: float) -> None:
    signals = watched(300)
    said = feed(signals, 260, lr=3e-3 * times, update_ratio=1e-3 * times)
    assert (said[0][0], list(said[0][1])) == (320, ["pace"])
    found = said[0][1]["pace"]
    assert (found.since, found.hard) == (301, False)
    assert found.values["times"] == pytest.approx(times)
    assert found.values["update_ratio"] == pytest.approx(times * found.values["update_ratio_before"])
    assert [at for at, found in said if "pace" in found] == list(range(320, 561))  # what it was is not forgotten
    assert feed(signals, 50) == []  # it came back


def test_no_rate_that_was_planned_to_change_is_a_jump() -> None:
    assert feed(watched(300), 1, changed="lr.scale=0.1@301", lr=3e-4) == []
    signals = watched(300)
    signals.observe(seen(301, changed="lr.scale=0.1@301", lr=3e-4))
    assert feed(signals, 300, lr=3e-4) == []
    cosine = watched(300)
    assert feed(cosine, 300, lr=lambda step: 1.5e-3 * (1 + math.cos(math.pi * (step - 300) / 301))) == []
    assert feed(watched(300), 300, lr=lambda step: 3e-3 * (601 - step) / 301, stage="decay") == []
    assert feed(watched(300), 300, lr=lambda step: 3e-2 if step % 30 == 0 else 3e-3) == []  # one step at a time


def test_a_jump_within_a_falling_rate_is_known_by_its_size() -> None:
    said = feed(watched(300), 60, lr=lambda step: 3e-2 * 0.99 ** (step - 300))
    assert said[0][1]["pace"].values["times"] == pytest.approx(10, rel=0.02)


# -- routers ---------------------------------------------------------------------------------------------------------

FAIR = ((1.1, 0.9, 1.05, 0.95), (1.2, 0.9, 0.9, 1.0))


def first(said: list[tuple[int, dict[str, Finding]]], rule: str) -> int | None:
    return next((at for at, found in said if rule in found), None)


def test_a_starved_expert_is_heard_after_a_thousand_steps_a_dead_one_after_300() -> None:
    for load, least, most in ((0.05, 1600, 1700), (0.001, 900, 1000)):
        poor = (FAIR[0], (1.4, 1.4, load, 1.2 - load))
        said = feed(watched(600, MOE, load=FAIR), 1400, load=poor)
        at = first(said, "starvation")
        assert at is not None
        assert least <= at <= most


def test_an_expert_that_had_its_share_and_gets_nothing_is_heard_sooner() -> None:
    dead = (FAIR[0], (1.4, 1.4, 0.0, 1.2))
    at, found = next((at, found) for at, found in feed(watched(230, MOE, load=FAIR), 200, load=dead))
    assert (at, list(found)) == (330, ["starvation"])
    assert (found["starvation"].since, found["starvation"].values["dead"]) == (231, [[1, 2]])
    seldom = {"load": lambda step: dead if step % 100 else FAIR}  # a domain of the data that comes now and then
    assert feed(watched(230, MOE, load=FAIR), 240, **seldom) == []
    assert feed(Signals(MOE), 490, load=dead) == []  # it never had any


def test_biases_have_time_to_balance_before_anything_is_heard() -> None:
    """0.5 / bias_rate = 500 steps: a run begins unbalanced."""
    assert feed(Signals(MOE), 490, load=((3.9, 0.1, 0.0, 0.0),)) == []


def test_collapse_is_heard_when_few_experts_get_most() -> None:
    said = feed(watched(600, MOE, load=FAIR), 500, load=(FAIR[0], (1.9, 1.7, 0.2, 0.2)))
    at = first(said, "collapse")
    assert at is not None
    assert 900 <= at <= 1000


def test_a_collapse_of_what_was_even_is_heard_sooner_and_again() -> None:
    said = feed(watched(230, MOE, load=FAIR), 400, load=((2.0, 1.9, 0.1, 0.0), FAIR[1]))
    found = [(at, one["collapse"]) for at, one in said if "collapse" in one]
    assert (found[0][0], found[0][1].since, found[0][1].values["layers"]) == (350, 231, [0])
    assert found[-1][0] > 600
    assert feed(Signals(MOE), 490, load=((2.0, 1.9, 0.1, 0.0),)) == []  # it never was even
    one = ((1.96, 0.7, 0.7, 0.64),)
    assert first(feed(watched(230, MOE, load=FAIR[:1]), 200, load=one), "collapse") == 350
    assert first(feed(watched(230, MOE, load=FAIR[:1]), 400, load=((1.8, 0.7, 0.7, 0.8),)), "collapse") is None


def test_routers_that_get_another_gradient_are_heard_as_long_as_they_do() -> None:
    signals = watched(230, MOE, load=FAIR, grad_router=0.05)
    said = feed(signals, 400, load=FAIR, grad_router=5.0)
    assert (said[0][0], list(said[0][1])) == (240, ["router_gradient"])
    assert said[-1][0] == 630
    assert said[-1][1]["router_gradient"].values["times"] == pytest.approx(100)
    assert feed(watched(230, MOE, load=FAIR, grad_router=0.05), 400, load=FAIR, grad_router=0.4) == []
    depth = watched(230, MOD, grad_router=0.05)
    assert feed(depth, 100, grad_router=5.0) == []  # those of depth are led by the loss alone


def test_routers_more_even_than_chance_are_heard() -> None:
    said = feed(watched(600, MOE, load=FAIR), 200, load=((1.0, 1.0, 1.0, 1.0),) * 2)
    assert first(said, "over_balance") is not None


def test_few_assignments_are_noise_and_not_heard() -> None:
    """A batch of 16 tokens: an expert that is not met in a hundred steps may have had no chance."""
    tiny = Facts(vocab=260, batch_tokens=16, top_k=1, bias_rate=1e-2)
    assert feed(watched(100, tiny, load=FAIR), 300, load=((4.0, 0.0, 0.0, 0.0),)) == []


def test_depth_routing_outside_its_band_is_heard() -> None:
    sound = {"capacity": (0.25, 0.28), "agreement": 0.9}
    assert feed(watched(300, MOD, **sound), 200, **sound) == []
    said = feed(watched(300, MOD, **sound), 60, capacity=(0.25, 0.7), agreement=0.9)
    assert first(said, "mod_capacity") is not None
    said = feed(watched(300, MOD, **sound), 60, capacity=(0.25, 0.28), agreement=0.7)
    assert first(said, "mod_agreement") is not None
    assert feed(watched(300, MOD, **sound), 1, capacity=(math.nan, math.nan), agreement=None) == []
    annealing = MOD._replace(settles=400)
    assert feed(watched(300, annealing, **sound), 60, capacity=(1.0, 1.0), agreement=0.9) == []
    assert feed(Signals(MOD), 200, capacity=(0.9, 0.05), agreement=lambda step: 1 - step / 400) == []  # it still learns


# -- data and invariants ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [1, 4])
def test_a_stuck_loader_is_heard_within_a_few_batches(period: int) -> None:
    said = feed(watched(300), 20, content=lambda step: f"again {step % period}")
    at, found = said[0]
    assert at == 300 + period + 3
    assert found["loader"].hard
    assert found["loader"].since == 300 + period + 1  # the first that came again
    assert found["loader"].values["period"] == period


def test_a_loader_that_is_stuck_soon_is_heard_later() -> None:
    said = feed(watched(9), 40, content="again")
    assert (said[0][0], list(said[0][1])) == (9 + 1 + 12, ["loader"])


def test_epochs_of_a_few_windows_in_another_order_each_are_no_stuck_loader() -> None:
    orders = ["abc", "bca", "cab", "acb", "bac", "cba"]
    assert feed(Signals(FACTS), 1000, content=lambda step: random.Random(step).choice(orders)) == []
    assert feed(Signals(FACTS), 300, content="all the data there is") == []


def test_the_golden_batch_apart_from_held_out_text_is_heard() -> None:
    signals = watched(100)
    for n in range(6):
        signals.looked(look(20 * n, golden=2.1 + 0.01 * n))
        assert "golden" not in heard(signals)
    signals.looked(look(120, golden=3.0))
    assert heard(signals)["golden"].values["threshold"] == pytest.approx(0.3)
    assert not heard(signals)["golden"].hard


def test_attention_beyond_its_bound_is_heard_and_hard_if_it_jumped() -> None:
    signals, last = watched(19), None
    for step, largest, hard in ((20, 30.0, None), (40, 99.0, None), (60, 120.0, False), (80, 370.0, True)):
        signals.looked(look(step, attention=largest))
        assert "attention" not in heard(signals)  # the look's own step is not observed yet
        for at in range(step, step + 20):
            signals.observe(seen(at))
            found = heard(signals).get("attention")
            assert (found and found.hard) == (hard if at == step else None)
            last = found or last
    assert last
    assert (last.since, last.values["last"], last.values["threshold"]) == (61, 120.0, 100.0)
    alone = watched(19)
    alone.looked(look(20, attention=500.0))
    alone.observe(seen(20))
    assert not heard(alone)["attention"].hard  # nobody knows whether it jumped


def test_held_out_and_golden_that_rise_together_are_not_the_way_of_data() -> None:
    signals = watched(100)
    for n in range(8):
        signals.looked(look(20 * n, loss=2.0 + n, golden=2.1 + n))
        assert "golden" not in heard(signals)


def test_broken_invariants_are_heard_at_once_and_those_of_routers_only_told() -> None:
    one, two = feed(Signals(FACTS), 2, broken=("schedule: the optimizer moved at lr 0.3, planned is 0.003",))
    assert [found["invariant"].hard for _, found in (one, two)] == [False, True]  # one step may heal
    assert one[1]["invariant"].values["broken"] == ["schedule"]
    (_, found), *_ = feed(Signals(FACTS), 1, broken=("config: the optimizer has eps 0.1",))
    assert found["invariant"].hard
    (_, found), *_ = feed(watched(9), 1, broken=("router bias: the mean of x moved by 3",))
    assert not TABLE["invariant"].find(watched(9))
    assert not found["invariant"].hard
    signals = watched(40)
    signals.looked(look(20))
    signals.looked(look(40, broken=("replicas: processes 1 hold other values than process 0",)))
    assert heard(signals)["looked"].since == 21  # after the last look that was sound
