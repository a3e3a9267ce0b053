"""YAML with the scalars of YAML 1.2: `3e-4` is a number, `no` a word, 010 ten; a repeated key is an error.

PyYAML follows YAML 1.1, where `3e-4` and `1e6` are texts, `no` is false and 010 is eight. Reading and writing
share one table, so that what is written reads back as the same value.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from lumina.errors import UserError

# The core schema (YAML 1.2.2, section 10.3.2): tag, pattern, the characters it can start with.
_CORE = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


DIGITS = 400  # of a whole number: a float has at most 309 before its point


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """No aliases: a few lines of them can mean a billion values, or one that contains itself."""
        if self.check_event(yaml.AliasEvent):
            alias: yaml.AliasEvent = self.get_event()  # type: ignore[no-untyped-call]
            problem = f"*{alias.anchor} is an alias, which is not read here; write the value itself"
            raise yaml.composer.ComposerError(None, None, problem, alias.start_mark)  # type: ignore[arg-type]
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            problem = None
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be a plain name"
            elif key.value in seen:
                problem = f"the key {key.value!r} is given twice"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Values that YAML does not know (in a message about them) are shown as texts."""


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > DIGITS:
        problem = "a number with more digits than can be meant"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(?=[in])", "", loader.construct_scalar(node).lower()))


for _yaml in (_Loader, _Dumper):
    _yaml.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _CORE:
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Dumper.add_multi_representer(object, lambda dumper, value: dumper.represent_str(str(value)))


def load(text: str) -> Any:
    """Parses YAML. Raises `UserError` with the line number and the reason."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        deep = "nested too deeply" if isinstance(error, RecursionError) else None
        reason = deep or getattr(error, "problem", None) or str(error).splitlines()[0]
        fix = "mend it: indent with spaces, and put quotes around a text with signs such as * : # ["
        fix = "mend it: keep one of them" if reason.endswith("is given twice") else fix
        raise UserError(f"{where}{reason}", fix) from error


def load_value(text: str) -> Any:
    """The value of a `key=value` setting: a list, mapping or quoted text as in YAML, else one plain scalar.

    So `data.train=*.txt` and `data.train=notes #2.txt` mean what they say. Raises `UserError`.
    """
    text = text.strip()
    if text.startswith(("[", "{", '"', "'")):
        return load(text)
    special = text and any(re.fullmatch(pattern, text) for _, pattern, _ in _CORE)
    return load(text) if special else text


def dump_value(value: Any) -> str:
    """A scalar or a list on one line, such that `load` gives it back."""

    def dump(style: str | None) -> str:
        text: str = yaml.dump(
            value,
            Dumper=_Dumper,
            default_flow_style=True,
            default_style=style,
            width=2**31,
            allow_unicode=True,
        )
        return text.removesuffix("...\n").removesuffix("\n")

    text = dump(None)
    return text if len(text.splitlines()) == 1 else dump('"')  # escapes keep line breaks on one line
