"""Difficulty: what it measures, that shards stay whole, and that a curriculum follows it."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lumina.config.resolve import resolve
from lumina.data import difficulty, shards
from lumina.data.corpus import Corpus, open_folder
from lumina.data.difficulty import write
from lumina.data.loader import DataPhase, Loader
from lumina.data.shards import prepare, prepare_folder
from lumina.errors import UserError

OUT = Path("out")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [{"text": f"document {i} says {'word ' * (i * 7 % 60)}"} for i in range(200)]
    chats = [{"prompt": f"{i}?", "completion": "yes " * (i % 9 + 1)} for i in range(100)]
    for name, records in (("t.jsonl", texts), ("c.jsonl", chats)):
        Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare_folder(resolve("debug", ["data.train=[t.jsonl, c.jsonl]"]).config.data, OUT, vocab=300)


def documents(corpus: Corpus, number: int) -> list[list[int]]:
    """The tokens of each document of a training stream, a text's with its end."""
    shard = corpus.train[number]
    begins = [*shard.starts.tolist(), len(shard.tokens) - (shard.kind == "text")]
    shift = int(shard.kind == "text")
    return [shard.tokens[a + shift : b + shift].tolist() for a, b in pairwise(begins)]


def test_length_counts_tokens() -> None:
    written = write(OUT, "length")
    corpus = open_folder(OUT)
    assert [spread.source for spread in written.spreads] == [shard.name for shard in corpus.train]
    for number, shard in enumerate(corpus.train):
        assert shard.difficulty is not None
        assert shard.difficulty.tolist() == [len(ids) for ids in documents(corpus, number)]
    spread = written.spreads[0]
    assert spread.easiest[0].difficulty == spread.quantiles[0]
    assert spread.hardest[0].difficulty == spread.quantiles[-1]
    assert spread.easiest[0].text.startswith("document ")


@pytest.mark.parametrize("part", [7, 1 << 24])
def test_rarity_is_the_mean_surprise(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difficulty, "PART", part)
    write(OUT, "rarity")
    corpus = open_folder(OUT)
    counts = Counter(token for shard in corpus.train for token in shard.tokens.tolist())
    total = sum(counts.values())
    for number, shard in enumerate(corpus.train):
        assert shard.difficulty is not None
        expected = [np.mean([-math.log(counts[i] / total) for i in ids]) for ids in documents(corpus, number)]
        np.testing.assert_allclose(shard.difficulty, expected, rtol=1e-6)


def test_a_new_difficulty_changes_the_fingerprint_and_an_equal_one_nothing() -> None:
    before = open_folder(OUT).fingerprint
    assert write(OUT, "length").changed
    length = open_folder(OUT).fingerprint
    meta = (OUT / "meta.json").stat().st_mtime_ns
    assert not write(OUT, "length").changed
    assert (OUT / "meta.json").stat().st_mtime_ns == meta
    assert write(OUT, "rarity").changed
    assert len({before, length, open_folder(OUT).fingerprint}) == 3
    assert write(OUT, "length").changed
    assert open_folder(OUT).fingerprint == length
    assert not list(OUT.glob(".*"))
    data = resolve("debug", ["data.train=[t.jsonl, c.jsonl]"]).config.data
    assert prepare_folder(data, OUT, vocab=300)[1], "the folder is still the one that was prepared"


@pytest.mark.parametrize("dies_at", range(1, 6))
def test_killed_anywhere_the_folder_is_whole(dies_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write(OUT, "length")
    steps = 0
    real = Path.replace, Path.unlink

    def dying(step: int):  # type: ignore[no-untyped-def]
        def die(path: Path, *arguments: object, **options: object) -> object:
            nonlocal steps
            steps += 1
            if steps == dies_at:
                raise KeyboardInterrupt
            return real[step](path, *arguments, **options)  # type: ignore[operator]

        return die

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying(0))
        patch.setattr(Path, "unlink", dying(1))
        with pytest.raises(KeyboardInterrupt):
            write(OUT, "rarity")
    assert steps >= dies_at
    open_folder(OUT)
    assert write(OUT, "rarity").changed


def test_a_curriculum_begins_with_the_easy() -> None:
    settings = [f"data.train={OUT}", "data.mode=hybrid_interleaved", "data.curriculum.until=20"]
    data = resolve("tiny", [*settings, "data.curriculum.start=0.1"]).config.data
    with pytest.raises(UserError, match="has no difficulty"):
        Loader(prepare(data, vocab=300, seq_len=32), data, [DataPhase(0, "both")], 32, 8, 0, 40)
    write(OUT, "length")
    corpus = prepare(data, vocab=300, seq_len=32)
    loader = Loader(corpus, data, [DataPhase(0, "chat")], 32, 8, 0, 40)
    (chat,) = (i for i, shard in enumerate(corpus.train) if shard.kind == "chat")
    column = corpus.train[chat].difficulty
    assert column is not None
    of_window = np.asarray(column)[loader.windows[chat].places()]

    def hardest(batch: int) -> float:
        return float(of_window[loader.ids(batch) - loader.offsets[chat]].max())

    assert hardest(0) <= np.quantile(of_window, 0.15) < max(hardest(i) for i in range(20, 30))


def test_what_is_no_whole_folder_is_refused() -> None:
    with pytest.raises(UserError, match="not a folder of prepared shards"):
        write(Path("t.jsonl"), "length")
    with pytest.raises(UserError, match="not a folder of prepared shards"):
        write(Path("none"), "length")
    (tokens,) = OUT.glob("0.text.train.tokens")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(UserError, match="damaged shards"):
        write(OUT, "length")
    assert shards.is_prepared(OUT)
