"""Tokens of data that nobody prepared, and of data that somebody did."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from support import data_config, write_text

from lumina.data.amount import amount
from lumina.data.shards import prepare, prepare_folder
from lumina.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUMINA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_prepared_is_counted_and_what_changed_is_not(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    data = data_config(str(text))
    before = amount(data, 300)
    assert before is not None
    assert not before.counted
    corpus = prepare(data, vocab=300, seq_len=16)
    found = amount(data, 300)
    assert found is not None
    assert (found.counted, found.train, found.heldout) == (True, *corpus.facts["tokens"].values())
    assert "cache" in found.how
    other = amount(data, 999)
    assert other is not None
    assert "of another vocabulary" in other.how
    os.utime(text, (2**32, 2**32))
    changed = amount(data, 300)
    assert changed is not None
    assert not changed.counted


def test_the_same_files_cleaned_or_held_out_are_other_data(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    (tmp_path / "b.txt").write_text(text.read_text())
    prepare(data_config(str(text)), vocab=300, seq_len=16)
    for data in (
        data_config(str(text), quality={"exact": True}),
        data_config(str(text), eval=(str(tmp_path / "b.txt"),)),
        data_config([str(text), str(tmp_path / "b.txt")]),
    ):
        found = amount(data, 300)
        assert found is not None
        assert not found.counted


def test_an_estimate_says_what_it_is_made_of(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    size = text.stat().st_size
    packed = tmp_path / "packed.txt.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    rough, small, held = (
        amount(data_config(str(path), **keys), vocab)
        for path, vocab, keys in ((text, 32768, {}), (packed, 300, {}), (text, 4096, {"eval": (str(packed),)}))
    )
    assert rough is not None
    assert small is not None
    assert held is not None
    assert rough.train == pytest.approx(0.97 * size / 4.4)
    assert rough.heldout == pytest.approx(0.03 * size / 4.4)
    assert rough.how == f"estimated from {size:.3g} bytes at 4.4 a token"
    assert small.train == pytest.approx(0.97 * 3.5 * packed.stat().st_size)
    assert held.train == pytest.approx(size / 3.9)
    assert held.heldout == pytest.approx(3.5 * packed.stat().st_size / 3.9)


def test_prepared_folders_know(tmp_path: Path) -> None:
    text, out = write_text(tmp_path), tmp_path / "shards"
    corpus, _ = prepare_folder(data_config(str(text)), out, vocab=300)
    found = amount(data_config(str(out)), 4096)
    assert found is not None
    assert (found.counted, found.train) == (True, corpus.facts["tokens"]["train"])
    both = amount(data_config([str(out), str(text)]), 4096)
    assert both is not None
    assert not both.counted
    assert both.train > found.train


def test_a_damaged_entry_of_the_cache_is_passed_over(tmp_path: Path, cache: Path) -> None:
    data = data_config(str(write_text(tmp_path)))
    prepare(data, vocab=300, seq_len=16)
    for meta in cache.glob("*/meta.json"):
        meta.write_text("{}")
    found = amount(data, 300)
    assert found is not None
    assert not found.counted


def test_a_file_that_is_not_there_is_said() -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        amount(data_config("nowhere.txt"), 300)


def test_data_sets_of_the_hub_are_not_asked(tmp_path: Path) -> None:
    assert amount(data_config("hub:owner/name"), 300) is None
