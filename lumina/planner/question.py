"""What a plan is asked: known quantities with their units, and whether they determine the others.

Three things belong together: parameters, tokens and compute (C = 6·N·D). A named model fixes the first; a time on
devices, or a budget at a price, is compute in other words. Two of the three determine all; one does with the
compute-optimal split of a scaling law.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lumina.config.schema.train import LENGTHS
from lumina.config.units import parse_count, parse_number, parse_seconds
from lumina.errors import UserError

T = TypeVar("T", int, float)
SMALLEST_COMPUTE, LARGEST_COMPUTE = 1e6, 1e32
LARGEST = 10**18  # parameters, tokens
LONGEST = 1e12  # seconds
LEAST_PEAK, LARGEST_PEAK = 0.1, 1e5  # TFLOP/s
LEAST_MEMORY, LARGEST_MEMORY = 2**28, 2**46  # bytes
SIZES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
COMPUTE = ("compute", "time", "budget")  # three ways to say it


@dataclass(frozen=True)
class Question:
    """`source` is a preset or a file, with `settings` over it; None asks for a model of a size that follows.

    `params` are active parameters, `tokens` all that are trained on, `compute` FLOPs, `time` seconds, `budget` money at
    `price` an hour of a device, `available` tokens that differ, `inference` tokens that the model will read and write
    in use; `gpus` as `8xH100`, None for this machine, and of an unknown one its bf16 peak and bytes of memory.
    `remedies` are settings that nobody asked for, without which it would not fit.
    """

    source: str | None = None
    settings: tuple[str, ...] = ()
    params: float | None = None
    tokens: float | None = None
    compute: float | None = None
    time: float | None = None
    budget: float | None = None
    price: float | None = None
    available: float | None = None
    inference: float | None = None
    kind: str | None = None
    law: str | None = None
    gpus: str | None = None
    peak_tflops: float | None = None
    memory: int | None = None
    remedies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises `UserError` for a combination that leaves something open, or says something twice."""
        given = [name for name in COMPUTE if getattr(self, name) is not None]
        if self.gpus is None and (self.peak_tflops is not None or self.memory is not None):
            raise UserError("--peak-tflops and --mem describe a GPU without a name", fix="add --gpus, such as 8xNAME")
        if self.budget is not None and self.price is None:
            raise UserError("--budget alone buys nothing that can be counted", fix="add --price, of a device and hour")
        if len(given) > 1:
            raise UserError(
                f"{_options(given)}: each says how much to compute", fix=f"keep one of them, drop {_options(given[1:])}"
            )
        if self.source is not None:
            self._require_one_length(given)
            return
        asked = [name for name in ("params", "tokens", *given) if getattr(self, name) is not None]
        if len(asked) == 3:
            fix = f"keep two of them: drop {_options(asked[:1])}, or {_options(asked[1:2])}, or {_options(asked[2:])}"
            raise UserError(f"{_options(asked)}: two of them determine the third", fix)
        if not asked:
            raise UserError(
                "nothing says how large the model is or how long it trains",
                fix="name a preset, or give --params, --tokens, --compute, --time, or --budget with --price",
            )

    def _require_one_length(self, given: Sequence[str]) -> None:
        """Of a named model one thing says how long it trains."""
        if self.params is not None:
            raise UserError(f"{self.source} has its parameters: --params asks for others", fix="drop one of the two")
        lengths = [f"--{name}" for name in ("tokens", *given) if getattr(self, name) is not None]
        lengths += [key for key in LENGTHS if key in map(key_of, self.settings)]
        if len(lengths) > 1:
            raise UserError(
                f"{', '.join(lengths)}: each says how long to train", fix=f"keep one of them, drop {lengths[1]}"
            )

    @property
    def every_setting(self) -> tuple[str, ...]:
        """`settings`, but for those that a remedy says otherwise, the remedies, and what `kind` says."""
        instead = {key_of(setting) for setting in self.remedies}
        own = [setting for setting in self.settings if key_of(setting) not in instead]
        return (*own, *self.remedies, *([f"model.kind={self.kind}"] if self.kind else []))

    def why(self, key: str) -> str:
        """Why a setting is among `every_setting`."""
        return "or it would not fit" if key in map(key_of, self.remedies) else "as asked"


