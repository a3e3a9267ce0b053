"""The console says what matters, in the format that the documentation shows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lumina.telemetry.console import Console
from lumina.telemetry.figures import count, duration, size

STEP: dict[str, Any] = {
    "t": "step", "attempt": 0, "step": 100, "tokens": 819200, "wall": 60.0, "loss": 2.4561, "acc": 0.4521,
    "lr": 2.8e-4, "grad_norm": 0.923, "tok_s": 41234.0, "mfu": 0.313, "mem": 6.1 * 2**30, "bal": 1.083, "agree": None,
}  # fmt: skip


def printed(*events: dict[str, Any], log_every: int = 10, steps: int = 1000) -> list[str]:
    lines: list[str] = []
    console = Console(log_every, lines.append)
    console.steps = steps
    for event in events:
        console(event)
    return lines


def test_units() -> None:
    assert [count(x) for x in (0, 999, 1234, 2.5e6, 7e9, 1e12)] == ["0", "999", "1.23k", "2.5M", "7B", "1T"]
    assert [duration(x) for x in (0.4, 59, 61, 8040)] == ["0s", "59s", "1m01s", "2h14m"]
    assert [size(x) for x in (10, 2048, 3 * 2**20, 6.1 * 2**30)] == ["10 B", "2 KiB", "3 MiB", "6.1 GiB"]


def test_step_line() -> None:
    before = STEP | {"step": 90, "wall": 0.0}
    assert printed(before, STEP)[-1] == (
        "[Step 100] Loss: 2.456 | Perplexity: 11.66 | Accuracy: 45.2% | lr 2.8e-4 | gnorm 0.92 | "
        "41.2k tok/s | MFU 31% | 6.1 GiB | bal 1.08 | ETA 1h30m"
    )


def test_a_model_without_experts_has_no_balance() -> None:
    assert "bal" not in printed(STEP | {"bal": None})[0]


def test_only_every_so_many_steps_the_first_and_the_last() -> None:
    lines = printed(*(STEP | {"step": n} for n in range(1, 26)), steps=25)
    assert [line.split("]")[0] for line in lines] == ["[Step 1", "[Step 10", "[Step 20", "[Step 25"]


def test_a_loss_that_is_not_a_number_is_still_a_line() -> None:
    assert "Loss: nan | Perplexity: nan" in printed(STEP | {"loss": math.nan})[0]


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        (13.8, "984609.11"),
        (13.9, "1.09e+06"),
        (475.309, "2.66e+206"),
        (1e6, "inf"),
        (math.inf, "inf"),
        (-800.0, "0.00"),
    ],
)
def test_a_loss_that_ran_away_is_still_a_short_line(loss: float, shown: str) -> None:
    evaluated = {"t": "eval", "step": 100, "loss": loss, "ppl": 1e304, "acc": 0.1, "bpb": 1.0, "seconds": 1.0,
                 "heldout_tokens": 9, "mod_capacity": [], "comparable": True, "split": "heldout",
                 "data": "text"}  # fmt: skip
    for line in printed(STEP | {"loss": loss}, evaluated):
        assert f"| Perplexity: {shown} |" in line


def test_a_skipped_step_is_a_sentence() -> None:
    event = {
        "t": "decision",
        "step": 7,
        "rule": "non_finite",
        "action": "skip_step",
        "evidence": {"loss": math.nan, "grad_norm": math.inf},
    }
    assert printed(event) == ["! step 7: loss nan or gradient norm inf is not finite; no weight was moved"]


def test_a_decision_without_a_sentence_of_its_own_says_its_reason() -> None:
    event = {"t": "decision", "step": 7, "rule": "hand", "action": "lr.scale=0.5", "evidence": {}, "reason": "too fast"}
    assert printed(event) == ["! step 7: lr.scale=0.5 (hand) too fast"]
    del event["reason"]
    assert printed(event) == ["! step 7: lr.scale=0.5 (hand)"]


def test_unknown_events_are_ignored() -> None:
    assert printed({"t": "nothing", "step": 3}) == []


def test_a_trial_that_begins_says_what_it_tries_and_what_that_may_cost() -> None:
    arms = [{"asks": "lr.scale=0.1"}, {"asks": "clip=0.5"}]
    event = {"t": "trial", "kind": "begin", "step": 420, "rule": "pace", "arms": arms, "pairs": 3, "steps": 100}
    said = "! step 420: pace; on trial: lr.scale=0.1, clip=0.5, in 3 pairs of 100 steps and a probe of 100: "
    more = {"probe": 100, "cost": 1871, "left": 2400}
    assert printed(event | more) == [said + "up to 1,871 steps' worth of compute, of 2,400 left"]
    assert printed({"t": "trial", "kind": "refused", "step": 3}) == []


def test_a_save_says_what_the_steps_waited_and_what_the_disk_did_not_give_back() -> None:
    saved = {
        "t": "checkpoint", "step": 40, "bytes": 3 << 20, "seconds": 1.5, "stall": 0.25, "waited": 0.0, "way": "inline",
        "bandwidth": 2 << 20, "verified": True, "slowed": 0.1, "stall_steps": 0.72,
    }  # fmt: skip
    line = "[Save 40] 3 MiB | steps waited 0.25s (0.7 steps) | on disk after 1.50s (2 MiB/s, inline)"
    assert printed(saved) == [line]
    problem = "state.json has other bytes than were saved"
    damaged = saved | {"verified": False, "problems": [problem]}
    assert printed(damaged) == [line, f"! checkpoint of step 40: {problem}"]
