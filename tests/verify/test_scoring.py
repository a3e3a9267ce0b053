"""Scores say what happened: what hurts, what was rescued, who is best, and how sure that is."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from lumina.errors import UserError
from lumina.verify.gauntlet import page
from lumina.verify.gauntlet.arms import Arm, Result
from lumina.verify.gauntlet.cases import HEALTHY
from lumina.verify.gauntlet.scoring import measures, regret, scores, sigmas, soon, wilson


def made(case: str, seed: int, loss: float, mode: str = "act", *actions: str, **more: Any) -> Result:
    arm = Arm(case, more.pop("kind", "dense"), seed, mode)
    said = {"step": arm.step + 3, "kind": "act", "rule": "r", "cause": more.pop("cause", "data")}
    decisions = [said | {"action": action} for action in actions]
    return Result(arm, loss, decisions=decisions, **more)


def healthy(case: str = HEALTHY.name, kind: str = "dense") -> list[Result]:
    return [made(case, seed, 2.0 + 0.1 * seed, "off", kind=kind) for seed in (1, 2, 3)]


def test_faults_are_scored_above_the_healthy_run_of_the_same_seed_if_they_hurt() -> None:
    results = healthy() + [made("junk", seed, loss, "off") for seed, loss in ((1, 2.7), (2, 2.7), (3, math.inf))]
    results += [made("junk", 1, 2.29, "act", "rewind_skip"), made("junk", 2, 2.41), made("junk", 3, math.inf)]
    (junk,) = scores(results)
    assert sigmas(results) == {(HEALTHY.name, "dense"): pytest.approx(0.1)}
    assert junk.excess == [pytest.approx(1.9), pytest.approx(2.1), math.inf]
    assert (junk.good, junk.right, junk.delays) == ([True, False, False], 1, [3, math.inf, math.inf])
    assert (junk.hurt, junk.hurts) == ([True, True, True], True)
    assert junk.avoided == [pytest.approx(1 - 1.9 / 6), pytest.approx(1 - 2.1 / 5), 0.0]
    text = page.page(results, "lumina gauntlet")
    assert "1.9 2.1 inf" in text
    assert "act: 1 of 3 runs that faults hurt rescued (6 to 79 %)" in text
    plain = json.loads(json.dumps(page.as_json(results), allow_nan=False))
    assert (plain["scores"][0]["hurt"], plain["scores"][0]["excess"][2]) == ([True, True, True], "inf")


def test_what_does_not_hurt_on_average_is_harmless() -> None:
    results = healthy() + [
        made("junk", seed, 2.0 + 0.1 * seed + over, "off") for seed, over in ((1, 0.5), (2, 0), (3, 0))
    ]
    results += [made("junk", 1, 2.1, "act", "rewind_skip"), made("junk", 2, 2.2), made("junk", 3, 2.3)]
    (one,) = measures(scores(results))
    assert (one.rescued, one.touched, one.by_letter) == ((0, 0), (0, 0), (1, 3))
    assert "| junk | dense | 5.0 0.0 0.0 | 1 of 3 | harmless |" in page.page(results[:6], "")
    results[3] = made("junk", 1, 2.1 + 1.3, "off")
    (one,) = measures(scores(results))
    assert (one.rescued, one.by_letter) == ((1, 1), (0, 0))  # one is hurt; who was not says nothing of either


def test_to_act_on_a_harmless_fault_is_no_rescue_and_by_the_letter_a_false_intervention() -> None:
    results = healthy() + [made("wrong eps", seed, 2.05 + 0.1 * seed, "off") for seed in (1, 2, 3)]
    assert "| wrong eps | dense | 0.5 0.5 0.5 | 0 of 3 | harmless |" in page.page(results, "")
    results += [made("wrong eps", 1, 2.1, "act", "restore", cause="config"), made("wrong eps", 2, 2.25)]
    results += [made("wrong eps", 3, 2.9, "act", "restore", cause="config"), made("cosine", 1, 2.2, "off")]
    results += [made("cosine", 1, 2.2)]
    (one,) = measures(scores(results))
    assert (one.rescued, one.touched, one.by_letter, one.restored) == ((0, 0), (0, 1), (2, 4), (1, 2))
    text = page.page(results, "")
    assert "act: 1 of 2 harmless faults that were acted on set right (9 to 91 %)" in text
    assert "| healthy runs acted on | 0 of at least 60 | 0 of 1 (0 to 79 %) | no |" in text
    assert "| the same, harmless faults among them | 0 of at least 60 | 2 of 4 (15 to 85 %) | no |" in text


def test_a_trap_is_left_alone_if_nothing_was_done_to_the_bit() -> None:
    results = [made("cosine", seed, 2.2, "off") for seed in (1, 2, 3, 4)]
    results += [made("cosine", 1, 2.2), made("cosine", 2, 2.2, "act", "rewind_replay", "skip_step")]
    results += [made("cosine", 3, 2.2000001), made("cosine", 4, 2.2, failed="ValueError: planted")]
    (cosine,) = scores(results)
    assert (cosine.good, cosine.acted) == ([True, False, False, False], ["rewind_replay"])
    (one,) = measures([cosine])
    assert (one.touched, one.exact) == ((2, 4), (1, 4))
    assert "- cosine, dense, seed 4, act: ValueError: planted" in page.page(results, "")


def test_what_nothing_mends_is_to_be_stopped_with_the_right_cause() -> None:
    results = healthy() + [made("shifted targets", seed, 4.0, "off") for seed in (1, 2, 3)]
    results += [made("shifted targets", 1, math.inf, "act", "stop", stopped="looked")]
    results += [made("shifted targets", 2, math.inf, "act", "stop", stopped="looked", cause="router")]
    results += [made("shifted targets", 3, 2.3, "act", "rewind_skip")]
    (one,) = measures(scores(results))
    assert (one.stopped, one.rescued) == ((1, 3), (0, 0))


def test_what_crashed_while_it_was_watched_was_not_rescued_and_not_left_alone() -> None:
    results = healthy() + [made("junk", seed, 4.0, "off") for seed in (1, 2, 3)]
    results += [made("junk", seed, 2.1) for seed in (1, 2)] + [made("junk", 3, math.inf, crashed="planted")]
    results += [made("cosine", 1, 2.2, "off"), made("cosine", 1, math.inf, crashed="planted")]
    (one,) = measures(scores(results))
    assert (one.rescued, one.touched, one.exact) == ((2, 3), (1, 1), (0, 1))


def test_the_best_other_policy_is_held_against_the_same_runs() -> None:
    results = healthy() + [made("junk", seed, 4.0, "off") for seed in (1, 2, 3)]
    results += [made("junk", seed, loss) for seed, loss in ((1, 2.1), (2, 2.2), (3, 4.0))]
    results += [made("junk", seed, 2.2, "rewind") for seed in (1, 2)] + [made("junk", 1, 4.0, "zclip")]
    assert "| above the best other, rewind | more | 2 of 2 against 2 of 2 | no |" in page.page(results, "")
    results += [made("junk", 3, 4.0, "rewind")]
    assert "| above the best other, rewind | more | 2 of 3 against 2 of 3 | no |" in page.page(results, "")


def test_of_a_healthy_run_of_which_nothing_is_known_nothing_is_said() -> None:
    """No decisions and no run alone: it was not left alone for that. What crashed while it was watched was not."""
    results = [made("cosine", 1, 2.2, "theirs", told=False), made("cosine", 2, 2.2, "theirs", crashed="planted")]
    (one,) = measures(scores(results))
    assert (one.touched, one.exact) == ((1, 1), (0, 0))
    assert "| healthy runs acted on | 0 of at least 60 | 1 of 1 (21 to 100 %) | no |" in page.page(results, "")
    (one,) = measures(scores(results[:1]))
    assert one.touched == (0, 0)
    assert "| healthy runs acted on | 0 of at least 60 | not measured | - |" in page.page(results[:1], "")


def test_long_runs_are_judged_by_what_they_cost() -> None:
    def run(case: str, taken: float) -> Result:
        arm = Arm(case, "dense", 1, "act", "long")
        return Result(arm, 1.0, steps=40_000, taken=taken - arm.root.steps, shared=arm.root.steps)

    text = page.page([run("lr high", 41_900), run("healthy", 40_000)], "")
    assert "| steps beyond, long runs, broken | <= 5 % | 4.75 % at most, 1 runs | yes |" in text
    assert "| steps beyond, long runs, healthy | <= 0.5 % | 0.00 % at most, 1 runs | yes |" in text
    # What no run alone is there for is not known, and what the set lays down goes before the case's own.
    assert "| lr high | dense | act | - | - | - | - | 0 of 0 |" in text
    assert "| healthy | dense | act | - | nothing |" in text
    assert "train.steps=40000" in text
    assert "train.steps=1900" not in text


def test_latency_and_attribution_are_of_faults_that_hurt() -> None:
    results = healthy() + [made("junk", seed, 4.0, "off") for seed in (1, 2, 3)]
    results += [made("junk", 1, 2.1, "act", "rewind_skip"), made("junk", 2, 2.1, "act", "stop", cause="router")]
    results += [made("junk", 3, 4.0)]
    (one,) = measures(scores(results))
    assert one.right == (1, 3)
    assert dict(one.named) == {("data", "data"): 1, ("data", "router"): 1, ("data", "none"): 1}
    assert one.delays == {"divergence": [3, 3, math.inf]}
    assert (soon(one, "divergence"), soon(one, "hard")) == ((2, 3), (0, 0))


def test_regret_is_against_the_policy_that_rescues_most() -> None:
    results = healthy() + [made("junk", seed, 4.0, "off") for seed in (1, 2, 3)]
    ends = {"act": (2.15, 2.2, 2.3), "halve": (2.1, 2.9, 3.9), "rewind": (2.2, 2.2, 2.35), "zclip": (4.0, 4.0, 9.0)}
    results += [made("junk", seed, ends[mode][seed - 1], mode) for mode in ends for seed in (1, 2, 3)]
    found = regret(scores(results))
    assert found
    assert found.best == "rewind"
    assert found.against == [pytest.approx(-0.5), pytest.approx(0.0), pytest.approx(-0.5)]
    assert found.least == [pytest.approx(0.5), pytest.approx(0.0), pytest.approx(-0.5)]
    assert regret(scores([r for r in results if r.arm.mode in ("off", "act")])) is None
    assert "hindsight (rewind): -0.33 in the mean, 0.00 at most" in page.page(results, "")
    assert "| regret against rewind, sigma | <= 1 | -0.33 in the mean, 0.00 at most | yes |" in page.page(results, "")


def test_who_watches_is_compared_on_what_all_of_them_watched() -> None:
    results = [one for kind in ("dense", "moe") for one in healthy(kind=kind)]
    results += [made("junk", seed, 4.0, "off", kind=kind) for seed in (1, 2, 3) for kind in ("dense", "moe")]
    results += [made("junk", seed, 2.3, "act", kind=kind) for seed in (1, 2, 3) for kind in ("dense", "moe")]
    results += [made("junk", 1, 4.0, "zclip")]
    header, rows = page.watchers(scores(results))
    assert header[:2] == ["who", "rescued"]
    assert [row[1].split(" (")[0] for row in rows] == ["1 of 1", "0 of 1"]
    header, rows = page.watchers(scores(results, alone=True))
    assert {row[0]: row[1].split(" (")[0] for row in rows} == {"off": "0 of 1", "act": "1 of 1", "zclip": "0 of 1"}


def test_a_longer_case_is_held_against_healthy_runs_as_long() -> None:
    results = healthy("healthy limited", "moe") + [
        made(HEALTHY.name, seed, 1.0, "off", kind="moe") for seed in (1, 2, 3)
    ]
    results += [made("dead experts", 1, 2.6, "off", kind="moe"), made("dead experts", 1, 2.3, kind="moe")]
    (dead,) = scores(results)
    assert (dead.away, dead.excess) == ([pytest.approx(5.0)], [pytest.approx(2.0)])
    text = page.page(results, "")
    assert "healthy limited moe 0.1000 (3 runs)" in text
    assert "from one of steps 300 to 379 on, `train.steps=1900`, `model.moe.capacity=1.0`. A right diagnosis" in text


def test_what_is_not_there_says_nothing() -> None:
    """Neither a run that crashed, nor one that was not taken, nor healthy ones that came to no end."""
    results = [*healthy(), made(HEALTHY.name, 4, math.inf, "off"), made("junk", 1, 2.1), made("cosine", 1, 2.1)]
    results += [made("cosine", 2, math.inf, crashed="planted"), made("cosine", 2, math.inf, "off", crashed="planted")]
    assert sigmas(results) == {(HEALTHY.name, "dense"): pytest.approx(0.1)}
    (one,) = measures(scores(results))
    assert (one.rescued, one.exact, one.avoided) == ((0, 0), (0, 0), None)
    assert "- cosine, dense, seed 2, act: planted" in page.page(results, "")
    with pytest.raises(UserError, match="not to be mixed"):
        scores([*results, Result(Arm("junk", "dense", 1, "act", "held-out"), 2.0)])


def test_a_run_that_was_done_something_to_is_not_left_alone_whatever_it_says() -> None:
    """A policy that writes no decisions is known by its losses; and equal ends are not yet equal runs."""
    results = [made("cosine", seed, 2.2, "off", digest="a") for seed in (1, 2, 3)]
    results += [
        made("cosine", 1, 2.3, "zclip"),
        made("cosine", 2, 2.2, "zclip", digest="b"),
        made("cosine", 3, 2.2, "zclip"),
    ]
    (one,) = measures(scores(results))
    assert (one.touched, one.exact) == ((2, 3), (1, 3))


def test_the_first_decision_says_how_soon_it_was_heard() -> None:
    """Also where what follows is behind a way back, at an earlier step."""
    arm = Arm("lr high", "dense", 1, "act")
    heard = {"step": arm.step + 120, "kind": "act", "rule": "pace", "action": "rewind_replay", "cause": "learning rate"}
    found = Result(arm, 2.0, decisions=[heard, heard | {"step": arm.step - 40, "action": "lr.scale=0.1"}])
    assert (found.delay, len(found.about)) == (120, 2)
    assert Result(arm, 2.0, decisions=[heard], fault=arm.step + 100).delay == 20


def test_wilsons_interval() -> None:
    assert wilson(9, 10) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))
    assert wilson(60, 60)[1] == pytest.approx(1.0)


def test_a_trial_in_a_trap_that_kept_something_is_told() -> None:
    """Also if what it kept was undone later: it was not to be kept."""
    results = [*healthy(), *(made("cosine", seed, 2.0 + 0.1 * seed, "off") for seed in (1, 2, 3))]
    nothing, half = ({"kind": "verdict", "winner": winner} for winner in (None, "half"))
    tried: list[list[dict[str, Any]]] = [[nothing, {"kind": "refused", "reason": ""}], [half], []]
    results += [
        made("cosine", seed, 2.0 + 0.1 * seed, trials=[trial | {"undone": True} for trial in trials])
        for seed, trials in zip((1, 2, 3), tried, strict=True)
    ]
    (one,) = measures(scores(results))
    assert (one.kept, one.touched, one.exact) == ((1, 2), (0, 3), (3, 3))
    assert "| trials in traps that kept something | 0 | 1 of 2 (9 to 91 %) | no |" in page.page(results, "")


def test_without_decisions_nothing_is_known_of_latency_and_diagnoses() -> None:
    results = [*healthy(), *(made("junk", seed, 4.0, "off") for seed in (1, 2, 3))]
    results += [made("junk", seed, 2.1, "mine", told=False) for seed in (1, 2)] + [made("junk", 3, 2.1, "mine", "skip")]
    (one,) = measures(scores(results))
    assert (one.rescued, one.right, one.delays) == ((3, 3), (1, 1), {"divergence": [3]})
    text = page.page(results, "")
    assert "## Bars of `mine`" in text
    assert "| 3 of 3 | 1.056 | - | - | - | - | skip 1 |" in text
    assert "## Diagnoses of `mine`" in text
    assert "| heard, hard | <= 2 steps | not measured | - |" in text
    assert "| regret against the best fixed policy, sigma | <= 1 | not measured | - |" in text


def test_bars_are_for_whoever_is_judged_and_not_for_those_beside() -> None:
    results = [*healthy(), *(made("junk", seed, 4.0, mode) for seed in (1, 2, 3) for mode in ("off", "halve", "a:b"))]
    assert page.judged(scores(results)) == ["a:b"]
    assert list(page.as_json(results)["bars"]) == ["a:b"]
    assert page.as_json(results)["bars"]["a:b"][0]["is"] == "0 of 3 (0 to 56 %)"


def test_what_nobody_watches_of_a_trap_in_which_nothing_is_done_is_the_healthy_run() -> None:
    results = [*healthy("healthy long"), *(made("nothing", seed, 2.0 + 0.1 * seed) for seed in (1, 2, 3))]
    rows = page.watchers(scores(results, alone=True))[1]
    assert [(row[0], row[4]) for row in rows] == [("act", "0 of 3 (0 to 56 %)"), ("off", "0 of 3 (0 to 56 %)")]


def test_runs_that_are_not_as_they_have_to_be_are_named() -> None:
    results = [*healthy(), *(made("junk", seed, 4.0, "off") for seed in (1, 2, 3)), made("cosine", 1, 2.0, "off")]
    results += [made("junk", 1, 2.1), made("junk", 2, 3.0), made("cosine", 1, 2.1), made("moments lost", 1, 2.1)]
    results += [made("cosine", 1, 2.1, "halve")]
    wrong = ["junk, dense, 2, act", "cosine, dense, 1, act", "moments lost, dense, 1, act"]
    assert page.wrong(scores(results)) == wrong  # the last was not taken alone: nobody knows
    assert page.unknown(scores(results)) == ""
    assert page.unknown(scores(results[:1] + results[3:])) == (
        "No sigma is known of healthy dense: it takes three healthy runs, of other seeds."
    )
