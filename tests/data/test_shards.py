"""Token streams: what they hold, how they are cached, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import data_config
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HuggingFace

import lumina
from lumina.data import scan as scan_module
from lumina.data import shards, streams
from lumina.data import tokenizer as tokenizer_module
from lumina.data.corpus import Corpus, Shard
from lumina.data.files import DataFile
from lumina.data.formats import read_file
from lumina.data.records import Problems, Record
from lumina.data.shards import data_fingerprint, prepare, prepare_folder
from lumina.data.template import COUNTED
from lumina.data.tokenizer import Tokenizer, train_bpe
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


def write_chats(name: str, answers: list[str]) -> None:
    turns = [[("user", f"question {i}?"), ("assistant", answer)] for i, answer in enumerate(answers)]
    records = ([{"role": role, "content": content} for role, content in turn] for turn in turns)
    Path(name).write_text("".join(json.dumps({"messages": record}) + "\n" for record in records))


def made(
    *train: str, tokenizer: str = "", vocab: int = 300, seq_len: int = 16, cache: Path | None = None, **keys: Any
) -> Corpus:
    data = data_config(train or "data.jsonl", **keys)
    return prepare(data, vocab=vocab, seq_len=seq_len, tokenizer=tokenizer, cache=cache)


def refused(*train: str, **keys: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        made(*train, **keys)
    return caught.value


def only(shards: tuple[Shard, ...]) -> Shard:
    (shard,) = shards
    return shard


def texts_of(corpus: Corpus, shard: Shard) -> list[str]:
    """Reads a stream of texts back: it must start and end with the end token."""
    end = corpus.tokenizer.end_id
    assert shard.tokens[0] == shard.tokens[-1] == end
    borders = np.flatnonzero(shard.tokens == end)
    assert shard.starts.tolist() == borders[:-1].tolist()
    return [corpus.tokenizer.decode(shard.tokens[a + 1 : b].tolist()) for a, b in pairwise(borders)]


def both_sides(corpus: Corpus) -> list[str]:
    return [text for side in (corpus.train, corpus.heldout) for shard in side for text in texts_of(corpus, shard)]


def chats_of(corpus: Corpus, shard: Shard) -> list[tuple[str, str]]:
    """All of each conversation without its roles, and what of it counts."""
    parts = zip(
        np.split(np.array(shard.tokens), shard.starts[1:].astype(int)),
        np.split(np.array(shard.marks), shard.starts[1:].astype(int)),
        strict=True,
    )
    decode = corpus.tokenizer.decode
    return [(decode(ids.tolist()), decode(ids[(marks & COUNTED) > 0].tolist())) for ids, marks in parts]


def entries() -> list[Path]:
    return sorted(path for path in Path("cache").iterdir() if path.is_dir() and not path.is_symlink())


def test_both_streams_hold_every_document_once() -> None:
    corpus = made()
    train, heldout = only(corpus.train), only(corpus.heldout)
    assert sorted(both_sides(corpus)) == sorted(TEXTS)
    assert texts_of(corpus, heldout)
    for shard in (train, heldout):
        texts = texts_of(corpus, shard)
        assert shard.stream.text_bytes == sum(len(text.encode()) for text in texts)
        assert (shard.stream.documents, shard.stream.tokens) == (len(texts), len(shard.tokens))
        assert (shard.stream.counted, shard.stream.answer_bytes) == (0, 0)
        assert shard.tokens.dtype == np.uint16


def test_conversations_are_whole_and_their_answers_count() -> None:
    answers = [f"answer {i} é" for i in range(200)]
    write_chats("chat.jsonl", answers)
    corpus = made("chat.jsonl", mode="finetune")
    chats = [chat for side in (corpus.train, corpus.heldout) for chat in chats_of(corpus, only(side))]
    assert sorted(chats) == sorted((f"question {i}?{answer}", answer) for i, answer in enumerate(answers))
    for side in (corpus.train, corpus.heldout):
        shard = only(side)
        mine = [answer for _, answer in chats_of(corpus, shard)]
        assert shard.stream.answer_bytes == sum(len(answer.encode()) for answer in mine)
        assert shard.stream.counted == int((shard.marks & COUNTED).sum())
        assert shard.stream.counted == sum(len(corpus.tokenizer.encode(answer)) + 1 for answer in mine)
        assert shard.stream.documents == len(mine) == len(shard.starts)
        assert len(shard.marks) == len(shard.tokens) == shard.stream.tokens
        assert shard.formats == {"messages": 200}


def test_facts() -> None:
    write_jsonl("data.jsonl", [*TEXTS, "", ""])
    corpus = made()
    facts = json.loads(json.dumps(corpus.facts))
    assert sum(facts["documents"].values()) == len(TEXTS)
    assert sum(facts["bytes"].values()) == sum(len(text) for text in TEXTS)
    train, heldout = only(corpus.train), only(corpus.heldout)
    assert facts["tokens"] == {"train": len(train.tokens), "heldout": len(heldout.tokens)}
    assert facts["bytes_per_token"] == round(train.stream.text_bytes / len(train.tokens), 3)
    told = {"name": "data.jsonl", "kind": "text", "documents": facts["documents"]["train"]}
    assert facts["sources"] == [told | {"tokens": len(train.tokens), "formats": ["text"]}]
    assert (facts["empty"], facts["split"], facts["cached"], facts["skipped"]) == (2, "families", False, [])
    assert facts["vocab"] == corpus.tokenizer.vocab_size
    assert facts["seconds"] > 0
    assert "rebuilt" not in facts


def test_the_tokenizer_never_sees_held_out_text() -> None:
    Path("a.txt").write_text("aa bb " * 200)
    Path("b.txt").write_text("xyzxyz " * 200)
    corpus = made("a.txt", eval=["b.txt"])
    assert len(corpus.tokenizer.encode("aa bb")) < 5
    assert len(corpus.tokenizer.encode("xyz")) == 3


def test_the_tokenizer_sees_as_much_of_each_source_as_it_has_of_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held out by hand, or removed, takes no room."""
    write_jsonl("a.jsonl", [f"a {i:03}" for i in range(600)])
    write_jsonl("b.jsonl", [f"b {i:03}" for i in range(200)] + ["z"] * 3000)
    write_jsonl("eval.jsonl", [f"e {i}" for i in range(5000)])
    seen: list[str] = []
    real = shards.train_bpe

    def watched(texts: Iterable[str], vocab: int) -> Tokenizer:
        seen.extend(texts)
        return real(seen, vocab)

    monkeypatch.setattr(shards, "train_bpe", watched)
    monkeypatch.setattr(shards, "BPE_CHARACTERS", 400)
    made("a.jsonl", "b.jsonl", eval=["eval.jsonl"], quality={"min_chars": 2})
    assert [sum(text[0] == name for text in seen) for name in "abze"] == [60, 20, 0, 0]


