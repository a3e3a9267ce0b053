"""From what was asked to what will run: preset < file < command line, checked whole, with every value's origin.

`resolve` answers before anything is touched; all problems come in one `UserError`. Choices that depend on the
machine or the data stay `auto` until `settle` writes them, with the reason as origin. `write` saves all of it as
the run's `config.yaml`; `read` gives the same configuration back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lumina.config.names import known_keys, suggestion
from lumina.config.schema.config import SECTIONS, Config
from lumina.config.schema.train import LENGTHS
from lumina.config.units import load_yaml
from lumina.errors import UserError

SCHEMA_VERSION = 1
KINDS = {"model.moe.": ("moe", "hybrid"), "model.mod.": ("mod", "hybrid")}
LENGTH_KEYS = tuple(f"train.{key}" for key in LENGTHS)


@dataclass(frozen=True)
class Resolved:
    """A checked configuration, where each value came from, and the request it answers."""

    config: Config
    origins: dict[str, str]  # dotted key -> default | preset debug | file x.yaml | command line | resolved: why
    dropped: dict[str, Any]  # keys of another kind that the preset had
    source: str  # the preset, or the file's stem: what the run folder is named after
    request: dict[str, Any]  # what was asked, before anything machine-dependent


@dataclass(frozen=True)
class _Layer:
    """Values from one origin."""

    origin: str
    values: dict[str, Any]
    mine: bool  # the user wrote it, as opposed to a preset


def presets() -> list[str]:
    """The names of the presets."""
    folder = files("lumina.config") / "presets"
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def resolve(source: str | Path = "debug", settings: Sequence[str] | Mapping[str, Any] = ()) -> Resolved:
    """Resolves a preset name or a YAML file (which may say `extends: PRESET`) with `key=value` settings over it.

    Raises `UserError` with all problems at once: unknown keys, wrong types, impossible combinations.
    """
    text = str(source)
    problems: list[str] = []
    layers = []
    if text.endswith((".yaml", ".yml")) or "/" in text:
        values, preset, content = _read_file(Path(text))
        name, request = Path(text).stem, {"file": content}
        layers.append(_Layer(f"file {text}", values, mine=True))
    else:
        name, preset, request = text, text, {}
    layers.insert(0, _Layer(f"preset {preset}", _read_preset(preset), mine=False))
    layers.append(_Layer("command line", _parse_settings(settings, problems), mine=True))
    request |= {"preset": preset, "settings": dict(sorted(layers[-1].values.items()))}

    for layer in layers:
        problems += _unknown(layer)
    values, origins = _merge(layers, problems)
    dropped = _drop_other_kinds(values, origins, layers, problems)
    config = _build(values, origins, problems)
    return Resolved(config, _with_defaults(config, origins), dropped, name, request)


def settle(resolved: Resolved, choices: Mapping[str, tuple[Any, str]]) -> Resolved:
    """Writes choices `{key: (value, why)}`; a settled `train.steps` replaces `train.tokens` and `train.time`."""
    values, origins = flatten(resolved.config), dict(resolved.origins)
    for key, (value, why) in choices.items():
        values[key], origins[key] = value, f"resolved: {why}"
        if key == "train.steps":
            values |= {other: None for other in LENGTH_KEYS if other != key}
    config = _build({k: v for k, v in values.items() if v is not None}, origins, [])
    return replace(resolved, config=config, origins=_with_defaults(config, origins))


def flatten(config: Config) -> dict[str, Any]:
    """The configuration as dotted keys; sections of another kind are left out."""

    def walk(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in values.items():
            if isinstance(value, dict):
                flat |= walk(value, f"{prefix}{key}.")
            elif f"{prefix}{key}" in known_keys():
                flat[f"{prefix}{key}"] = value
        return flat

    return walk(config.model_dump(mode="json"), "")


def request_hash(resolved: Resolved, data_fingerprint: str) -> str:
    """16 hex digits that are equal for equal requests on equal data."""
    text = json.dumps([resolved.request, data_fingerprint], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(resolved: Resolved, path: Path) -> None:
    """Saves `config.yaml`, each value with its origin as a comment."""
    lines = [f"schema_version: {SCHEMA_VERSION}", f"preset: {resolved.source}"]
    open_sections: list[str] = []
    for key, value in flatten(resolved.config).items():
        if value is None:
            continue
        *sections, name = key.split(".")
        for depth, section in enumerate(sections):
            if open_sections[depth : depth + 1] != [section]:
                open_sections = [*open_sections[:depth], section]
                lines.append(f"{'  ' * depth}{section}:")
        origin = resolved.origins[key]
        comment = "" if origin == "default" else f"  # {origin}"
        lines.append(f"{'  ' * len(sections)}{name}: {_scalar(value)}{comment}")
        open_sections = sections
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> Resolved:
    """The configuration of a run. Raises `UserError` if it is missing or was damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no such file", fix="name a run folder made by lumina train")
    content = load_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(content, dict) or content.pop("schema_version", None) != SCHEMA_VERSION:
        raise UserError(f"{path}: not a configuration of schema version {SCHEMA_VERSION}", fix="restore the file")
    name = content.pop("preset", "run")
    values = {key: value for key, value in _flat(content).items() if value is not None}
    origins = dict.fromkeys(values, f"file {path}")
    problems = _unknown(_Layer(f"file {path}", values, mine=True))
    config = _build(values, origins, problems)
    return Resolved(config, _with_defaults(config, origins), {}, name, {})


