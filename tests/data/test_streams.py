"""A process that was killed: the next one goes on, and what comes out is equal to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import data_config

import lumina
from lumina.config.schema.data import DataConfig
from lumina.data import shards, streams
from lumina.data.corpus import Corpus
from lumina.data.shards import prepare, prepare_folder
from lumina.errors import UserError

ROOT = str(Path(lumina.__file__).parents[1])
SOURCES = ("texts.jsonl", "long.txt", "chat.jsonl")
BUFFER = 3000  # less than a configuration may say: small data makes enough batches
BATCHES = 6

PROGRAM = """
import os, signal
from pathlib import Path
from lumina.config.schema.data import DataConfig
from lumina.data import scan, shards, streams
from lumina.data.tokenizer import Tokenizer

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def dying(owner, name, at, after=False, only=lambda *_: True):
    # `owner.name` kills its process when it is called for the time number `at`, before or after its work
    real, calls = getattr(owner, name), [0]
    def function(*args, **keys):
        if only(*args):
            calls[0] += 1
        if calls[0] == at and not after:
            die()
        result = real(*args, **keys)
        if calls[0] == at:
            die()
        return result
    setattr(owner, name, function)

{patch}
data = DataConfig.model_validate({data!r}).model_copy(update={{'buffer': {buffer}}})
shards.prepare(data, vocab={vocab}, seq_len=16)
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUMINA_CACHE", str(tmp_path / "cache"))
    texts = [f"document {i} says {'word ' * (i % 20)}\n" for i in range(150)]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Path("long.txt").write_text("".join(f"line {i} of a long text\n" for i in range(250)))
    chats = [[("user", f"question {i}?"), ("assistant", f"answer {i} " * (i % 5 + 1))] for i in range(100)]
    records = ([{"role": role, "content": content} for role, content in chat] for chat in chats)
    Path("chat.jsonl").write_text("".join(json.dumps({"messages": record}) + "\n" for record in records))


def data(**keys: Any) -> DataConfig:
    return data_config(SOURCES, mode="hybrid_interleaved", **keys).model_copy(update={"buffer": BUFFER})


