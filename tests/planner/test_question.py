"""What determines a run, and what says it twice or not at all."""

from __future__ import annotations

from typing import Any

import pytest

from lumina.errors import UserError
from lumina.planner.question import ask

ANSWERED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"source": "debug"}),
    ({"settings": ["train.steps=3"]}, {"source": "debug", "settings": ("train.steps=3",)}),
    ({"source": "b1", "time": "24h"}, {"source": "b1", "time": 86400}),
    ({"compute": "1e20"}, {"source": None, "compute": 1e20}),
    ({"params": "1.5B", "tokens": "20B"}, {"params": 1_500_000_000, "tokens": 20_000_000_000}),
    ({"params": 10**9, "time": 3600}, {"params": 10**9, "time": 3600}),
    ({"budget": "300", "price": 2.5}, {"budget": 300, "price": 2.5}),
    ({"source": "b1", "price": "2.5"}, {"source": "b1", "price": 2.5}),
    ({"compute": 1e20, "tokens_available": "20B"}, {"available": 2 * 10**10}),
    ({"compute": 1e20, "inference_tokens": "1T"}, {"inference": 10**12}),
    ({"source": "b1", "time": "1h30m"}, {"time": 5400}),
    ({"gpus": "8xX", "peak_tflops": "1307", "mem": "192GB"}, {"peak_tflops": 1307, "memory": 192 * 10**9}),
    ({"gpus": "8xX", "peak_tflops": 70.5, "mem": "24 GiB"}, {"peak_tflops": 70.5, "memory": 24 * 2**30}),
    ({"gpus": "8xX", "peak_tflops": 70, "mem": 2**34}, {"memory": 2**34}),
]  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a budget without a price": ({"budget": 300}, "add --price"),
    "two ways to say compute": ({"compute": 1e20, "time": "24h"}, "keep one of them, drop --time"),
    "three": ({"compute": 1e20, "time": "2h", "budget": 1, "price": 1}, "drop --time, --budget"),
    "params, tokens and compute": ({"params": "1B", "tokens": "20B", "compute": 1e20}, "two of them determine"),
    "a preset and params": ({"source": "b1", "params": "2B"}, "b1 has its parameters"),
    "a preset's length twice": ({"source": "b1", "tokens": "2B", "time": "2h"}, "--tokens, --time"),
    "option and setting": ({"source": "b1", "settings": ["train.steps=5"], "tokens": "2B"}, "--tokens, train.steps"),
    "data alone": ({"tokens_available": "20B"}, "nothing says how large the model is"),
    "a price alone": ({"price": 2}, "nothing says"),
    "tokens with a wrong unit": ({"tokens": "20h"}, "--tokens 20h: a whole number is needed"),
    "a time with a wrong unit": ({"time": "20B"}, "--time 20B: a duration is needed"),
    "a time without a unit": ({"time": "24"}, "--time 24: a unit is needed, such as 24h"),
    "a memory without a unit": ({"gpus": "X", "peak_tflops": 9, "mem": "80"}, "--mem 80: a unit is needed"),
    "a memory with a wrong unit": ({"gpus": "X", "peak_tflops": 9, "mem": "80h"}, "such as 80GB or 80GiB"),
    "a peak in FLOP/s": ({"gpus": "X", "peak_tflops": "9e14", "mem": "80GB"}, "from 0.1 to 100000"),
    "a peak with a unit": ({"gpus": "X", "peak_tflops": "900T", "mem": "80GB"}, "--peak-tflops 900T: a number"),
    "no peak": ({"gpus": "X", "peak_tflops": 0, "mem": "80GB"}, "--peak-tflops 0"),
    "no memory": ({"gpus": "X", "peak_tflops": 9, "mem": "0GB"}, "--mem 0GB"),
    "a description of nothing": ({"source": "b1", "peak_tflops": 9, "mem": "80GB"}, "add --gpus"),
    "compute with a unit": ({"compute": "1e20FLOP"}, "FLOPs are needed, such as 1e20"),
    "compute as params": ({"compute": "1B"}, "FLOPs are needed"),
    "no number": ({"params": "many"}, "--params many"),
    "zero": ({"params": 0}, "--params 0: it has to be more than 0"),
    "negative": ({"time": "-2h"}, "--time -2h"),
    "negative tokens": ({"tokens": "-20B"}, "--tokens -20B: it has to be more than 0"),
    "too little": ({"compute": 10}, "from 1e+06"),
    "too much": ({"tokens": "1e30"}, "at most 1e+18"),
    "free": ({"budget": 5, "price": 0}, "--price 0"),
    "infinite": ({"compute": "inf"}, "FLOPs are needed"),
    "not a number": ({"compute": "nan"}, "FLOPs are needed"),
}


@pytest.mark.parametrize(("given", "found"), ANSWERED)
def test_units_are_understood(given: dict[str, Any], found: dict[str, Any]) -> None:
    question = ask(**given)
    assert {name: getattr(question, name) for name in found} == found


@pytest.mark.parametrize(("given", "said"), REFUSED.values(), ids=REFUSED)
def test_one_clear_error_says_what_to_add_or_drop(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        ask(**given)
    assert said in str(caught.value)
    assert caught.value.fix
