"""Any unknown from the others: what is asked holds in the answer, and answers agree with one another."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from lumina.config.resolve import resolve
from lumina.errors import UserError
from lumina.model.cost import count
from lumina.planner import time
from lumina.planner.hardware import Fleet, parse_gpus
from lumina.planner.hyperparameters import bands
from lumina.planner.laws import law, params_of
from lumina.planner.question import ask
from lumina.planner.solve import LEAST_STEPS, Solved, Solver, as_yaml, asked

BESIROGLU = law("besiroglu")


def solve(fleet: Fleet, **known: Any) -> Solved:
    question = ask(**known)
    chosen = law(question.law or "besiroglu")
    return Solver(question, fleet, chosen, lambda config: time.step_time(config, fleet), lambda config: {}).solve()


H200, NODE = parse_gpus("H200"), parse_gpus("8xH100")


def run_seconds(solved: Solved, fleet: Fleet) -> float:
    return time.run_time(solved.config, time.step_time(solved.config, fleet), fleet).total.mid


def test_a_preset_keeps_what_it_says() -> None:
    solved = solve(NODE, source="b7")
    assert solved.changes == {}
    assert solved.tokens == pytest.approx(140e9, rel=1e-4)
    assert solved.config.train.steps == solved.tokens // 2097152
    settled = solve(NODE, source="debug", settings=["train.steps=300", "train.lr=1e-3"])
    assert settled.tokens == 300 * 4096
    assert settled.changes == {"train.steps": (300, "as asked"), "train.lr": (1e-3, "as asked")}


@pytest.mark.parametrize("compute", [1e17, 1e20, 1e23])
def test_compute_becomes_the_optimum_of_the_law(compute: float) -> None:
    solved = solve(H200, compute=compute)
    cost = count(solved.config.model)
    assert cost.flops_per_token * solved.tokens == pytest.approx(compute, rel=0.02)
    best = BESIROGLU.optimum(compute)
    assert params_of(cost, BESIROGLU) == pytest.approx(best.params, rel=0.05)
    assert solved.tokens == pytest.approx(best.tokens, rel=0.35)  # counted FLOPs are not 6ND


def test_parameters_tokens_and_compute_agree() -> None:
    by_params = solve(H200, params="1B")
    cost = count(by_params.config.model)
    assert cost.active == pytest.approx(1e9, rel=0.05)
    assert by_params.tokens == pytest.approx(BESIROGLU.tokens_for(params_of(cost, BESIROGLU)), rel=1e-4)
    both = solve(H200, params="1B", compute=cost.flops_per_token * by_params.tokens)
    assert both.tokens == pytest.approx(by_params.tokens, rel=1e-3)
    by_tokens = solve(H200, tokens=by_params.tokens)
    assert params_of(count(by_tokens.config.model), BESIROGLU) == pytest.approx(params_of(cost, BESIROGLU), rel=0.06)
    third = solve(H200, tokens="5B", compute=1e20)
    assert count(third.config.model).flops_per_token * 5e9 == pytest.approx(1e20, rel=0.02)
    assert third.tokens == pytest.approx(5e9, rel=1e-3)


def test_a_time_is_filled() -> None:
    for known in ({}, {"params": "300M"}, {"source": "b1"}, {"tokens": "30B"}):
        solved = solve(NODE, time="24h", **known)
        assert run_seconds(solved, NODE) == pytest.approx(0.95 * 86400, rel=0.06), known
    assert solve(NODE, time="24h", tokens="30B").tokens == pytest.approx(30e9, rel=1e-3)
    assert solve(NODE, time="48h", source="b1").tokens == pytest.approx(
        2 * solve(NODE, time="24h", source="b1").tokens, rel=0.01
    )


@pytest.mark.parametrize(
    ("known", "said", "way"),
    [
        ({"source": "b7", "time": "10s"}, "10 seconds hold not one step of b7 on 8xH100-SXM", "leave b7 out: --time"),
        ({"source": "b7", "time": "10m"}, "and 20 are needed", "leave b7 out: --time alone finds what fits"),
        ({"source": "b7", "settings": ["train.time=10s"]}, "10 seconds hold not one step", "give it 15"),
        ({"source": "b7", "budget": 1, "price": 100}, "4.5 seconds hold not one step", "leave b7 out: --budget"),
        ({"source": "b7", "compute": 1e17}, "1e+17 FLOP hold 1 step of b7", "leave b7 out: --compute"),
        ({"params": "7B", "time": "1s"}, "1 second holds not one step", "or more devices"),
        ({"tokens": "1T", "time": "1m"}, "no model of 12.7 parameters", "it goes from"),
    ],
)
def test_what_holds_no_run_is_refused_with_what_does(known: dict[str, Any], said: str, way: str) -> None:
    with pytest.raises(UserError) as caught:
        solve(NODE, **known)
    assert said in caught.value.message
    assert way in caught.value.fix


def test_what_is_said_to_be_enough_is_enough() -> None:
    with pytest.raises(UserError) as caught:
        solve(NODE, source="b7", time="10s")
    minutes = re.search(r"give it ([\d.]+) minutes", caught.value.fix)
    assert minutes is not None
    solved = solve(NODE, source="b7", time=f"{minutes[1]}m")
    assert solved.tokens // solved.config.train.batch_tokens == LEAST_STEPS
    assert run_seconds(solved, NODE) < 60 * float(minutes[1])


def test_a_budget_is_a_time_on_all_devices() -> None:
    bought = solve(NODE, source="b1", budget=480, price=2.5)  # 24 hours of 8
    assert bought.tokens == solve(NODE, source="b1", time="24h").tokens
    assert bought.changes["train.time"][0] == 86400
    assert "480 buy at 2.5" in bought.reasons[0]


def test_what_is_asked_as_time_is_written_as_time() -> None:
    changes = solve(NODE, time="24h").changes
    assert changes["train.time"][0] == 86400
    assert "train.tokens" not in changes
    assert "train.tokens" in solve(NODE, time="24h", tokens="30B").changes


def test_too_little_text_makes_a_smaller_model_that_reads_it_again() -> None:
    enough, little = (
        solve(H200, compute=1e20, tokens_available="100B"),
        solve(H200, compute=1e20, tokens_available="1B"),
    )
    assert enough.changes == solve(H200, compute=1e20).changes
    assert count(little.config.model).active < count(enough.config.model).active
    assert little.tokens > enough.tokens > 1e9
    assert "more than the 1e+09 there are" in little.reasons[0]


def test_the_middle_of_the_bands_is_chosen_in_whole_sequences_of_each_device() -> None:
    for fleet in (H200, NODE, parse_gpus("6xL4")):
        solved = solve(fleet, compute=1e19)
        found = bands(*asked(count(solved.config.model), solved.tokens))
        train, sequence = solved.config.train, solved.config.model.seq_len
        assert train.batch_tokens % (sequence * fleet.count) == 0
        middle = math.prod(band.batch_tokens for band in found) ** (1 / len(found))
        assert middle / 2 < train.batch_tokens < 2 * middle
        rates = [band.lr for band in found if band.lr]
        assert min(rates) <= train.lr <= max(rates)


def test_a_setting_may_not_say_what_is_looked_for() -> None:
    for settings, known in (
        (["model.width=512"], {"params": "1M"}),
        (["train.tokens=5B"], {"compute": 1e20}),
        (["train.steps=5"], {"time": "1h"}),
    ):
        with pytest.raises(UserError, match="follows from --"):
            solve(H200, settings=settings, **known)
    solved = solve(H200, params="1M", settings=["train.lr=0.02", "model.vocab=512", "train.batch_tokens=8192"])
    assert (solved.config.train.lr, solved.config.model.vocab, solved.config.train.batch_tokens) == (0.02, 512, 8192)


def test_the_law_decides() -> None:
    found = {name: solve(H200, compute=1e22, law=name).tokens for name in ("besiroglu", "hoffmann", "hoffmann-rounded")}
    assert found["besiroglu"] < found["hoffmann"] < found["hoffmann-rounded"]
    with pytest.raises(UserError, match="kaplan"):
        solve(H200, compute=1e22, law="kaplan")


@pytest.mark.parametrize(
    "known",
    [
        {"compute": 1e19},
        {"time": "2h", "kind": "hybrid"},
        {"source": "b1", "tokens": "3B"},
        {"params": "5M", "settings": ["train.optimizer=adamw"]},
    ],
)
def test_the_file_is_the_plan(known: dict[str, Any], tmp_path: Path) -> None:
    solved = solve(NODE, **known)
    file = tmp_path / "plan.yaml"
    file.write_text(as_yaml(solved, "lumina plan"))
    read = resolve(file).config
    assert read == solved.resolved.config
    assert all(why in file.read_text() for _, why in solved.changes.values())
