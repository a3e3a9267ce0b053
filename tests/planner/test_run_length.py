"""`train.tokens=chinchilla`, and what a run says of text that it reads more than once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lumina.config.resolve import resolve, settle
from lumina.errors import UserError
from lumina.model.cost import count
from lumina.planner import own
from lumina.planner.laws import LAWS, params_of, to_values
from lumina.planner.length import optimal_length, optimal_tokens, repetition

CHINCHILLA = {"train.tokens": "chinchilla"}


@pytest.mark.parametrize("kind", ["dense", "moe", "mod", "hybrid"])
def test_the_optimum_is_that_of_the_law_in_its_count(kind: str) -> None:
    resolved = resolve("debug", CHINCHILLA | {"model.kind": kind})
    law = LAWS["besiroglu"]
    params = params_of(count(resolved.config.model), law)
    ((key, (steps, why)),) = optimal_length(resolved.config, 10**6).items()
    tokens = steps * resolved.config.train.batch_tokens
    assert key == "train.steps"
    assert abs(tokens - law.tokens_for(params)) <= resolved.config.train.batch_tokens / 2
    assert law.optimum(6 * params * law.tokens_for(params)).params == pytest.approx(params)
    assert f"{params:.4g} parameters" in why
    assert f"{tokens / 1e6:.3g} epochs" in why
    settled = settle(resolved, {key: (steps, why)})
    assert (settled.config.train.steps, settled.config.train.tokens) == (steps, None)
    low, mid, high = optimal_tokens(resolved.config)
    assert low < mid < high


def test_ones_own_law_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMINA_CACHE", str(tmp_path))
    config = resolve("debug", CHINCHILLA).config
    before = optimal_length(config, 10**6)["train.steps"]
    own.write(to_values(LAWS["hoffmann"]) | {"name": "own", "source": "my runs"})
    after = optimal_length(config, 10**6)["train.steps"]
    assert after[0] != before[0]
    assert "by own" in after[1]


def test_less_than_a_step_is_one() -> None:
    config = resolve("tiny", CHINCHILLA | {"train.batch_tokens": 2**30}).config
    assert optimal_length(config, 10**6)["train.steps"][0] == 1


@pytest.mark.parametrize("other", [{"train.lora.rank": 4}, {"train.init_from": "runs/x"}])
def test_what_has_no_such_optimum_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="say how many tokens"):
        resolve("tiny", CHINCHILLA | other)


@pytest.mark.parametrize(
    ("tokens", "said"), [(900, []), (3900, []), (4100, ["4.1 epochs"]), (17_000, ["17.0 epochs: a token is worth 64%"])]
)
def test_epochs_beyond_4_and_16_are_warned_of(tokens: int, said: list[str]) -> None:
    told = repetition(1000, tokens, {"text": tokens / 1000})
    assert told["epochs"] == tokens / 1000
    assert len(told["warnings"]) == len(said)
    assert all(part in line for part, line in zip(said, told["warnings"], strict=True))
    assert told["worth"] <= 1


def test_a_source_that_is_read_more_often_than_the_whole_is_named() -> None:
    told = repetition(1000, 1000, {"large": 0.5, "small": 6.0})
    assert told["warnings"][0].startswith("of small: 6.0 epochs")
    assert len(told["warnings"]) == 1
    assert repetition(1000, 1000, {"large": 0.9, "small": 3.0})["warnings"] == []
