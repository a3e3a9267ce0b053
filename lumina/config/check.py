"""From dotted values to a checked `Config`; every problem is one line that names key, value and origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lumina.config import yaml12
from lumina.config.names import sections
from lumina.config.phases import phase_problems
from lumina.config.schema.base import Problem
from lumina.config.schema.config import Config, batch_problems, length_problems, lora_problems
from lumina.errors import UserError

# pydantic's messages in our words, by error type.
_MESSAGES = {
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "a whole number is needed",
    "finite_number": "must be finite",
    "too_short": "must not be empty",
    "value_error": "{error}",
    "extra_forbidden": "unknown; a phase has at, data, lr and warmup",  # every other key is known by now
    "model_type": "settings are needed, such as {{at: 0.7, data: chat}}",
    "model_attributes_type": "settings are needed, such as {{at: 0.7, data: chat}}",
    "tuple_type": "a list is needed",
}


def build(values: Mapping[str, Any], origins: Mapping[str, str], problems: Sequence[str] = ()) -> Config:
    """Validates section by section, so that one bad section does not hide another.

    Raises one `UserError` with the `problems` found so far and all that are found here.
    """
    nested = _nest(values)
    built: dict[str, Any] = {}
    found: list[Problem] = []
    for name, section in sections().items():
        try:
            built[name] = section.model_validate(nested.get(name, {}))
            found += built[name].problems()
        except ValidationError as error:
            found += [_translate(name, detail) for detail in error.errors()]
    if "model" in built and "train" in built:
        found += batch_problems(built["model"], built["train"]) + length_problems(built["model"], built["train"])
        found += lora_problems(built["model"], built["train"])
    if "data" in built and "train" in built:
        found += phase_problems(built["train"], built["data"])
    lines = [*problems, *dict.fromkeys(_describe(problem, values, origins) for problem in found)]
    if lines:
        count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise UserError.collect([_printable(line) for line in lines], f"the configuration has {count}")
    return Config(**built)


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *path, name = key.split(".")
        into = nested
        for section in path:
            into = into.setdefault(section, {})
        into[name] = value
    return nested


def _translate(section: str, detail: ErrorDetails) -> Problem:
    """A pydantic error about one value."""
    message = _MESSAGES.get(detail["type"], detail["msg"]).format(**detail.get("ctx", {}))
    key = ".".join([section, *(part for part in detail["loc"] if isinstance(part, str))])
    return Problem((key,), message.replace("'", ""))


def _describe(problem: Problem, values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """`train.lr=-1 (command line): must be more than 0`."""
    return f"{', '.join(_given(key, values, origins) for key in problem.keys)}: {problem.message}"


def _given(key: str, values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """A key, its value and where that came from; of a key inside a value the origin of that."""
    if key in values:
        return f"{key}={yaml12.dump_value(values[key])} ({origins[key]})"
    around = next((name for name in values if key.startswith(f"{name}.")), None)
    return f"{key} ({origins[around]})" if around else key


def _printable(text: str) -> str:
    """One line that cannot steer a terminal, whatever was typed or named."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
