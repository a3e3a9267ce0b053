"""The layers of a request: a preset, a YAML file, `key=value` settings; read, checked for names, merged."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from lumina.config import yaml12
from lumina.config.migrations import current, migrate
from lumina.config.names import kinds_of, known_keys, known_sections, suggestion
from lumina.config.schema.model import KINDS
from lumina.config.schema.train import LENGTHS
from lumina.errors import UserError

Values = dict[str, Any]
COMMAND_LINE = "command line"
LARGEST = 1 << 20  # bytes of a configuration file; ours have some hundreds


@dataclass(frozen=True)
class Layer:
    """Values by dotted key, all from one origin."""

    origin: str
    values: Values


@dataclass(frozen=True)
class File:
    """A YAML file: its values, and what it says about itself."""

    layer: Layer
    name: str  # what a run of it is called
    extends: str
    notes: tuple[str, ...]  # what a migration changed
    migrated: frozenset[str]  # the keys whose values it wrote


def presets() -> list[str]:
    """The names of the presets, smallest first."""
    names = (entry.name for entry in (files("lumina.config") / "presets").iterdir())
    found = (name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))
    return sorted(found, key=lambda name: (name.startswith("b"), name != "tiny", int(re.sub(r"\D", "", name) or 0)))


def read_preset(name: str, wanted_by: str = "") -> Layer:
    """A preset's values. `wanted_by` names the file that extends it, for `UserError`."""
    if name not in presets():
        close = difflib.get_close_matches(name, presets(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        where = f"{wanted_by}: " if wanted_by else ""
        fix = f"{hint}the presets are {', '.join(presets())}; your own go into a file such as my.yaml"
        if wanted_by:
            fix = f"{hint}a file extends one of the presets: {', '.join(presets())}"
        elif Path(name).is_file():
            fix = f"text is given as data.train={name}; a configuration needs a name that ends in .yaml"
        raise UserError(f"{where}unknown preset {name!r}", fix)
    return Layer(f"preset {name}", dict(_preset(name)))


@cache
def _preset(name: str) -> Values:
    text = (files("lumina.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    return flat(yaml12.load(text))


def read_file(path: Path) -> File:
    """A user's file, or the `config.yaml` of a run. Raises `UserError` if it is not UTF-8 YAML sections."""
    try:
        content = yaml12.load(_read(path)) or {}
        if not isinstance(content, dict):
            raise UserError("no sections in it", "write `train:` and below it, indented, `lr: 3e-4`")
        about = {key: content.pop(key) for key in ("schema_version", "preset", "extends") if key in content}
        values = flat(content)
        before = dict(values)
        version = about.get("schema_version", current())
        notes = migrate(values, version)
    except OSError as error:
        fix = f"check the path, or name a preset: {', '.join(presets())}"
        if (path / "config.yaml").is_file():
            fix = f"this is a run: `lumina resume {path}` goes on with it, {path / 'config.yaml'} is its configuration"
        raise UserError(f"{path}: cannot be read: {error.strerror}", fix) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})", "save the file as UTF-8") from error
    except UserError as error:
        raise UserError(f"{path}: {error.message}", error.fix) from error
    name, extends = about.get("preset", path.stem), about.get("extends", "debug")
    origin = f"file {path}" + (f", migrated from version {version}" if notes else "")
    migrated = frozenset(key for key, value in values.items() if key not in before or before[key] != value)
    told = tuple(f"{path}: {note}" for note in notes)
    return File(Layer(origin, values), str(name), str(extends), told, migrated)


def _read(path: Path) -> str:
    with path.open("rb") as file:  # a pipe too, such as <(...) in a shell; never all of a device or of a corpus
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise UserError(f"more than {LARGEST} bytes: no configuration", f"text is given as data.train={path}")
    return content.decode("utf-8-sig")


def read_settings(settings: Sequence[str] | Mapping[str, Any], problems: list[str]) -> Layer:
    """`["train.lr=3e-4", …]` or `{"train.lr": 3e-4, …}`; what cannot be read is added to `problems`."""
    if isinstance(settings, Mapping):
        return Layer("Python", flat(settings))
    values: Values = {}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            problems.append(f"{setting}: a setting is key=value, such as train.steps=300")
            continue
        try:
            value = yaml12.load_value(text)
        except UserError as error:
            reason = error.message.removeprefix("line 1: ")
            problems.append(f"{setting}: {reason}; a text with brackets needs quotes: {key}='\"…\"'")
            continue
        given = flat({key: value}) if isinstance(value, dict) else {key: value}
        problems += [f"{twice}: given twice on the command line" for twice in given if twice in values]
        values |= given
    return Layer(COMMAND_LINE, values)


def flat(nested: Mapping[str, Any], prefix: str = "") -> Values:
    """Nested sections (or keys that are dotted already) as dotted keys; a section may be empty.

    Raises `UserError` if a key is given in both ways.
    """
    values: Values = {}
    for name, value in nested.items():
        key = f"{prefix}{name}"
        if value is None and key in known_sections():
            value = {}
        given = flat(value, f"{key}.") if isinstance(value, Mapping) and key not in known_keys() else {key: value}
        if twice := [key for key in given if key in values]:
            raise UserError(f"{', '.join(twice)}: given twice", fix="keep one")
        values |= given
    return values


def unknown(layer: Layer) -> list[str]:
    """A problem for each name that is not a key."""
    problems = []
    for key, value in layer.values.items():
        if key in known_sections():
            inside = [known for known in known_keys() if known.startswith(f"{key}.")]
            problems.append(f"{key} ({layer.origin}): a section; set the keys in it, such as {inside[0]}")
        elif key not in known_keys():
            shown = f"{key}={yaml12.dump_value(value)}"
            problems.append(f"{shown} ({layer.origin}): unknown key{suggestion(key)}")
    return problems


def merge(layers: Sequence[Layer], problems: list[str]) -> tuple[Values, dict[str, str]]:
    """Values and origins. Later layers win; one of steps, tokens, time replaces another of a lower layer."""
    values: Values = {}
    origins: dict[str, str] = {}
    for layer in layers:
        lengths = [key for key in LENGTHS if layer.values.get(key) is not None]
        if len(lengths) > 1:
            problems.append(f"{', '.join(lengths)} ({layer.origin}): exactly one says how long to train")
        if lengths:
            values = {key: value for key, value in values.items() if key not in LENGTHS}
        given = {k: v for k, v in layer.values.items() if k in known_keys() and k not in lengths[1:]}
        values |= given
        origins |= dict.fromkeys(given, layer.origin)
    return values, origins


def drop_other_kinds(values: Values, preset: Layer, mine: Sequence[Layer], problems: list[str]) -> Values:
    """Removes the keys that the chosen kind has no use for: a problem where the user wrote them.

    Returns what the preset lost by the choice: the keys that the preset's own kind has.
    """
    kind = values.get("model.kind", "dense")
    if kind not in KINDS:
        return {}  # a problem of its own
    dropped: Values = {}
    for key in list(values):
        kinds = kinds_of(key)
        if kind in kinds:
            continue
        value = values.pop(key)
        writers = [layer.origin for layer in mine if key in layer.values]
        if writers:
            text = f"{key}={yaml12.dump_value(value)} ({writers[-1]}): a {kind} model has no use for it"
            rather = " set model.moe.ffn," if key == "model.ffn" else ""
            problems.append(f"{text}; leave it out,{rather} or set model.kind={' or '.join(kinds)}")
        elif preset.values["model.kind"] in kinds:
            dropped[key] = value
    return dropped
