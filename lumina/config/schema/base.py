"""What all sections share: frozen, strict, with units, and with checks across their own keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

from lumina.config.units import parse_context, parse_count, parse_float, parse_seconds

Count = Annotated[int, BeforeValidator(parse_count)]
Context = Annotated[int, BeforeValidator(parse_context)]
Seconds = Annotated[float, BeforeValidator(parse_seconds)]
Number = Annotated[float, BeforeValidator(parse_float)]


class Section(BaseModel):
    """One section of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def problems(self) -> list[str]:
        """What is wrong with the combination of this section's values, each as `key=value: what to do`."""
        return []