def test_second_time_comes_from_the_cache() -> None:
    first, second = made(), made()
    assert (first.facts["cached"], second.facts["cached"]) == (False, True)
    assert first.fingerprint == second.fingerprint
    assert np.array_equal(only(first.train).tokens, only(second.train).tokens)
    without = {"cached", "seconds"}
    assert {k: v for k, v in first.facts.items() if k not in without} == {
        k: v for k, v in second.facts.items() if k not in without
    }


def test_everything_that_matters_changes_the_fingerprint() -> None:
    prints = [made().fingerprint, made(vocab=280).fingerprint]
    write_jsonl("other.jsonl", TEXTS[1:])
    prints += [made("other.jsonl").fingerprint, made("data.jsonl", eval=["other.jsonl"]).fingerprint]
    assert len(set(prints)) == len(prints)


def test_names_and_order_of_files_do_not_matter(tmp_path: Path) -> None:
    for folder, names in (("one", "abc"), ("two", "zyx")):
        Path(folder).mkdir()
        for name, text in zip(names, LONG_TEXTS, strict=True):
            Path(folder, f"{name}.txt").write_text(text)
    assert made("one").fingerprint == made("two").fingerprint
    assert data_fingerprint(data_config("one")) == data_fingerprint(data_config("two"))


def named(*train: str, eval: tuple[str, ...] = ()) -> str:
    return data_fingerprint(data_config(train, eval=eval))


