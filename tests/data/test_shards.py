"""Token streams: what they hold, how they are cached, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as HuggingFace

import lumina
from lumina.data import shards
from lumina.data import tokenizer as tokenizer_module
from lumina.data.shards import Corpus, Shard, data_fingerprint, prepare
from lumina.errors import UserError

TEXTS = [f"document {i} says {'word ' * (i % 7)}\n" for i in range(300)]


LONG_TEXTS = ["".join(f"{name} {i}\n" for i in range(100)) for name in ("first", "second", "third")]
ROOT = str(Path(lumina.__file__).parents[1])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUMINA_CACHE", str(tmp_path / "cache"))
    write_jsonl("data.jsonl", TEXTS)


def write_jsonl(name: str, texts: list[str]) -> None:
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def made(train: str = "data.jsonl", eval: tuple[str, ...] = (), tokenizer: str = "bpe", vocab: int = 300) -> Corpus:
    return prepare(train=[train], eval=eval, tokenizer=tokenizer, vocab=vocab, seq_len=16)


def texts_of(corpus: Corpus, shard: Shard) -> list[str]:
    """Reads a stream back: it must start and end with the end token."""
    end = corpus.tokenizer.end_id
    assert shard.tokens[0] == shard.tokens[-1] == end
    borders = np.flatnonzero(shard.tokens == end)
    return [corpus.tokenizer.decode(shard.tokens[a + 1 : b].tolist()) for a, b in pairwise(borders)]


def entries() -> list[Path]:
    return sorted(path for path in Path("cache").iterdir() if path.is_dir() and not path.is_symlink())


def test_both_streams_hold_every_document_once() -> None:
    corpus = made()
    train, heldout = texts_of(corpus, corpus.train), texts_of(corpus, corpus.heldout)
    assert sorted(train + heldout) == sorted(TEXTS)
    assert heldout
    assert train != sorted(train)
    for shard, texts in ((corpus.train, train), (corpus.heldout, heldout)):
        assert shard.text_bytes == sum(len(text.encode()) for text in texts)
        assert shard.documents == len(texts)
        assert shard.tokens.dtype == np.uint16


def test_facts() -> None:
    write_jsonl("data.jsonl", [*TEXTS, "", ""])
    corpus = made()
    facts = json.loads(json.dumps(corpus.facts))
    assert sum(facts["documents"].values()) == len(TEXTS)
    assert sum(facts["bytes"].values()) == sum(len(text) for text in TEXTS)
    assert facts["tokens"] == {"train": len(corpus.train.tokens), "heldout": len(corpus.heldout.tokens)}
    assert facts["bytes_per_token"] == round(corpus.train.text_bytes / len(corpus.train.tokens), 3)
    assert (facts["empty"], facts["split"], facts["cached"]) == (2, "families", False)
    assert facts["vocab"] == corpus.tokenizer.vocab_size
    assert facts["seconds"] > 0
    assert "rebuilt" not in facts


def test_the_tokenizer_never_sees_held_out_text() -> None:
    Path("a.txt").write_text("aa bb " * 200)
    Path("b.txt").write_text("xyzxyz " * 200)
    corpus = made("a.txt", eval=("b.txt",))
    assert len(corpus.tokenizer.encode("aa bb")) < 5
    assert len(corpus.tokenizer.encode("xyz")) == 3


def test_second_time_comes_from_the_cache() -> None:
    first, second = made(), made()
    assert (first.facts["cached"], second.facts["cached"]) == (False, True)
    assert first.fingerprint == second.fingerprint
    assert np.array_equal(first.train.tokens, second.train.tokens)
    without = {"cached", "seconds"}
    assert {k: v for k, v in first.facts.items() if k not in without} == {
        k: v for k, v in second.facts.items() if k not in without
    }


def test_everything_that_matters_changes_the_fingerprint() -> None:
    prints = [made().fingerprint, made(vocab=280).fingerprint]
    write_jsonl("other.jsonl", TEXTS[1:])
    prints += [made("other.jsonl").fingerprint, made("data.jsonl", eval=("other.jsonl",)).fingerprint]
    assert len(set(prints)) == len(prints)


def test_names_and_order_of_files_do_not_matter(tmp_path: Path) -> None:
    for folder, names in (("one", "abc"), ("two", "zyx")):
        Path(folder).mkdir()
        for name, text in zip(names, LONG_TEXTS, strict=True):
            Path(folder, f"{name}.txt").write_text(text)
    assert made("one").fingerprint == made("two").fingerprint
    assert data_fingerprint(["one"]) == data_fingerprint(["two"])


def test_data_fingerprint_follows_contents_and_sides() -> None:
    write_jsonl("b.jsonl", ["b"])
    before = data_fingerprint(["data.jsonl"], ["b.jsonl"])
    assert before == data_fingerprint(["data.jsonl"], ["b.jsonl"])
    assert before != data_fingerprint(["b.jsonl"], ["data.jsonl"])
    assert before != data_fingerprint(["data.jsonl", "b.jsonl"])
    write_jsonl("b.jsonl", ["c"])
    assert before != data_fingerprint(["data.jsonl"], ["b.jsonl"])


def test_a_runs_own_tokenizer_finds_the_same_entry() -> None:
    first = made()
    first.tokenizer.save("run/tokenizer")
    again = made(tokenizer="run/tokenizer", vocab=999)
    assert again.facts["cached"]
    assert again.fingerprint == first.fingerprint
    assert len(entries()) == 1


def test_given_eval_is_all_held_out_and_overlap_is_reported() -> None:
    write_jsonl("eval.jsonl", [TEXTS[0], TEXTS[1], "new " * 30])
    corpus = made(eval=("eval.jsonl",))
    assert sorted(texts_of(corpus, corpus.heldout)) == sorted([TEXTS[0], TEXTS[1], "new " * 30])
    assert sorted(texts_of(corpus, corpus.train)) == sorted(TEXTS)
    assert (corpus.facts["split"], corpus.facts["eval_in_train"]) == ("given", 2)


def test_one_long_document_gives_its_end() -> None:
    text = "".join(f"line {i}\n" for i in range(500))
    Path("a.txt").write_text(text)
    corpus = made("a.txt")
    assert corpus.facts["split"] == "tails"
    assert texts_of(corpus, corpus.train)[0] + texts_of(corpus, corpus.heldout)[0] == text


def test_large_vocabularies_get_wide_tokens() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = HuggingFace(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_tokens([AddedToken(f"<extra {i}>", special=True) for i in range(1 << 16)])
    inner.add_tokens([AddedToken("<|endoftext|>", special=True)])
    inner.save("big.json")
    corpus = made(tokenizer="big.json")
    assert corpus.tokenizer.end_id > 1 << 16
    assert corpus.train.tokens.dtype == np.uint32
    assert corpus.train.tokens[0] == corpus.tokenizer.end_id


@pytest.mark.parametrize("name", ["train.bin", "heldout.bin", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "replace"])
def test_damaged_entries_are_rebuilt_and_said(name: str, how: str) -> None:
    whole = made()
    (entry,) = entries()
    content = bytearray((entry / name).read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    (entry / name).unlink()
    if how != "delete":
        kept = {"flip": content, "truncate": content[:-1], "replace": b"{}"}[how]
        (entry / name).write_bytes(kept)
    rebuilt = made()
    assert not rebuilt.facts["cached"]
    assert name in rebuilt.facts["rebuilt"] or "cannot be read" in rebuilt.facts["rebuilt"]
    assert rebuilt.fingerprint == whole.fingerprint
    assert made().facts["cached"]
    assert len(entries()) == 1


def python(program: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": ROOT}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)


PREPARE = "from lumina.data import shards; c = shards.prepare(train=['data.jsonl'], vocab=300, seq_len=16)"


def test_a_killed_process_leaves_nothing_that_looks_whole() -> None:
    killed = python(
        "import os, signal; from lumina.data import shards\n"
        "def die(path, *_):\n"
        "    path.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "shards._write_stream = die\n" + PREPARE
    )
    assert killed.returncode == -9
    (half,) = entries()
    assert (half / "train.bin").read_bytes() == b"half"
    corpus = made()
    assert not corpus.facts["cached"]
    assert "rebuilt" not in corpus.facts
    assert sorted(texts_of(corpus, corpus.train) + texts_of(corpus, corpus.heldout)) == sorted(TEXTS)
    assert half not in entries()


def test_of_two_processes_at_once_one_builds() -> None:
    program = f"{PREPARE}; print(c.facts['cached'], c.fingerprint)"
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(python, [program] * 3))
    assert [run.stderr for run in runs] == [""] * 3
    answers = [run.stdout.split() for run in runs]
    assert sorted(cached for cached, _ in answers) == ["False", "True", "True"]
    assert len({fingerprint for _, fingerprint in answers}) == 1


def test_an_entry_that_came_while_waiting_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = shards._locked

    @contextmanager
    def late(folder: Path, name: str) -> Iterator[None]:
        monkeypatch.setattr(shards, "_locked", locked)
        assert not made().facts["cached"]
        with locked(folder, name):
            yield

    monkeypatch.setattr(shards, "_locked", late)
    assert made().facts["cached"]


def test_prepare_needs_no_torch() -> None:
    assert python(f"{PREPARE}; import sys; print('torch' in sys.modules)").stdout == "False\n"


@pytest.mark.parametrize("cache", ["file", "file/below"])
def test_unwritable_cache_is_a_user_error(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("no folder")
    monkeypatch.setenv("LUMINA_CACHE", os.path.abspath(cache))
    with pytest.raises(UserError, match=r"the token cache .* cannot be written") as caught:
        made()
    assert "LUMINA_CACHE" in caught.value.fix


def test_full_disk_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_write_stream", full)
    with pytest.raises(UserError, match="No space left on device"):
        made()


def test_corpus_shorter_than_one_sequence() -> None:
    Path("a.txt").write_text("x" * 40)
    with pytest.raises(UserError) as caught:
        prepare(train=["a.txt"], vocab=260, seq_len=64)
    assert caught.value.message == (
        "corpus shorter than one sequence: the training side has 40 tokens and the held-out side has 4 tokens"
        "; one sequence of model.seq_len=64 needs 65"
    )
    assert "data.eval=FILE" in caught.value.fix
    assert "at most 3" in caught.value.fix
    assert len(prepare(train=["a.txt"], vocab=260, seq_len=3).heldout.tokens) == 4


def test_problems_of_both_sides_come_at_once() -> None:
    Path("bad.jsonl").write_text("nope\n")
    with pytest.raises(UserError) as caught:
        prepare(train=["missing.txt", "data.jsonl"], eval=["bad.jsonl"], vocab=300, seq_len=16)
    assert "missing.txt:" in caught.value.message
    assert "bad.jsonl:1:" in caught.value.message
    assert not Path("cache").exists()


def test_training_file_as_eval_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.jsonl is already given"):
        made(eval=("data.jsonl",))


@pytest.mark.parametrize(("train", "eval", "key"), [("e.jsonl", (), "train"), ("data.jsonl", ("e.jsonl",), "eval")])
def test_only_empty_documents(train: str, eval: tuple[str, ...], key: str) -> None:
    write_jsonl("e.jsonl", ["", ""])
    with pytest.raises(UserError, match=f"data.{key}: no document has any text"):
        made(train, eval)


def test_no_files_at_all() -> None:
    with pytest.raises(UserError, match=r"data\.train is empty"):
        prepare(train=[], vocab=300, seq_len=16)


def test_ignored_files_are_counted() -> None:
    Path("d").mkdir()
    Path("d/image.png").write_bytes(b"\x89PNG")
    Path("d/a.txt").write_text("some text " * 500)
    assert made("d").facts["ignored_files"] == 1


@pytest.mark.parametrize("size", [1, 50, 10**9])
def test_streams_do_not_depend_on_how_they_are_batched(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl("data.jsonl", [*TEXTS, *LONG_TEXTS])
    whole = made()
    monkeypatch.setattr(shards, "ENCODE_CHARACTERS", size)
    monkeypatch.setattr(tokenizer_module, "PIECE", 20)
    again = prepare(train=["data.jsonl"], vocab=300, seq_len=16, cache=Path("other"))
    assert not again.facts["cached"]
    assert again.fingerprint == whole.fingerprint
