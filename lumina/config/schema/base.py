"""What all sections share: frozen, strict, with units, and with checks across their own keys."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict

from lumina.config.units import (
    parse_auto_count,
    parse_auto_steps,
    parse_betas,
    parse_bytes,
    parse_context,
    parse_count,
    parse_number,
    parse_path,
    parse_paths,
    parse_seconds,
    parse_span,
    parse_text,
    parse_tokens,
)

Count = Annotated[int, BeforeValidator(parse_count)]
Tokens = Annotated[int | Literal["chinchilla"], BeforeValidator(parse_tokens)]
Context = Annotated[int, BeforeValidator(parse_context)]
AutoCount = Annotated[int | Literal["auto"], BeforeValidator(parse_auto_count)]
AutoSteps = Annotated[int | Literal["auto"], BeforeValidator(parse_auto_steps)]
Number = Annotated[float, BeforeValidator(parse_number)]
Span = Annotated[int | float, BeforeValidator(parse_span)]
Seconds = Annotated[float, BeforeValidator(parse_seconds)]
Betas = Annotated[tuple[float, float], BeforeValidator(parse_betas)]
Name = Annotated[str, BeforeValidator(parse_path)]
Text = Annotated[str, BeforeValidator(parse_text)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Paths = Annotated[tuple[str, ...], BeforeValidator(parse_paths)]


class Problem(NamedTuple):
    """Values that do not go together: their dotted keys, and what is wrong and what to do."""

    keys: tuple[str, ...]
    message: str


class Section(BaseModel):
    """One section of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def problems(self) -> list[Problem]:
        """What is wrong with the combination of this section's values; each value alone is valid already."""
        return []


def nearest_multiple(value: int, of: int) -> str:
    """`96 or 104`: the multiples on both sides of `value`, none of them 0."""
    below = value // of * of
    return " or ".join(str(n) for n in (below, below + of) if n)


def nearest_divisor(value: int, of: int) -> str:
    """`2 or 4`: the divisors of `of` on both sides of `value`."""
    below = next(n for n in range(min(value, of), 0, -1) if of % n == 0)
    above = next((n for n in range(value, of + 1) if of % n == 0), None)
    return f"{below} or {above}" if above else str(below)