def test_data_fingerprint_follows_contents_sides_and_weights() -> None:
    write_jsonl("b.jsonl", ["b"])
    before = named("data.jsonl", eval=("b.jsonl",))
    assert before == named("data.jsonl", eval=("b.jsonl",))
    others = {
        named("b.jsonl", eval=("data.jsonl",)),
        named("data.jsonl", "b.jsonl"),
        named("data.jsonl:1", "b.jsonl:2"),
        named("data.jsonl:2", "b.jsonl:1"),
    }
    assert len(others - {before}) == 4
    write_jsonl("b.jsonl", ["c"])
    assert before != named("data.jsonl", eval=("b.jsonl",))


def test_a_runs_own_tokenizer_finds_the_same_entry() -> None:
    first = made()
    first.tokenizer.save("run/tokenizer")
    again = made(tokenizer="run/tokenizer", vocab=999)
    assert again.facts["cached"]
    assert again.fingerprint == first.fingerprint
    assert len(entries()) == 1


def test_given_eval_is_all_held_out_and_overlap_is_reported() -> None:
    write_jsonl("eval.jsonl", [TEXTS[0], TEXTS[1], "new " * 30])
    corpus = made(eval=["eval.jsonl"])
    assert sorted(texts_of(corpus, only(corpus.heldout))) == sorted([TEXTS[0], TEXTS[1], "new " * 30])
    assert sorted(texts_of(corpus, only(corpus.train))) == sorted(TEXTS)
    assert (corpus.facts["split"], corpus.facts["eval_in_train"]) == ("given", 2)


def test_one_long_document_gives_its_end() -> None:
    text = "".join(f"line {i}\n" for i in range(500))
    Path("a.txt").write_text(text)
    corpus = made("a.txt")
    assert corpus.facts["split"] == "tails"
    assert "".join(both_sides(corpus)) == text
    assert corpus.facts["documents"] == {"train": 1, "heldout": 1}


