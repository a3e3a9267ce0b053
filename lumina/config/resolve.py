"""From what was asked to what will run: default < preset < file < command line, with every value's origin.

`resolve` answers before anything is touched; all problems come in one `UserError`. Choices that depend on
the machine or the data stay `auto` until `settle` writes them, with the reason as origin. `write` saves all
of it as the run's `config.yaml`; `read` gives the same configuration back.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lumina.config import yaml12
from lumina.config.check import build
from lumina.config.layers import (
    Layer,
    drop_other_kinds,
    merge,
    presets,
    read_file,
    read_preset,
    read_settings,
    unknown,
)
from lumina.config.migrations import current
from lumina.config.names import kinds_of, known_keys, known_sections
from lumina.config.schema.base import Section
from lumina.config.schema.config import Config
from lumina.config.schema.train import LENGTHS

__all__ = ["Resolved", "adopt", "flatten", "presets", "read", "request_hash", "resolve", "settle", "write"]


@dataclass(frozen=True)
class Resolved:
    """A checked configuration, where each value came from, and the request it answers."""

    config: Config
    origins: dict[str, str]  # default | preset x | file x.yaml | command line | resolved: why
    dropped: dict[str, Any]  # keys that the preset lost to another `model.kind`
    source: str  # the preset's name or the file's: what the run folder is called
    request: dict[str, Any]  # the preset and the user's values, before anything machine-dependent
    notes: tuple[str, ...] = ()  # what a migration changed


def resolve(source: str | Path | None = None, settings: Sequence[str] | Mapping[str, Any] = ()) -> Resolved:
    """Resolves a preset's name (default: debug) or a YAML file, with `key=value` settings over it.

    A `source` that ends in .yaml or .yml or holds a `/` is a file; it may say `extends: PRESET`.
    `settings` are texts such as `train.lr=3e-4`, or a mapping of dotted keys to Python values.
    Raises `UserError` with all problems at once: unknown keys, wrong types, impossible combinations.
    """
    problems: list[str] = []
    name = "debug" if source is None else str(source)
    notes: tuple[str, ...] = ()
    if name.endswith((".yaml", ".yml")) or "/" in name or os.sep in name:
        file = read_file(Path(name))
        preset, base, mine = read_preset(file.extends, wanted_by=name), file.extends, [file.layer]
        name, notes = file.name, file.notes
    else:
        preset, base, mine = read_preset(name), name, []
    mine.append(read_settings(settings, problems))
    problems += [problem for layer in mine for problem in unknown(layer)]
    values, origins = merge([preset, *mine], problems)
    dropped = drop_other_kinds(values, preset, mine, problems)
    config = build(values, origins, problems)
    flat = flatten(config)
    written = {key: flat[key] for layer in mine for key in layer.values if flat[key] is not None}
    return Resolved(config, _complete(origins, flat), dropped, name, {"preset": base} | written, notes)


def settle(resolved: Resolved, choices: Mapping[str, tuple[Any, str]]) -> Resolved:
    """Writes choices `{key: (value, why)}` and checks the whole again; the origin becomes `resolved: why`.

    A settled `train.steps` replaces `train.tokens` and `train.time`.
    """
    values, origins = flatten(resolved.config), dict(resolved.origins)
    if "train.steps" in choices:
        values = {key: value for key, value in values.items() if key not in LENGTHS}
    values |= {key: value for key, (value, _) in choices.items()}
    origins = {key: origin for key, origin in origins.items() if key in values}
    origins |= {key: f"resolved: {why}" for key, (_, why) in choices.items()}
    config = build(values, origins)
    return replace(resolved, config=config, origins=_complete(origins, flatten(config)))


def adopt(resolved: Resolved, other: Config, name: str) -> Resolved:
    """The model of another configuration, which is called `name`, in place of what the user left to the preset.

    Raises `UserError` if the two do not go together.
    """
    mine, theirs = flatten(resolved.config), flatten(other)
    chosen = {key for key, origin in resolved.origins.items() if not origin.startswith(("preset", "default"))}
    taken = {key: value for key, value in theirs.items() if key.startswith("model.") and key not in chosen}
    values = {key: value for key, value in mine.items() if not key.startswith("model.") or key in chosen} | taken
    origins = {key: origin for key, origin in resolved.origins.items() if key in values}
    origins |= dict.fromkeys(taken, f"resolved: that of {name}")
    config = build(values, origins)
    return replace(resolved, config=config, origins=_complete(origins, flatten(config)))


def flatten(config: Config) -> dict[str, Any]:
    """The configuration as dotted keys and plain values, without those its kind has no use for."""

    def plain(value: Any) -> Any:
        if isinstance(value, Section):
            return value.model_dump(exclude_none=True)
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    keys = [key for key in known_keys() if config.model.kind in kinds_of(key)]
    return {key: plain(functools.reduce(getattr, key.split("."), config)) for key in keys}


def request_hash(resolved: Resolved, data_fingerprint: str) -> str:
    """16 hex digits, equal for equal requests on equal data: comments, key order and units do not matter."""
    text = json.dumps([resolved.request, data_fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(resolved: Resolved, path: Path) -> None:
    """Saves `config.yaml` in one move, each value with its origin as a comment; defaults have none."""
    lines = [f"schema_version: {current()}", f"preset: {yaml12.dump_value(resolved.source)}"]
    above: list[str] = []
    for key, value in flatten(resolved.config).items():
        if value is None:
            continue
        *path_of_key, name = key.split(".")
        for depth, section in enumerate(path_of_key):
            if above[: depth + 1] != path_of_key[: depth + 1]:
                lines.append(f"{'  ' * depth}{section}:")
        above = path_of_key
        origin = "".join(sign if sign.isprintable() else " " for sign in resolved.origins[key])
        comment = "" if origin == "default" else f"  # {origin}"
        lines.append(f"{'  ' * len(above)}{name}: {yaml12.dump_value(value)}{comment}")
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read(path: Path) -> Resolved:
    """The configuration of a run, equal to the one written, with the origins that stand beside its values.

    Raises `UserError` if the file is missing or damaged.
    """
    file = read_file(path)
    problems = unknown(file.layer)
    values, origins = merge([file.layer], problems)
    drop_other_kinds(values, Layer("default", {}), [file.layer], problems)
    config = build(values, origins, problems)
    recorded = _recorded_origins(path.read_text(encoding="utf-8")) | dict.fromkeys(file.migrated, file.layer.origin)
    return Resolved(config, _complete(recorded, flatten(config)), {}, file.name, {}, file.notes)


def _recorded_origins(text: str) -> dict[str, str]:
    """The comments that `write` left: each value's origin, if it is not a default."""
    origins: dict[str, str] = {}
    sections: list[str] = []
    for line in text.splitlines():
        name, _, rest = line.strip().partition(":")
        key = ".".join([*sections[: (len(line) - len(line.lstrip())) // 2], name])
        if key in known_sections():
            sections = key.split(".")
        elif "  # " in rest:
            origins[key] = rest.rpartition("  # ")[2]
    return origins


def _complete(origins: Mapping[str, str], flat: Mapping[str, Any]) -> dict[str, str]:
    return {key: origins.get(key, "default") for key in flat}