def kill(patch: str, vocab: int = 300, **keys: Any) -> None:
    """Prepares in a process that `patch` kills."""
    program = PROGRAM.format(
        patch=patch, data=data(**keys).model_copy(update={"buffer": 1 << 16}).model_dump(), buffer=BUFFER, vocab=vocab
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr


def building() -> Path:
    (folder,) = Path("cache").glob("*.building")
    return folder


class Calls:
    """How often each step was taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = {"scan": 0, "train_bpe": 0, "_encode": 0}
        for owner, name in ((shards, "scan"), (shards, "train_bpe"), (streams, "_encode")):
            self._count(owner, name, monkeypatch)

    def _count(self, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **keys: Any) -> Any:
            self.made[name] += 1
            return real(*args, **keys)

        monkeypatch.setattr(owner, name, counted)

    @property
    def all(self) -> tuple[int, int, int]:
        return self.made["scan"], self.made["train_bpe"], self.made["_encode"]


def contents(corpus: Corpus) -> dict[str, Any]:
    """Every file of an entry, and of the one that names its sources what does not depend on where they lie."""
    files: dict[str, Any] = {file.name: file.read_bytes() for file in sorted(corpus.train[0].folder.iterdir())}
    meta = json.loads(files.pop("meta.json"))["meta"]
    facts = {key: corpus.facts[key] for key in ("documents", "bytes", "tokens", "split", "sources")}
    return files | facts | {key: meta[key] for key in ("key", "streams", "files")}


WHOLE: dict[str, dict[str, Any]] = {}  # what nobody killed, by what was asked for


def whole(vocab: int, **keys: Any) -> dict[str, Any]:
    name = json.dumps([vocab, keys])
    if name not in WHOLE:
        WHOLE[name] = contents(prepare(data(**keys), vocab=vocab, seq_len=16, cache=Path("other")))
    return WHOLE[name]


def check(calls: Calls, expected: tuple[int, int, int], vocab: int = 300, **keys: Any) -> None:
    """Preparing again takes the `expected` steps and gives what a run that nobody kills gives."""
    went_on = prepare(data(**keys), vocab=vocab, seq_len=16)
    assert calls.all == expected
    assert not list(Path("cache").glob("*.building"))
    assert contents(went_on) == whole(vocab, **keys)


def test_without_a_kill_every_step_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    prepare(data(), vocab=300, seq_len=16)
    assert calls.all == (1, 1, BATCHES)


@pytest.mark.parametrize(("patch", "left"), [
    ("dying(scan._Table, 'add', 100)", (1, 1, BATCHES)),
    ("dying(scan._Table, 'flush', 1, after=True)", (1, 1, BATCHES)),
    ("dying(shards, 'train_bpe', 1)", (0, 1, BATCHES)),
    ("dying(Tokenizer, 'save', 1)", (0, 1, BATCHES)),
    ("dying(Tokenizer, 'save', 1, after=True)", (0, 0, BATCHES)),
    ("dying(streams._Writer, 'write', 1)", (0, 0, BATCHES)),
    ("dying(streams._Writer, 'write', 1, after=True)", (0, 0, BATCHES - 1)),
    ("dying(streams._Writer, 'write', 4)", (0, 0, BATCHES - 3)),
    ("dying(streams._Writer, '_keep_journal', 3)", (0, 0, BATCHES - 2)),
    ("dying(streams._Writer, '_keep_journal', 6)", (0, 0, 1)),
    ("dying(Path, 'replace', 2, only=lambda path, *_: path.name == 'journal.json.tmp')", (0, 0, BATCHES - 1)),
    ("dying(Path, 'replace', 6, only=lambda path, *_: path.name == 'journal.json.tmp')", (0, 0, 1)),
    ("dying(shards, '_seal', 1)", (0, 0, 0)),
    ("dying(shards, 'identity', 2)", (0, 0, 0)),
    ("dying(Path, 'rename', 1)", (1, 1, BATCHES)),
], ids=str)  # fmt: skip
def test_the_next_process_goes_on(patch: str, left: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    kill(patch)
    check(Calls(monkeypatch), left)


def test_several_kills_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    for at in (2, 1, 3):
        kill(f"dying(streams._Writer, '_keep_journal', {at})")
    check(Calls(monkeypatch), (0, 0, BATCHES - 3))


def test_a_killed_scan_with_filters_leaves_nothing_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    quality = {"exact": True, "near": 0.9}
    kill("dying(scan._Table, 'add', 100)", quality=quality)
    assert list(building().glob("quality-*"))
    check(Calls(monkeypatch), (1, 1, BATCHES), quality=quality)


def test_a_tokenizer_of_which_half_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its template beside it, it would be another tokenizer."""
    prepare(data_config("texts.jsonl"), vocab=300, seq_len=16).tokenizer.save("own")
    template = Path("own/chat_template.jinja")
    template.write_text(template.read_text().replace("add_generation_prompt", "add_generation_prompt and true"))
    kill("dying(Path, 'write_text', 1, only=lambda path, *_: path.name == 'tokenizer_config.json')", tokenizer="own")
    assert (building() / "tokenizer.json").exists()
    check(Calls(monkeypatch), (0, 0, BATCHES), tokenizer="own")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_is_interrupted_goes_on_with_a_folder_too(
    stop: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = streams._Writer.write

    written: list[int] = []

    def write(self: Any, batch: Any) -> None:
        if len(written) == 2:
            raise stop
        written.append(len(batch))
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(streams._Writer, "write", write)
        with pytest.raises(stop):
            prepare_folder(data(), Path("out"), vocab=300)
    assert not Path("out").exists()
    calls = Calls(monkeypatch)
    corpus, _ = prepare_folder(data(), Path("out"), vocab=300)
    assert calls.all == (0, 0, BATCHES - 2)
    assert contents(corpus) == whole(300)
    assert not Path(".out.building").exists()


def test_what_was_asked_for_otherwise_starts_over(monkeypatch: pytest.MonkeyPatch) -> None:
    kill("dying(streams._Writer, 'write', 3)", vocab=290)
    check(Calls(monkeypatch), (1, 1, BATCHES), vocab=280)


@pytest.mark.parametrize("journal", ["{", "[]", '{"batches": 2, "streams": {"x": 1}}'])
def test_a_damaged_journal_starts_over(journal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kill("dying(streams._Writer, 'write', 4)")
    (building() / "journal.json").write_text(journal)
    check(Calls(monkeypatch), (1, 1, BATCHES))


@pytest.mark.parametrize("name", ["0.text.train.tokens", "2.chat.train.marks"])
@pytest.mark.parametrize("how", ["short", "gone"])
def test_a_stream_shorter_than_the_journal_says_starts_over(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill("dying(streams._Writer, '_keep_journal', 6)")
    damaged = building() / name
    if how == "gone":
        damaged.unlink()
    else:
        os.truncate(damaged, json.loads((building() / "journal.json").read_text())["sizes"][name] - 1)
    check(Calls(monkeypatch), (1, 1, BATCHES))


def test_a_source_that_changes_meanwhile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = shards.train_bpe

    def change(*args: Any) -> Any:
        lines = Path("texts.jsonl").read_text().splitlines(keepends=True)
        Path("texts.jsonl").write_text("".join([*lines[:-1], json.dumps({"text": "another"})]))
        return real(*args)

    monkeypatch.setattr(shards, "train_bpe", change)
    with pytest.raises(UserError, match=r"texts\.jsonl:150: changed while it was being read"):
        prepare(data(), vocab=300, seq_len=16)


@pytest.mark.parametrize("added", [-1, 1])
def test_a_source_that_grows_or_shrinks_meanwhile_is_refused(added: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shards.train_bpe

    def change(*args: Any) -> Any:
        result = real(*args)
        lines = Path("chat.jsonl").read_text().splitlines(keepends=True)
        Path("chat.jsonl").write_text("".join(lines[:-1] if added < 0 else [*lines, lines[0]]))
        return result

    monkeypatch.setattr(shards, "train_bpe", change)
    with pytest.raises(UserError, match="changed while it was being read"):
        prepare(data(), vocab=300, seq_len=16)