def test_large_vocabularies_get_wide_tokens() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = HuggingFace(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([AddedToken(f"<extra {i}>", special=True) for i in range(1 << 16)])
    inner.add_tokens([AddedToken("<|endoftext|>", special=True)])
    inner.save("big.json")
    corpus = made(tokenizer="big.json")
    assert corpus.tokenizer.end_id > 1 << 16
    assert only(corpus.train).tokens.dtype == np.uint32
    assert sorted(both_sides(corpus)) == sorted(TEXTS)


PARTS = [f"{i}.{side}.{what}" for i, side, what in (
    (0, "text.train", "tokens"), (0, "text.heldout", "tokens"), (0, "text.train", "starts"), (1, "chat.train", "marks"),
)]  # fmt: skip
SETTINGS = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "meta.json"]


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in [*PARTS, *SETTINGS] for how in ("flip", "delete")]
    + [(name, how) for name in (PARTS[0], "meta.json") for how in ("truncate", "replace")],
)
def test_damaged_entries_are_rebuilt_and_said(name: str, how: str) -> None:
    write_chats("chat.jsonl", [f"answer {i}" for i in range(100)])
    both = ("data.jsonl", "chat.jsonl")
    whole = made(*both, mode="hybrid_interleaved")
    (entry,) = entries()
    content = bytearray((entry / name).read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    (entry / name).unlink()
    if how != "delete":
        kept = {"flip": content, "truncate": content[:-1], "replace": b"{}"}[how]
        (entry / name).write_bytes(kept)
    rebuilt = made(*both, mode="hybrid_interleaved")
    assert not rebuilt.facts["cached"]
    assert name in rebuilt.facts["rebuilt"] or "cannot be read" in rebuilt.facts["rebuilt"]
    assert rebuilt.fingerprint == whole.fingerprint
    assert made(*both, mode="hybrid_interleaved").facts["cached"]
    assert len(entries()) == 1


def python(program: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": ROOT}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)


PREPARE = (
    "from lumina.config.schema.data import DataConfig; from lumina.data import shards\n"
    "c = shards.prepare(DataConfig.model_validate({'train': ('data.jsonl',)}), vocab=300, seq_len=16)"
)


def test_of_two_processes_at_once_one_builds() -> None:
    program = f"{PREPARE}; print(c.facts['cached'], c.fingerprint)"
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(python, [program] * 3))
    assert [run.stderr for run in runs] == [""] * 3
    answers = [run.stdout.split() for run in runs]
    assert sorted(cached for cached, _ in answers) == ["False", "True", "True"]
    assert len({fingerprint for _, fingerprint in answers}) == 1


def test_an_entry_that_came_while_waiting_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = shards.locked

    @contextmanager
    def late(*args: Any) -> Iterator[None]:
        monkeypatch.setattr(shards, "locked", locked)
        assert not made().facts["cached"]
        with locked(*args):
            yield

    monkeypatch.setattr(shards, "locked", late)
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

    monkeypatch.setattr(streams._Writer, "_keep_journal", full)
    with pytest.raises(UserError, match="No space left on device"):
        made()
    assert entries() == []  # half of it would only fill the disk


def test_corpus_shorter_than_one_sequence() -> None:
    Path("a.txt").write_text("x" * 40)
    error = refused("a.txt", vocab=260, seq_len=64)
    assert error.message == (
        "corpus shorter than one sequence: the training side has 40 tokens and the held-out side has 4 tokens"
        "; one sequence of model.seq_len=64 needs 65"
    )
    assert "data.eval=FILE" in error.fix
    assert "at most 3" in error.fix
    assert len(only(made("a.txt", vocab=260, seq_len=3).heldout).tokens) == 4


def test_one_conversation_cannot_be_held_out_too() -> None:
    write_chats("chat.jsonl", ["hello"])
    assert refused("chat.jsonl", mode="finetune").message == "nothing can be held out of so little"


def test_problems_of_both_sides_come_at_once() -> None:
    Path("bad.jsonl").write_text("nope\n")
    error = refused("missing.txt", "data.jsonl", eval=["bad.jsonl"])
    assert "missing.txt:" in error.message
    assert "bad.jsonl:1:" in error.message
    assert not Path("cache").exists()


def test_training_file_as_eval_is_refused() -> None:
    assert "data.jsonl is already given" in refused(eval=["data.jsonl"]).message


@pytest.mark.parametrize(("train", "eval", "key"), [("e.jsonl", (), "train"), ("data.jsonl", ("e.jsonl",), "eval")])
def test_only_empty_documents(train: str, eval: tuple[str, ...], key: str) -> None:
    write_jsonl("e.jsonl", ["", ""])
    assert refused(train, eval=eval).message.startswith(f"data.{key}: no document has any text")


def test_ignored_files_are_counted() -> None:
    Path("d").mkdir()
    Path("d/image.png").write_bytes(b"\x89PNG")
    Path("d/a.txt").write_text("some text " * 500)
    assert made("d").facts["ignored_files"] == 1


def read_in_parts(files: Iterable[DataFile], problems: Problems) -> Iterator[Record]:
    for file in files:
        yield from read_file(file, problems, 70)


@pytest.mark.parametrize("parted", [False, True])
@pytest.mark.parametrize("buffer", [1 << 16, 1 << 30])
def test_streams_do_not_depend_on_how_they_are_batched(
    buffer: int, parted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl("data.jsonl", [f"{i} {text * 20}" for i, text in enumerate(TEXTS)])
    Path("a.txt").write_text("".join(f"line {i}\n" for i in range(3000)))
    sources = ("data.jsonl", "a.txt")
    whole = made(*sources, buffer=1 << 18)
    monkeypatch.setattr(tokenizer_module, "PIECE", 20)
    if parted:
        monkeypatch.setattr(scan_module, "read_files", read_in_parts)
    again = made(*sources, buffer=buffer, cache=Path("other"))
    assert not again.facts["cached"]
    if parted:  # the text's name is the beginning of it: it may be on the other side
        assert sorted(both_sides(again)) == sorted(both_sides(whole))
    else:
        assert again.fingerprint == whole.fingerprint


def test_texts_in_parts_that_give_their_ends_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["".join(f"{name} {i}\n" for i in range(200 + 7 * n)) for n, name in enumerate("abcd")]
    for n, text in enumerate(texts):
        Path(f"{n}.txt").write_text(text)
    names = [f"{n}.txt" for n in range(4)]
    monkeypatch.setattr(scan_module, "read_files", read_in_parts)
    corpus = made(*names)
    assert corpus.facts["split"] == "tails"
    heads, tails = ([texts_of(corpus, shard) for shard in side] for side in (corpus.train, corpus.heldout))
    assert [head + tail for (head,), (tail,) in zip(heads, tails, strict=True)] == texts


class TestModes:
    @pytest.fixture(autouse=True)
    def _chats(self) -> None:
        write_chats("chat.jsonl", [f"answer {i}" for i in range(100)])
        self.both = ("data.jsonl", "chat.jsonl")

    def test_texts_alone_do_not_read_conversations(self) -> None:
        error = refused(*self.both, mode="base")
        assert "data.mode=base reads texts" in error.message
        assert "chat.jsonl holds conversations (messages)" in error.message
        assert "data.jsonl" not in error.message
        assert "hybrid_interleaved or hybrid_sequential" in error.fix

    def test_conversations_alone_do_not_read_texts(self) -> None:
        error = refused("data.jsonl", mode="finetune")
        assert "data.jsonl holds texts" in error.message
        assert "data.mode=base" in error.fix

    @pytest.mark.parametrize(("source", "missing", "fix"), [
        ("data.jsonl", "there are no conversations", "data.mode=base"),
        ("chat.jsonl", "there are no texts", "data.mode=finetune"),
    ])  # fmt: skip
    @pytest.mark.parametrize("mode", ["hybrid_interleaved", "hybrid_sequential"])
    def test_both_need_both(self, mode: str, source: str, missing: str, fix: str) -> None:
        error = refused(source, mode=mode)
        assert missing in error.message
        assert fix in error.fix

    def test_what_is_cached_is_checked_as_well(self) -> None:
        made(*self.both, mode="hybrid_interleaved")
        assert "chat.jsonl holds conversations" in refused(*self.both, mode="base").message

    def test_both_kinds_in_one_source(self) -> None:
        Path("mixed").mkdir()
        for name in self.both:
            Path(name).rename(Path("mixed", name))
        corpus = made("mixed", mode="hybrid_interleaved")
        assert [(shard.name, shard.kind) for shard in corpus.train] == [("mixed", "chat"), ("mixed", "text")]
        assert [source["formats"] for source in corpus.facts["sources"]] == [["messages"], ["text"]]
        assert len(corpus.of("heldout", "chat")) == len(corpus.of("heldout", "text")) == 1


class TestBadRecords:
    def write(self) -> None:
        good = [json.dumps({"text": text}) for text in TEXTS]
        Path("data.jsonl").write_text("\n".join([*good[:100], "{bad", *good[100:200], '{"text": 3}', *good[200:]]))

    def test_as_many_as_are_tolerated_are_left_out_and_listed(self) -> None:
        self.write()
        for cached in (False, True):
            corpus = made(skip_bad=2)
            assert [problem.partition(": ")[0] for problem in corpus.facts["skipped"]] == [
                "data.jsonl:101",
                "data.jsonl:202",
            ]
            assert corpus.facts["cached"] == cached
        assert sorted(both_sides(corpus)) == sorted(TEXTS)

    def test_one_more_is_an_error(self) -> None:
        self.write()
        error = refused(skip_bad=1)
        assert "data.jsonl:202" in error.message
        assert "besides 1 records that data.skip_bad=1 tolerates" in error.message
        assert entries() == []

    def test_what_a_template_refuses_is_a_bad_record(self) -> None:
        tokenizer = train_bpe(TEXTS, 300)
        source = tokenizer.chat_template.replace("message['content'] }}", "message['content'] | lower }}")
        Tokenizer(tokenizer._inner, chat_template=source).save("own")
        write_chats("chat.jsonl", [f"answer {i}" for i in range(100)])
        spaced = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "hello"}]}
        with Path("chat.jsonl").open("a") as file:
            file.write(json.dumps(spaced))
        error = refused("chat.jsonl", mode="finetune", tokenizer="own")
        assert "chat.jsonl:101: the chat template changes what is said" in error.message
        corpus = made("chat.jsonl", mode="finetune", tokenizer="own", skip_bad=1)
        assert sum(corpus.facts["documents"].values()) == 100


