"""Which layer wins, where values come from, and what a run's config.yaml keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lumina.config.resolve import Resolved, flatten, presets, read, request_hash, resolve, settle, write
from lumina.config.schema.base import nearest_divisor, nearest_multiple
from lumina.config.schema.model import ModelConfig, MoEConfig
from lumina.errors import UserError


def save(folder: Path, text: str, name: str = "my.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


class TestPrecedence:
    def test_command_line_over_file_over_preset_over_default(self, tmp_path: Path) -> None:
        file = save(tmp_path, "extends: tiny\ntrain:\n  lr: 1e-3\n  clip: 0.5\n")
        resolved = resolve(file, ["train.lr=5e-4"])
        values = flatten(resolved.config)
        got = {
            key: (values[key], resolved.origins[key]) for key in ("train.lr", "train.clip", "train.seed", "train.time")
        }
        assert got == {
            "train.lr": (5e-4, "command line"),
            "train.clip": (0.5, f"file {file}"),
            "train.seed": (0, "preset tiny"),
            "train.time": (None, "default"),
        }
        assert resolved.source == "my"

    def test_no_source_and_a_file_that_extends_nothing_are_the_demo(self, tmp_path: Path) -> None:
        empty_sections = save(tmp_path, "# nothing yet\ntrain:\nmodel:\n  moe:\n")
        assert resolve().config == resolve("debug").config == resolve(save(tmp_path, "", "e.yml")).config
        assert resolve(empty_sections).config == resolve().config

    @pytest.mark.parametrize("settings", [
        ["model.moe={experts: 16, ffn: 128}"],
        ["model.moe.experts=16", "model.moe.ffn=128"],
        {"model.moe.experts": 16, "model.moe.ffn": "128"},
        {"model": {"moe": {"experts": 16, "ffn": 128}}},
    ])  # fmt: skip
    def test_settings_in_every_form(self, settings: Any) -> None:
        resolved = resolve("debug", settings)
        assert resolved.config.model.moe is not None
        assert (resolved.config.model.moe.experts, resolved.config.model.moe.ffn) == (16, 128)
        assert resolved.config.model.moe.top_k == 2

    @pytest.mark.parametrize(("setting", "paths"), [
        ("data.train=[a.txt, b/]", ("a.txt", "b/")),
        ("data.train=*.txt", ("*.txt",)),
        ("data.train=notes #2.txt", ("notes #2.txt",)),
    ])  # fmt: skip
    def test_paths(self, setting: str, paths: tuple[str, ...]) -> None:
        assert resolve("tiny", [setting]).config.data.train == paths

    def test_python_paths(self) -> None:
        resolved = resolve("tiny", {"data.train": Path("a.txt"), "data.tokenizer": Path("t.json")})
        assert (resolved.config.data.train, resolved.config.data.tokenizer) == (("a.txt",), "t.json")


class TestLength:
    """One of train.steps, train.tokens and train.time."""

    def test_a_higher_layer_replaces_the_choice_of_a_lower_one(self, tmp_path: Path) -> None:
        file = save(tmp_path, "train: {time: 1h30m}\n")
        lengths = []
        for source, settings in (("debug", []), (file, []), (file, ["train.tokens=2B"])):
            train = resolve(source, settings).config.train
            lengths.append((train.steps is not None, train.tokens, train.time))
        assert lengths == [(True, None, None), (False, None, 5400.0), (False, 2 * 10**9, None)]

    def test_settled_steps_replace_tokens(self) -> None:
        resolved = settle(resolve("tiny", ["train.tokens=1M"]), {"train.steps": (1953, "1M tokens")})
        assert (resolved.config.train.steps, resolved.config.train.tokens) == (1953, None)
        assert resolved.origins["train.steps"] == "resolved: 1M tokens"
        assert resolved.origins["train.tokens"] == "default"


class TestKinds:
    """Every preset trains as each of the four kinds; what a kind has no use for is not there."""

    @pytest.mark.parametrize("preset", presets())
    @pytest.mark.parametrize(
        ("kind", "parts"), [("dense", ()), ("moe", ("moe",)), ("mod", ("mod",)), ("hybrid", ("moe", "mod"))]
    )
    def test_the_sections_of_a_kind(self, preset: str, kind: str, parts: tuple[str, ...]) -> None:
        resolved = resolve(preset, [f"model.kind={kind}"])
        model, keys = resolved.config.model, flatten(resolved.config)
        for part in ("moe", "mod"):
            assert (getattr(model, part) is not None) == (part in parts)
            assert any(key.startswith(f"model.{part}.") for key in keys) == (part in parts)
            dropped = any(key.startswith(f"model.{part}.") for key in resolved.dropped)
            own = resolve(preset).config.model
            assert dropped == (part not in parts and getattr(own, part) is not None)
        assert ("model.ffn" in keys) == ("moe" not in parts)
        assert resolved.origins.keys() == keys.keys()

    def test_nothing_is_reported_as_dropped_from_a_preset_as_it_is(self) -> None:
        assert all(resolve(preset).dropped == {} for preset in presets())

    def test_models_built_directly_keep_the_rule(self) -> None:
        assert ModelConfig(kind="hybrid").moe == MoEConfig()
        assert ModelConfig(kind="mod").moe is None
        with pytest.raises(ValidationError, match=r"a dense model has no model\.moe"):
            ModelConfig(kind="dense", moe=MoEConfig())


class TestSettle:
    def test_choices_carry_their_reason(self) -> None:
        before = resolve("debug")
        after = settle(before, {"parallel.threads": (2, "two cores"), "precision.mode": ("fp32", "no bf16 here")})
        assert (after.config.parallel.threads, after.config.precision.mode) == (2, "fp32")
        assert after.origins["parallel.threads"] == "resolved: two cores"
        changed = {"parallel.threads", "precision.mode"}
        old, new = flatten(before.config), flatten(after.config)
        assert {key for key in new if new[key] != old[key]} == changed
        assert {key for key in new if after.origins[key] != before.origins[key]} == changed

    def test_a_choice_is_checked_against_the_rest(self) -> None:
        resolved = resolve("tiny", ["train.time=1m", "train.warmup=100"])
        with pytest.raises(UserError, match=r"train\.warmup=100 \(command line\).*longer than the run"):
            settle(resolved, {"train.steps": (50, "1m at 1.2s a step")})

    def test_the_request_stays(self) -> None:
        before = resolve("debug", ["train.time=2h"])
        after = settle(before, {"train.steps": (10, "slow"), "parallel.threads": (1, "one core")})
        assert request_hash(after, "data") == request_hash(before, "data")


class TestRequestHash:
    def same(self, one: Resolved, other: Resolved) -> bool:
        return request_hash(one, "data") == request_hash(other, "data")

    def test_equal_requests_written_differently(self, tmp_path: Path) -> None:
        one = save(tmp_path, "train:\n  lr: 3e-4\n  tokens: 2M\n", "one.yaml")
        two = save(tmp_path, "# mine\ntrain: {tokens: 2_000_000, lr: 0.0003}\n", "two.yaml")
        assert self.same(resolve(one), resolve(two))
        assert self.same(resolve(one), resolve("debug", ["train.tokens=2M", "train.lr=3e-4"]))
        assert self.same(resolve("debug", ["train.lr=1"]), resolve("debug", {"train.lr": 1.0}))

    @pytest.mark.parametrize(
        "settings", [[], ["train.lr=2e-3"], ["train.lr=1e-3", "train.seed=1"], ["train.tokens=1M"]]
    )
    def test_different_requests(self, settings: list[str]) -> None:
        assert not self.same(resolve("debug", ["train.lr=1e-3"]), resolve("debug", settings))

    def test_preset_and_data_count(self) -> None:
        assert not self.same(resolve("debug"), resolve("tiny"))
        assert request_hash(resolve("debug"), "a") != request_hash(resolve("debug"), "b")

    def test_it_is_stable_across_processes(self) -> None:
        code = (
            "import sys; from lumina.config.resolve import request_hash, resolve;"
            "print(request_hash(resolve('debug', ['train.lr=1e-3']), 'data'), 'torch' in sys.modules)"
        )
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert output.split() == [request_hash(resolve("debug", ["train.lr=1e-3"]), "data"), "False"]


class TestConfigYaml:
    @pytest.mark.parametrize("preset", presets())
    @pytest.mark.parametrize("kind", ["dense", "moe", "mod", "hybrid"])
    def test_round_trip(self, tmp_path: Path, preset: str, kind: str) -> None:
        settings = [f"model.kind={kind}", "train.tokens=20B", "train.eps=1e-12", "train.warmup=10"]
        resolved = settle(resolve(preset, settings), {"parallel.threads": (3, "a reason: with # signs")})
        path = tmp_path / "config.yaml"
        write(resolved, path)
        again = read(path)
        assert again.config == resolved.config
        assert again.source == preset
        assert list(tmp_path.iterdir()) == [path]

    def test_it_shows_where_values_come_from(self, tmp_path: Path) -> None:
        resolved = settle(resolve("tiny", ["train.lr=3e-4"]), {"train.micro_batch": (4, "at most\n8192 tokens")})
        write(resolved, tmp_path / "config.yaml")
        lines = (tmp_path / "config.yaml").read_text().splitlines()
        assert lines[:2] == ["schema_version: 1", "preset: tiny"]
        for line in (
            "model:",
            "  kind: hybrid  # preset tiny",
            "  moe:",
            "    experts: 4  # preset tiny",
            "  lr: 0.0003  # command line",
            "  micro_batch: 4  # resolved: at most 8192 tokens",
            "  betas: [0.9, 0.95]  # preset tiny",
        ):
            assert line in lines

    def test_the_file_of_a_run_is_a_source_that_repeats_it(self, tmp_path: Path) -> None:
        resolved = settle(resolve("tiny", ["model.kind=moe"]), {"train.micro_batch": (4, "memory")})
        write(resolved, tmp_path / "config.yaml")
        again = resolve(tmp_path / "config.yaml", ["train.seed=1"])
        before, after = flatten(resolved.config), flatten(again.config)
        assert {key for key in after if after[key] != before[key]} == {"train.seed"}
        assert again.source == "tiny"

    @hypothesis.settings(deadline=None)
    @given(st.lists(st.text(min_size=1), min_size=1, max_size=3), st.text(min_size=1), st.text(max_size=9))
    def test_any_name_survives(
        self, tmp_path_factory: pytest.TempPathFactory, train: list[str], tokenizer: str, why: str
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "config.yaml"
        resolved = resolve("tiny", {"data.train": train, "data.tokenizer": tokenizer})
        resolved = settle(resolved, {"parallel.threads": (2, why)})
        write(resolved, path)
        assert read(path).config == resolved.config

    @pytest.mark.parametrize(("old", "new", "message"), [
        ("schema_version: 1", "schema_version: 2", "schema_version is 2"),
        ("  lr: ", "  lrr: ", "train.lrr=0.003 (file"),
        ("  lr: 0.003", "  lr: -1", "train.lr=-1 (file"),
        ("kind: hybrid", "kind: dense", "model.moe.experts=4 (file"),
        ("train:", "train:\n\t", "line "),
    ])  # fmt: skip
    def test_a_damaged_file_is_a_user_error_that_names_it(
        self, tmp_path: Path, old: str, new: str, message: str
    ) -> None:
        path = tmp_path / "config.yaml"
        write(resolve("tiny"), path)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError) as error:
            read(path)
        assert message in str(error.value)
        assert str(path) in str(error.value)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"config\.yaml: cannot be read: No such file"):
            read(tmp_path / "config.yaml")


@given(st.integers(1, 500), st.integers(1, 500))
def test_the_values_named_as_valid_are_valid(value: int, of: int) -> None:
    multiples = [int(n) for n in nearest_multiple(value, of).split(" or ")]
    assert all(n > 0 and n % of == 0 and abs(n - value) <= of for n in multiples)
    divisors = [int(n) for n in nearest_divisor(value, of).split(" or ")]
    assert all(of % n == 0 for n in divisors)
