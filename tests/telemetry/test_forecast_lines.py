"""What a person reads of forecasts: one line in ten of a run, a refusal once, what is wrong at once."""

from __future__ import annotations

from typing import Any

from lumina.telemetry.console import Console

SAID: dict[str, Any] = {
    "t": "forecast", "attempt": 0, "step": 200, "share": 0.2, "refused": None, "early": False, "level": 0.8,
    "train": {"low": 2.9, "mid": 3.0, "high": 3.1}, "heldout": {"low": 3.0, "mid": 3.1234, "high": 3.25},
    "decay_now": {"cost": {"low": 0.05, "mid": 0.08, "high": 0.11}, "end": 600, "saved": 400},
    "optimum": {"law": "besiroglu", "tokens": 1000, "share": 0.43}, "deviation": None,
}  # fmt: skip


def printed(*events: dict[str, Any], step_seconds: float | None = 2.0) -> list[str]:
    lines: list[str] = []
    console = Console(10, lines.append)
    console.steps, console.step_time = 1000, step_seconds
    for event in events:
        console(event)
    return lines


def test_a_forecast_is_a_sentence_with_its_interval() -> None:
    assert printed(SAID) == [
        "[Forecast 200] final held-out loss 3.123 (3.000 to 3.250, 80%) | start the decay now and lose 0.080 ± 0.030 "
        "nats, 13m20s sooner | 43% of the tokens that are optimal by besiroglu"
    ]
    plain = SAID | {"heldout": None, "decay_now": None, "optimum": None}
    assert printed(plain) == ["[Forecast 200] final training loss 3.000 (2.900 to 3.100, 80%)"]
    assert "400 steps sooner" in printed(SAID, step_seconds=None)[0]


def test_one_in_ten_of_a_run_is_told() -> None:
    many = [SAID | {"step": 20 * n, "share": n / 50} for n in range(10, 50)]
    assert len(printed(*many)) == 8


def test_a_refusal_is_told_once_and_that_it_is_over() -> None:
    early = {"t": "forecast", "step": 50, "share": 0.05, "refused": "too early", "early": True}
    changed = early | {"step": 300, "share": 0.3, "refused": "behind step 290 the run is another", "early": False}
    again = SAID | {"step": 320, "share": 0.32}
    lines = printed(early, SAID, SAID | {"share": 0.25}, changed, changed | {"step": 310}, again)
    assert [line.split("]")[0] for line in lines] == ["[Forecast 200", "[Forecast 300", "[Forecast 320"]
    assert lines[1] == "[Forecast 300] none: behind step 290 the run is another"


def test_losses_that_are_not_what_they_should_be_are_told_when_they_begin_to() -> None:
    off = {"nats": 0.123, "z": 5.1, "points": 10, "against": "its own earlier losses"}
    events = [SAID, *(SAID | {"step": n, "share": n / 1000, "deviation": off} for n in (220, 240))]
    assert printed(*events)[1:] == [
        "! step 220: the newest losses are 0.123 nats above what its own earlier losses lead to, "
        "5.1 standard deviations"
    ]
    assert len(printed(SAID | {"deviation": off | {"z": 2.0}})) == 1