def _scalar(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    return text


def _read_preset(name: str) -> dict[str, Any]:
    if name not in presets():
        raise UserError(
            f"unknown preset {name!r}", fix=f"use one of {', '.join(presets())}, or a YAML file such as my.yaml"
        )
    text = (files("lumina.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    return _flat(load_yaml(text, f"preset {name}"))


def _read_file(path: Path) -> tuple[dict[str, Any], str, str]:
    """The file's values, the preset it extends, and its text."""
    if not path.is_file():
        raise UserError(f"{path}: no such file", fix="check the path, or name a preset: " + ", ".join(presets()))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})", fix="save the file as UTF-8") from error
    content = load_yaml(text, str(path)) or {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a mapping of sections", fix="write sections such as `train:` with keys below")
    return _flat({k: v for k, v in content.items() if k != "extends"}), str(content.get("extends", "debug")), text


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections (or keys that are dotted already) as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _parse_settings(settings: Sequence[str] | Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    if isinstance(settings, Mapping):
        return _flat({key: list(v) if isinstance(v, tuple) else v for key, v in settings.items()})
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            problems.append(f"{setting}: a setting needs the form key=value{suggestion(key)}")
        elif key in values:
            problems.append(f"{key}: given twice on the command line")
        else:
            values |= _flat({key: load_yaml(text, setting) if text else ""})
    return values


def _unknown(layer: _Layer) -> list[str]:
    known = known_keys()
    sections = {key.rpartition(".")[0] for key in known} | {"model"}
    problems = []
    for key in layer.values:
        if key in sections:
            problems.append(f"{key}: a section, not a key ({layer.origin}); set keys below it, such as {key}.…")
        elif key not in known:
            problems.append(f"{key}: unknown key ({layer.origin}){suggestion(key)}")
    return problems


def _merge(layers: Sequence[_Layer], problems: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Later layers win; one of steps, tokens and time replaces another of a lower layer."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        lengths = [key for key in LENGTH_KEYS if key in layer.values]
        if len(lengths) > 1:
            problems.append(f"{' and '.join(lengths)} ({layer.origin}): give exactly one")
        if lengths:
            for key in LENGTH_KEYS:
                values.pop(key, None)
        for key in set(known_keys()) & set(layer.values):
            values[key], origins[key] = layer.values[key], layer.origin
    for key in [key for key in LENGTH_KEYS if key in values][1:]:
        values.pop(key)  # reported above
    return values, origins


def _drop_other_kinds(
    values: dict[str, Any], origins: dict[str, str], layers: Sequence[_Layer], problems: list[str]
) -> dict[str, Any]:
    """Removes keys that the chosen kind has no use for; an error where the user wrote them."""
    kind = values.get("model.kind", "dense")
    dropped: dict[str, Any] = {}
    for prefix, kinds in KINDS.items():
        if kind in kinds:
            continue
        for key in [key for key in values if key.startswith(prefix)]:
            value, origin = values.pop(key), origins.pop(key)
            if any(layer.mine and key in layer.values for layer in layers):
                problems.append(
                    f"{key}={value} ({origin}): a {kind} model has no such part; use model.kind={' or '.join(kinds)}"
                )
            else:
                dropped[key] = value
    return dropped


def _build(values: Mapping[str, Any], origins: Mapping[str, str], problems: list[str]) -> Config:
    """Validates section by section, so that one bad section does not hide another; raises all problems at once."""
    nested: dict[str, Any] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        *sections, name = key.split(".")
        into = nested
        for section in sections:
            into = into.setdefault(section, {})
        into[name] = value
    built: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        try:
            built[name] = section.model_validate(nested[name])
            problems += built[name].problems()
        except ValidationError as error:
            details = {detail["loc"][:-1] or detail["loc"]: detail for detail in reversed(error.errors())}
            problems += [_explain(name, detail, origins) for detail in reversed(details.values())]
    if not problems:
        config = Config.model_construct(**built)
        problems += config.problems()
        if not problems:
            return config
    raise UserError.collect(problems, "the configuration has a problem" if len(problems) == 1 else
                            f"the configuration has {len(problems)} problems")


def _explain(section: str, detail: Any, origins: Mapping[str, str]) -> str:
    """One pydantic error as `key=value (origin): what is allowed`."""
    parts = [section, *(part for part in detail["loc"] if isinstance(part, str))]
    key = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known_keys()), "")
    if not key:
        return f"{'.'.join(parts)}: {detail['msg']}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should be", "must be").replace("Input should", "must")
    origin = f" ({origins[key]})" if key in origins else ""
    return f"{key}={detail['input']}{origin}: {message}"


def _with_defaults(config: Config, origins: Mapping[str, str]) -> dict[str, str]:
    return {key: origins.get(key, "default") for key in flatten(config)}
