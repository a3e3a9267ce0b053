"""Numbers as people write them: `2B` tokens, `2h`, `4k`, `5%`, `3e-4`; and YAML that reads them as numbers."""

from __future__ import annotations

import re
from typing import Any

import yaml

from lumina.errors import UserError

COUNT_SUFFIX = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_NUMBER = r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def parse_count(value: Any, k: int = 1000) -> int:
    """`2B` -> 2000000000. `k` is what the suffix k stands for (1024 for context lengths). Raises ValueError."""
    if isinstance(value, bool):
        raise ValueError("a whole number is needed, not true or false")
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        number, suffix = value, ""
    else:
        match = re.fullmatch(rf"({_NUMBER})\s*([kKMGBT]?)", str(value).strip())
        if match is None:
            raise ValueError("a whole number is needed, such as 300, 2_000, 4k or 2B")
        number, suffix = float(match[1].replace("_", "")), match[2]
    scaled = number * (k if suffix in ("k", "K") else COUNT_SUFFIX[suffix])
    if scaled != round(scaled):
        raise ValueError("a whole number is needed")
    return round(scaled)


def parse_context(value: Any) -> int:
    """As `parse_count`, but 4k is 4096: context lengths are powers of two everywhere."""
    return parse_count(value, k=1024)


def parse_seconds(value: Any) -> float:
    """`90`, `90s`, `1h30m`, `1.5d` -> seconds. Raises ValueError."""
    if isinstance(value, bool):
        raise ValueError("a duration is needed, not true or false")
    if isinstance(value, int | float):
        return float(value)
    text = str(value).strip().replace(" ", "")
    parts = re.findall(rf"({_NUMBER})(min|[smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("a duration is needed, such as 90s, 2h, 1h30m or 1.5d")
    return sum(float(number) * SECONDS[unit] for number, unit in parts)


def parse_float(value: Any) -> float:
    """`3e-4`, `5%` -> float. Raises ValueError."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    if isinstance(value, int | float):
        return float(value)
    text = str(value).strip()
    if not re.fullmatch(_NUMBER + "%?", text):
        raise ValueError("a number is needed, such as 0.1, 3e-4 or 5%")
    return float(text.rstrip("%").replace("_", "")) / (100 if text.endswith("%") else 1)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (`3e-4` is a number, `no` is a word, 010 is ten); a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                mark = key.start_mark
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+0123456789."),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [c if c != "\0" else "" for c in _first]
    )
_Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: int(node.value, 16 if "0x" in node.value else 10)
)
_Loader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda loader, node: float(node.value.replace(".inf", "inf").replace(".nan", "nan").lower()),
)


def load_yaml(text: str, where: str) -> Any:
    """Parses YAML; `where` names the source in the `UserError` for bad syntax."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}{line}: not valid YAML: {problem}", fix="mend that line") from error