def test_weights_stay_with_their_sources() -> None:
    write_jsonl("b.jsonl", [f"other {i}" for i in range(100)])
    first = made("data.jsonl:0.3", "b.jsonl:2")
    assert [(shard.name, shard.weight) for shard in first.train] == [("data.jsonl", 0.3), ("b.jsonl", 2.0)]
    second = made("data.jsonl:1", "b.jsonl:4")
    assert second.facts["cached"]
    assert [shard.weight for shard in second.train] == [1.0, 4.0]
    assert [source["weight"] for source in second.facts["sources"]] == [1.0, 4.0]
    assert made("data.jsonl", "b.jsonl").train[0].weight is None


def test_quality_removes_and_reports() -> None:
    write_jsonl("data.jsonl", [*TEXTS, *TEXTS[:5], "!?!?!?!? " * 30])
    whole = made()
    corpus = made(quality={"exact": True, "symbols": 0.5})
    assert not corpus.facts["cached"]
    assert sorted(both_sides(corpus)) == sorted(TEXTS)
    removed = corpus.facts["removed"]
    assert (removed["exact duplicate"]["documents"], removed["symbols"]["documents"]) == (5, 1)
    assert removed["symbols"]["examples"][0]["where"] == "data.jsonl:306"
    assert len(both_sides(whole)) == 306
    assert "removed" not in whole.facts


