"""What is generated from the schema: the JSON Schema decides as the program does, the reference is as committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import lumina
from lumina.config import yaml12
from lumina.config.names import known_keys
from lumina.config.reference import json_schema, markdown
from lumina.config.resolve import presets, resolve
from lumina.errors import UserError

VALIDATOR = Draft202012Validator(json_schema())
GOOD = [
    "train: {steps: 300}",
    "extends: tiny\ntrain: {tokens: 2B}",
    "train: {time: 1h30m, lr: 3e-4}",
    "train: {warmup: 5%, decay: 200}",
    "model: {seq_len: 4k}",
    "model:\ntrain: {steps: 1e3}",
    "train.lr: 1e-3",
    "data: {train: [a.txt, b/]}",
    "data: {train: my.txt, eval: []}",
    "parallel: {threads: auto}\nprecision: {mode: bf16, eval: fp32}",
    "parallel: {threads: 3}",
    "schema_version: 1\npreset: mine\ntrain: {betas: [0.9, 0.99]}",
    "",
    "model.moe: {experts: 8}",
    "model: {moe.experts: 8}",
    "train: {steps: '300', tokens: null}",
    "train: {tokens: 1.5M}",
    "train: {tokens: chinchilla}",
    "train: {time: ' 300 '}",
    "train: {warmup: 0.5%, decay: 2e1}",
]
BAD = [
    "train: {learning_rate: 1}",
    "extends: b8",
    "train: {steps: many}",
    "train: {steps: 0}",
    "train: {time: 2 fortnights}",
    "train: {lr: -1}",
    "train: {warmup: soon}",
    "model: {kind: sparse}",
    "model: {tied: maybe}",
    "train: {betas: [0.9]}",
    "parallel: {threads: some}",
    "optimizer: adamw",
    "schema_version: 99",
    "data: {train: []}",
    "data: {train: [3]}",
    "train: {steps: 1.5}",
    "train: {steps: '1.5'}",
    "train: {tokens: 0}",
    "train: {tokens: chinchillas}",
    "train: {steps: '-5'}",
    "train: {lr: -5%}",
    "train: {warmup: 100%}",
    "train: {warmup: '0.5'}",
    "train: {decay: 1.5}",
    "train: {betas: [a, 0.9]}",
    "train: {micro_batch: 0}",
    "parallel: {threads: -1}",
    "model: {moe.expert: 8}",
]


def valid(content: Any) -> bool:
    return bool(VALIDATOR.is_valid(content))


@pytest.mark.parametrize("text", GOOD)
def test_the_schema_takes_what_the_program_takes(text: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(text)
    resolve(tmp_path / "my.yaml")
    assert valid(yaml12.load(text)), list(VALIDATOR.iter_errors(yaml12.load(text)))


@pytest.mark.parametrize("text", BAD)
def test_the_schema_refuses_what_the_program_refuses(text: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(UserError):
        resolve(tmp_path / "my.yaml")
    assert not valid(yaml12.load(text))


@pytest.mark.parametrize("preset", presets())
def test_presets_are_valid(preset: str) -> None:
    text = (Path(lumina.__file__).parent / "config" / "presets" / f"{preset}.yaml").read_text()
    assert valid(yaml12.load(text))


def test_the_schema_is_one_and_explains_every_key() -> None:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    assert all(schema["properties"][key]["description"] for key in known_keys())


def test_the_reference_is_the_one_in_docs() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == markdown(), "run: lumina config reference > docs/configuration.md"
    assert all(f"| `{key}` |" in markdown() for key in known_keys())