def ask(
    source: str | None = None,
    settings: Sequence[str] = (),
    *,
    params: Any = None,
    tokens: Any = None,
    compute: Any = None,
    time: Any = None,
    budget: Any = None,
    price: Any = None,
    tokens_available: Any = None,
    inference_tokens: Any = None,
    kind: str | None = None,
    law: str | None = None,
    gpus: str | None = None,
    peak_tflops: Any = None,
    mem: Any = None,
) -> Question:
    """A question in the units that people write: `1B`, `1e20`, `24h`; numbers are taken as they are, in seconds, bytes.

    Raises `UserError` for what cannot be read, is not positive, or does not go together.
    """
    if source is None and all(
        value is None for value in (params, tokens, compute, time, budget, tokens_available, price)
    ):
        source = "debug"  # as the other verbs
    return Question(
        source,
        tuple(settings),
        _read("--params", params, parse_count, LARGEST),
        _read("--tokens", tokens, parse_count, LARGEST),
        _read("--compute", compute, _parse_flops, LARGEST_COMPUTE, SMALLEST_COMPUTE),
        _read("--time", time, _with_unit(parse_seconds, "24h or 90s"), LONGEST),
        _read("--budget", budget, parse_number, 1e15),
        _read("--price", price, parse_number, 1e9),
        _read("--tokens-available", tokens_available, parse_count, LARGEST),
        _read("--inference-tokens", inference_tokens, parse_count, LARGEST),
        kind,
        law,
        gpus,
        _read("--peak-tflops", peak_tflops, parse_number, LARGEST_PEAK, LEAST_PEAK),
        _read("--mem", mem, _with_unit(_parse_memory, "80GB or 80GiB"), LARGEST_MEMORY, LEAST_MEMORY),
    )


def _parse_flops(value: Any) -> float:
    """FLOPs are written as 1e20: suffixes would be taken for FLOP/s."""
    try:
        return parse_number(value)
    except ValueError:
        raise ValueError("FLOPs are needed, such as 1e20") from None


def _parse_memory(value: Any) -> int:
    """`80GB` (powers of ten), `80GiB` (powers of two), or a number of bytes."""
    number, unit = re.fullmatch(r"\s*(.*?)\s*([MGT]i?B)?\s*", str(value), re.DOTALL).groups()  # type: ignore[union-attr]
    try:
        return round(parse_number(number) * SIZES.get(unit, 1))
    except ValueError:
        raise ValueError("a number of bytes is needed, such as 80GB or 80GiB") from None


def _with_unit(parse: Callable[[Any], T], such_as: str) -> Callable[[Any], T]:
    """The same, of texts only those with a unit: nobody means 24 seconds, or bytes."""

    def read(value: Any) -> T:
        if isinstance(value, str) and re.fullmatch(r"\s*[\d._]+\s*", value):
            raise ValueError(f"a unit is needed, such as {such_as}")
        return parse(value)

    return read


def key_of(setting: str) -> str:
    """`train.lr` of `train.lr=1e-3`."""
    return setting.split("=")[0].strip()


def _read(option: str, value: Any, parse: Callable[[Any], T], most: float, least: float = 0.0) -> T | None:
    if value is None:
        return None
    try:
        number = parse(value)
    except ValueError as error:
        raise UserError(f"{option} {value}: {error}", fix=f"give {option} in that form, or leave it out") from None
    if not (number > 0 and least <= number <= most):
        between = f"from {least:g} to {most:g}" if least else f"more than 0 and at most {most:g}"
        raise UserError(f"{option} {value}: it has to be {between}", fix=f"give another {option}, or leave it out")
    return number


def _options(names: Sequence[str]) -> str:
    return ", ".join(f"--{name}" for name in names)
