"""The schema as a whole: every key is explained, set by the presets, and read by the program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

import lumina
from lumina.config.names import known_keys, known_sections, sections
from lumina.config.resolve import flatten, presets, resolve
from lumina.config.schema.config import Config

KINDS = ("dense", "moe", "mod", "hybrid")


def test_presets() -> None:
    large = ["b1", "b7", "b14", "b30", "b50", "b100", "b200", "b300"]
    assert presets() == ["tiny", "debug", "debug_200m", *large]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", presets())
def test_a_preset_sets_every_key(preset: str, kind: str) -> None:
    origins = resolve(preset, [f"model.kind={kind}"]).origins
    lengths = {"train.steps", "train.tokens", "train.time"}
    unset = {key for key, origin in origins.items() if origin == "default"}
    assert unset < lengths
    assert len(unset) == 2


@pytest.mark.parametrize("preset", presets())
def test_dense_and_sparse_siblings_meet_as_many_feed_forward_parameters(preset: str) -> None:
    dense, moe = (resolve(preset, [f"model.kind={kind}"]).config.model for kind in ("dense", "moe"))
    assert moe.moe is not None
    assert dense.ffn == (moe.moe.top_k + moe.moe.shared) * moe.moe.ffn


def test_every_key_is_explained() -> None:
    for name, section in {**sections(), "moe": sections(sections()["model"])["moe"]}.items():
        for key, field in section.model_fields.items():
            assert field.description, f"{name}.{key}"


def test_every_key_is_read_by_the_program() -> None:
    package = Path(lumina.__file__).parent
    code = "\n".join(
        path.read_text() for path in package.rglob("*.py") if path.relative_to(package).parts[0] != "config"
    )
    dead = [key for key in known_keys() if not re.search(rf"\.{key.rpartition('.')[2]}\b", code)]
    assert dead == []


def test_keys_and_sections() -> None:
    keys = [key for kind in KINDS for key in flatten(resolve("debug", [f"model.kind={kind}"]).config)]
    assert set(keys) == set(known_keys())
    nested = {"model.moe", "model.mod", "data.quality", "data.curriculum", "train.lora", "orchestrator.trial"}
    assert known_sections() == {*sections(), *nested}


def test_a_configuration_is_frozen_and_strict() -> None:
    config = resolve("tiny").config
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 1.0
    with pytest.raises(ValidationError, match="Extra inputs"):
        Config.model_validate({**config.model_dump(), "other": {}})
    assert hash(config) == hash(resolve("tiny").config)
