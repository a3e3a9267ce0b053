"""The configuration as documents: a JSON Schema for editors, and the pages of docs/configuration.md."""

from __future__ import annotations

import copy
import typing
from collections.abc import Callable
from typing import Any

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from lumina.config import units, yaml12
from lumina.config.migrations import current
from lumina.config.names import kinds_of, known_keys, known_sections, sections
from lumina.config.resolve import flatten, presets, resolve
from lumina.config.schema.base import Section
from lumina.config.schema.config import Config
from lumina.config.schema.model import KINDS

_NUMBER = r"(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?"
_DURATION = rf"^\s*({_NUMBER}\s*|({_NUMBER}\s*(min|[smhd])\s*)+)$"
_SHARE = r"(\d{1,2}(\.\d*)?|\.\d+)%"
_RATE = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": rf"^\s*\+?{_NUMBER}%?\s*$"}]}
_TEXT = {"type": "string", "minLength": 1}
_BOUNDS = {
    "ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum", "min_length": "minItems",
}  # fmt: skip
SHOWN = ("tiny", "debug", "debug_200m")


def _count(suffixes: str) -> dict[str, Any]:
    return {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": rf"^\s*{_whole(suffixes)}\s*$"}]}


def _whole(suffixes: str) -> str:
    """Whole digits; a fraction only before a suffix or an exponent. No key takes less than 0."""
    return rf"\+?(\d[\d_]*\.?0*|{_NUMBER}\s*[{suffixes}]|(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d{{1,3}})"


# What each parser of units reads: the JSON Schema, and how the reference calls it.
_PARSERS: dict[Callable[[Any], Any], tuple[dict[str, Any], str]] = {
    units.parse_count: (_count("kKMBT"), "whole number (`4k`, `2B`)"),
    units.parse_tokens: (
        {
            "anyOf": [
                {"const": "chinchilla"},
                {"type": "integer", "minimum": 1, "maximum": units.MOST_TOKENS},
                _count("kKMBT")["anyOf"][1],
            ]
        },
        "`chinchilla` or whole number (`4k`, `2B`)",
    ),
    units.parse_context: (_count("kKM"), "whole number (`4k` is 4096)"),
    units.parse_auto_count: (
        {"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}, _count("kKMBT")["anyOf"][1]]},
        "`auto` or whole number",
    ),
    units.parse_auto_steps: (
        {"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 0}, _count("kKMBT")["anyOf"][1]]},
        "`auto` or whole number",
    ),
    units.parse_number: (
        _RATE,
        "number (`3e-4`, `5%`)",
    ),
    units.parse_span: (
        {
            "anyOf": [
                {"type": "number", "exclusiveMaximum": 1},
                {"type": "integer"},
                {"type": "string", "pattern": rf"^\s*({_SHARE}|{_whole('kKMBT')})\s*$"},
            ]
        },
        "share below 1 (`5%`) or steps",
    ),
    units.parse_seconds: (
        {"anyOf": [{"type": "number"}, {"type": "string", "pattern": _DURATION}]},
        "duration (`90s`, `1h30m`)",
    ),
    units.parse_betas: (
        {"type": "array", "minItems": 2, "maxItems": 2, "items": _RATE},
        "two numbers",
    ),
    units.parse_path: (_TEXT, "name or path"),
    units.parse_text: ({"type": ["string", "null"]}, "path, or nothing"),
    units.parse_bytes: (_count("kKMG"), "bytes (`64M`, `1G`)"),
    units.parse_paths: ({"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}, "path, or list of paths"),
}


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of what a user's YAML file may hold; combinations are for `lumina config check`."""
    about = {
        "extends": {"enum": presets(), "description": "the preset below this file"},
        "preset": {"type": "string", "description": "what a run of this file is called"},
        "schema_version": {"type": "integer", "minimum": 1, "maximum": current()},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "LuminaAI configuration",
        **_section("", about),
    }


def _section(prefix: str, about: dict[str, Any]) -> dict[str, Any]:
    """Whatever lies below `prefix`, nested or dotted: `moe: {experts: 4}` in `model` is `moe.experts: 4` there."""
    inner = [name for name in sorted(known_sections()) if name.startswith(prefix)]
    keys = [key for key in known_keys() if key.startswith(prefix)]
    below = {name.removeprefix(prefix): _section(f"{name}.", {}) for name in inner}
    below |= {key.removeprefix(prefix): _schema_of(key) for key in keys}
    return {"type": ["object", "null"], "additionalProperties": False, "properties": about | below}


def markdown() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Every key of a configuration file or of `key=value` on the command line. This page is what "
        "`lumina config reference` prints; a test keeps it true.",
        "",
        "Default < preset < file < command line; `lumina config show debug my.key=1 --origins` says which one won. "
        "A file may say `extends: debug`; unknown keys are errors. `lumina config schema` prints the JSON Schema for "
        "your editor. Exactly one of `train.steps`, `train.tokens` and `train.time` holds. What is `auto` is decided "
        "once for the machine, printed, and stored in the run's `config.yaml`.",
    ]
    # No kind has every key, but these two have all of them.
    values: dict[str, dict[str, Any]] = {preset: {} for preset in SHOWN}
    for preset in SHOWN:
        for kind in ("dense", "hybrid"):
            values[preset] |= flatten(resolve(preset, {"model.kind": kind}).config)
    for section in sections():
        lines += ["", f"## {section}", ""]
        lines += [f"| key | takes | {' | '.join(SHOWN)} | meaning |", "|---|---|---|---|---|---|"]
        lines += [_row(key, values) for key in known_keys() if key.startswith(f"{section}.")]
    return "\n".join(lines) + "\n"


def _row(key: str, values: dict[str, dict[str, Any]]) -> str:
    shown = [_shown(values[preset][key]) for preset in SHOWN]
    kinds = kinds_of(key)
    only = "" if kinds == KINDS else f" ({' and '.join(kinds)} only)"
    return f"| `{key}` | {_takes(key)} | {' | '.join(shown)} | {field(key).description}{only} |"


def _shown(value: Any) -> str:
    return "" if value is None else f"`{yaml12.dump_value(value)}`"


def field(key: str) -> FieldInfo:
    """The field of a dotted key."""
    section: type[Any] = Config
    *path, name = key.split(".")
    for part in path:
        section = sections(section)[part]
    found: FieldInfo = section.model_fields[name]
    return found


def _parser(info: FieldInfo) -> tuple[dict[str, Any], str] | None:
    """What reads the field's units, if it has units."""
    inner = [part for part in (info.annotation, *typing.get_args(info.annotation)) if typing.get_origin(part)]
    metadata = [*info.metadata, *(note for part in inner for note in getattr(part, "__metadata__", ()))]
    for note in metadata:
        if isinstance(note, BeforeValidator) and note.func in _PARSERS:
            return _PARSERS[note.func]
    return None


def _schema_of(key: str) -> dict[str, Any]:
    return _schema_of_field(field(key))


def _schema_of_field(info: FieldInfo) -> dict[str, Any]:
    parser = _parser(info)
    if parser:
        schema = copy.deepcopy(parser[0])
    elif info.annotation is bool:
        schema = {"type": "boolean"}
    elif item := _item(info):
        schema = {"type": "array", "items": _fields(item)}
    else:
        schema = {"enum": list(typing.get_args(info.annotation))}
    if type(None) in typing.get_args(info.annotation):
        schema = {"anyOf": [*schema.get("anyOf", [schema]), {"type": "null"}]}
    notes = [(limit, getattr(note, name, None)) for note in info.metadata for name, limit in _BOUNDS.items()]
    bounds = {limit: value for limit, value in notes if value is not None}
    for branch in schema.get("anyOf", []):
        if branch.get("type") in ("number", "integer"):
            branch.update({limit: value for limit, value in bounds.items() if limit != "minItems"})
        if branch.get("type") == "array" and "minItems" in bounds:
            branch["minItems"] = bounds["minItems"]
    return schema | {"description": info.description}


def _item(info: FieldInfo) -> type[Section] | None:
    """The section that a list holds, if it is a list of settings."""
    inner = typing.get_args(info.annotation)
    return inner[0] if inner and isinstance(inner[0], type) and issubclass(inner[0], Section) else None


def _fields(section: type[Section]) -> dict[str, Any]:
    properties = {name: _schema_of_field(info) for name, info in section.model_fields.items()}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _takes(key: str) -> str:
    info = field(key)
    parser = _parser(info)
    if parser:
        return parser[1]
    if item := _item(info):
        return f"list of `{{{', '.join(item.model_fields)}}}`"
    choices = ["true", "false"] if info.annotation is bool else typing.get_args(info.annotation)
    return ", ".join(f"`{choice}`" for choice in choices)