def test_quality_keeps_what_is_held_out_by_hand() -> None:
    write_jsonl("e.jsonl", ["short", "new words " * 20])
    corpus = made(eval=["e.jsonl"], quality={"min_chars": 10})
    assert sorted(texts_of(corpus, only(corpus.heldout))) == sorted(["short", "new words " * 20])


def test_quality_that_leaves_nothing_is_refused() -> None:
    assert "data.quality removes every document" in refused(quality={"min_chars": 10**6}).message


class TestPreparedFolders:
    def prepared(self, *train: str, out: str = "out", tokenizer: str = "", **keys: Any) -> tuple[Corpus, bool]:
        data = data_config(train or "data.jsonl", **keys)
        return prepare_folder(data, Path(out), vocab=300, tokenizer=tokenizer)

    def test_they_hold_what_the_files_give(self) -> None:
        write_chats("chat.jsonl", [f"answer {i}" for i in range(100)])
        both = ("data.jsonl", "chat.jsonl")
        self.prepared(*both)
        here = made("out", mode="hybrid_interleaved")
        there = made(*both, mode="hybrid_interleaved")
        for side in ("train", "heldout"):
            for mine, other in zip(getattr(here, side), getattr(there, side), strict=True):
                assert (mine.kind, mine.name) == (other.kind, "out")
                assert np.array_equal(mine.tokens, other.tokens)
                assert np.array_equal(mine.starts, other.starts)
                assert mine.kind == "text" or np.array_equal(mine.marks, other.marks)
        assert here.tokenizer.fingerprint == there.tokenizer.fingerprint
        for key in ("documents", "bytes", "tokens", "bytes_per_token", "vocab", "split", "empty"):
            assert here.facts[key] == there.facts[key]
        assert data_fingerprint(data_config("out", mode="hybrid_interleaved"))

    def test_the_files_may_be_gone(self) -> None:
        self.prepared()
        Path("data.jsonl").unlink()
        assert made("out").facts["changed"] == []

    def test_a_changed_file_is_noticed(self) -> None:
        self.prepared()
        assert made("out").facts["changed"] == []
        write_jsonl("data.jsonl", TEXTS[1:])
        assert made("out").facts["changed"] == [os.path.realpath("data.jsonl")]

    @pytest.mark.parametrize("name", ["0.text.train.tokens", "tokenizer.json", "meta.json"])
    def test_damaged_ones_are_refused(self, name: str) -> None:
        self.prepared()
        content = bytearray(Path("out", name).read_bytes())
        content[len(content) // 2] ^= 1
        Path("out", name).write_bytes(content)
        error = refused("out")
        assert "out" in error.message
        assert "lumina data prepare" in error.fix

    def test_a_second_time_says_that_they_are_there(self) -> None:
        first, was_there = self.prepared()
        assert not was_there
        before = Path("out/meta.json").stat().st_mtime_ns
        second, was_there = self.prepared()
        assert was_there
        assert second.fingerprint == first.fingerprint
        assert Path("out/meta.json").stat().st_mtime_ns == before

    def test_damaged_ones_are_made_again(self) -> None:
        first, _ = self.prepared()
        Path("out/0.text.train.tokens").write_bytes(b"")
        second, was_there = self.prepared()
        assert not was_there
        assert second.fingerprint == first.fingerprint

    def test_other_data_replaces_all_of_it(self) -> None:
        self.prepared()
        Path("out/0.text.train.difficulty").write_bytes(b"of the old")
        write_jsonl("data.jsonl", TEXTS[:200])
        corpus, was_there = self.prepared()
        assert not was_there
        assert sorted(both_sides(corpus)) == sorted(TEXTS[:200])
        assert not Path("out/0.text.train.difficulty").exists()

    @pytest.mark.parametrize("what", ["a folder", "a file"])
    def test_something_else_is_left_alone(self, what: str) -> None:
        kept = Path("out/mine.txt") if what == "a folder" else Path("out")
        kept.parent.mkdir(exist_ok=True)
        kept.write_text("mine")
        with pytest.raises(UserError, match="there is something else"):
            self.prepared()
        assert kept.read_text() == "mine"

    def test_where_nothing_can_be_written(self) -> None:
        Path("file").write_text("no folder")
        with pytest.raises(UserError, match="the folder file cannot be written") as caught:
            self.prepared(out="file/out")
        assert "--out" in caught.value.fix

    def test_an_empty_folder_will_do(self) -> None:
        Path("out").mkdir()
        assert self.prepared()[1] is False
        assert made("out").facts["documents"]["train"] > 0

    def test_files_beside_them_take_their_tokenizer(self) -> None:
        corpus, _ = self.prepared()
        write_jsonl("more.jsonl", [f"something else {i}" for i in range(200)])
        mixed = made("out", "more.jsonl")
        assert mixed.tokenizer.fingerprint == corpus.tokenizer.fingerprint
        assert [shard.name for shard in mixed.train] == ["out", "more.jsonl"]
        assert sorted(both_sides(mixed)) == sorted([*TEXTS, *(f"something else {i}" for i in range(200))])
        assert mixed.fingerprint != corpus.fingerprint

    def test_another_tokenizer_is_refused(self) -> None:
        self.prepared()
        train_bpe(["other"], 260).save("own")
        assert "prepared with another tokenizer than own" in refused("out", tokenizer="own").message
        self.prepared(out="second", tokenizer="own")
        assert "another tokenizer than the other shards" in refused("out", "second").message

    def test_they_cannot_be_prepared_or_held_out(self) -> None:
        self.prepared()
        with pytest.raises(UserError, match="out: prepared already"):
            self.prepared("out", out="again")
        assert "bring their own held-out side" in refused(eval=["out"]).message

    def test_they_may_have_weights(self) -> None:
        self.prepared()
        write_jsonl("more.jsonl", [f"something else {i}" for i in range(200)])
        assert [shard.weight for shard in made("out:3", "more.jsonl:1").train] == [3.0, 1.0]

    def test_their_kind_is_checked(self) -> None:
        self.prepared()
        assert "out holds texts" in refused("out", mode="finetune").message


def test_many_sources_of_one_document_each_hold_some_out() -> None:
    for i in range(40):
        Path(f"t{i}.txt").write_text("".join(f"{i} and {k}\n" for k in range(300)))
    corpus = made(*(f"t{i}.txt" for i in range(40)))
    assert corpus.facts["documents"]["heldout"] >= 1
    assert sum(corpus.facts["documents"].values()) == 40


def test_of_a_source_with_a_weight_something_is_left() -> None:
    """Without it the others would get its share, and nobody would know."""
    write_jsonl("large.jsonl", [f"text {i} of many" for i in range(300)])
    for i in range(60):
        Path("small.txt").write_text(f"a small one, the {i}th of its kind, of which there are some\n" * 3)
        corpus = made("small.txt:0.7", "large.jsonl:0.3")
        assert {shard.name for shard in corpus.train} == {"small.txt", "large.jsonl"}


def test_our_own_folders_are_no_data_unless_they_are_named() -> None:
    Path("d").mkdir()
    Path("d/a.txt").write_text("some text " * 500)
    before = made("d").fingerprint
    prepare_folder(data_config("d"), Path("d/shards"), vocab=300)
    again = made("d")
    assert again.fingerprint == before
    assert again.facts["ignored_files"] == 1
    assert prepare_folder(data_config("d"), Path("d/shards"), vocab=300)[1]
