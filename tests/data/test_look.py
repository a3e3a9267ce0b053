"""A look at data: what is counted is what training counts, and nothing that is wrong vanishes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lumina.config.resolve import resolve
from lumina.data.look import HEAD, TAIL, Finding, Run, Shown, check, show
from lumina.data.shards import prepare_folder
from lumina.errors import UserError

TURNS = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A café 🎉."}]
SHARE_GPT = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A café 🎉."}]
FORMATS = {
    "messages": {"messages": [{"role": "system", "content": "Be brief."}, *TURNS, *TURNS]},
    "conversations": {"conversations": SHARE_GPT},
    "conversation": {"conversation": TURNS},
    "alpaca": {"instruction": "Add.", "input": "2 3", "output": "5", "system": "You add."},
    "prompt": {"prompt": "2 and 3?", "completion": "5"},
    "text": {"text": "a text on its own"},
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, *records: object) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return name


def shown(*specs: str, **options: object) -> Shown:
    return show(specs, refused, **options)  # type: ignore[arg-type]


def refused(finding: Finding) -> None:
    raise AssertionError(finding)


def findings(*specs: str, **options: object) -> list[Finding]:
    found: list[Finding] = []
    check(specs, found.append, **options)  # type: ignore[arg-type]
    return found


def trained(runs: list[Run]) -> str:
    return "".join(run.text for run in runs if run.trained)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_counted(name: str) -> None:
    (source,) = shown(write("a.jsonl", FORMATS[name], FORMATS[name])).sources
    assert source.formats == {name: 2}
    assert (source.documents, source.duplicates, source.empty) == (2, 1, 0)
    assert source.conversations == (0 if name == "text" else 2)
    assert source.system == (2 if name in ("messages", "alpaca") else 0)
    assert source.turns == (0 if name == "text" else 8 if name == "messages" else 4)


def test_containers_and_texts_beside_each_other() -> None:
    Path("notes").mkdir()
    Path("notes/a.md").write_text("# a\n")
    Path("notes/b.bin").write_bytes(b"\0")
    with gzip.open("c.json.gz", "wt") as file:
        json.dump([FORMATS["text"], FORMATS["text"] | {"text": ""}], file)
    write("d.jsonl", FORMATS["prompt"])
    notes, packed, chats = shown("notes", "c.json.gz", "d.jsonl:0.5").sources
    assert [notes.documents, packed.documents, packed.empty, chats.documents] == [1, 1, 1, 1]
    assert chats.name == "d.jsonl"


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_what_stands_out_is_what_counts(train_on: str) -> None:
    write("a.jsonl", FORMATS["messages"])
    found = shown("a.jsonl", train_on=train_on)
    (example,), (source,) = found.examples, found.sources
    answer = "A café 🎉.<|end|>"
    if train_on == "assistant":
        assert trained(example.runs) == 2 * answer
    else:
        begin = "<|system|>Be brief."
        assert trained(example.runs) == begin + 2 * f"<|user|>What is it?<|assistant|>{answer}"
    assert "".join(run.text for run in example.runs).startswith("<|end|><|system|>Be brief.<|user|>")
    assert source.trained == example.trained
    assert source.tokens == example.tokens


def test_tokens_are_those_of_the_shards() -> None:
    write("t.jsonl", *({"text": f"text {i} {'word ' * i}"} for i in range(50)))
    write("c.jsonl", *(FORMATS["messages"] | {"id": i} for i in range(50)))
    data = resolve("debug", ['data.train=["t.jsonl", "c.jsonl"]']).config.data
    corpus, _ = prepare_folder(data, Path("out"), vocab=300)
    texts, chats = shown("t.jsonl", "c.jsonl", tokenizer="out").sources
    streams = {
        kind: [s.stream for s in (*corpus.train, *corpus.heldout) if s.kind == kind] for kind in ("text", "chat")
    }
    assert texts.tokens == sum(stream.tokens - 1 for stream in streams["text"])  # less the end that opens a stream
    assert texts.trained == texts.tokens
    assert chats.tokens == sum(stream.tokens for stream in streams["chat"])
    assert chats.trained == sum(stream.counted for stream in streams["chat"])
    assert sum(texts.lengths.values()) == texts.documents == 50


def test_a_tokenizer_of_a_run_folder() -> None:
    write("t.jsonl", FORMATS["text"])
    data = resolve("debug", ['data.train=["t.jsonl"]', "data.eval=t2.jsonl"]).config.data
    write("t2.jsonl", FORMATS["text"])
    corpus, _ = prepare_folder(data, Path("out"), vocab=300)
    corpus.tokenizer.save("run/tokenizer")
    assert shown("t.jsonl", tokenizer="run").tokenizer.startswith("run/tokenizer, ")
    with pytest.raises(UserError, match="no such tokenizer file"):
        shown("t.jsonl", tokenizer="none")


def test_examples_are_spread_and_the_same_for_the_same_seed() -> None:
    write("a.jsonl", *({"text": f"number {i}"} for i in range(30)))
    write("b.jsonl", *({"text": f"other {i}"} for i in range(30)))

    def places(seed: int) -> list[str]:
        return [example.where for example in shown("a.jsonl", "b.jsonl", examples=6, seed=seed).examples]

    assert places(0) == places(0) != places(1)
    numbers = [int(place.partition(":")[2]) + 30 * place.startswith("b") for place in places(0)]
    assert [(number - 1) // 10 for number in numbers] == list(range(6))
    assert len(shown("a.jsonl", examples=100).examples) == 30


def test_a_long_example_is_cut_in_the_middle() -> None:
    Path("long.txt").write_text("".join(f"{i}\n" for i in range(2000)))
    (example,) = shown("long.txt").examples
    (cut,) = (run for run in example.runs if run.cut)
    assert cut.text == f"… {example.tokens - HEAD - TAIL:,} tokens …"
    assert example.runs[0].text.startswith("0\n1\n2\n")
    assert [run.text for run in example.runs[-2:]] == [example.runs[-2].text, "<|end|>"]
    assert example.runs[-2].text.endswith("1998\n1999\n")


def test_a_text_in_several_parts_is_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("long.txt").write_text("".join(f"{i} words\n" for i in range(3000)))
    whole = shown("long.txt")
    monkeypatch.setattr("lumina.data.formats.read_file.__defaults__", (1000,))
    assert shown("long.txt", tokenizer="bpe") == whole


def test_longer_and_duplicates_belong_to_their_source() -> None:
    write("a.jsonl", {"text": "one"}, {"text": "two"})
    write("b.jsonl", {"text": "two"}, {"text": "word " * 200})
    first, second = shown("a.jsonl", "b.jsonl", seq_len=100).sources
    assert (first.duplicates, second.duplicates) == (0, 1)
    assert (first.longer, second.longer) == (0, 1)


def test_one_broken_line_is_found_among_good_ones() -> None:
    write(
        "a.jsonl", *({"text": f"good {i}"} for i in range(40)), "{broken", *({"text": f"more {i}"} for i in range(40))
    )
    (finding,) = findings("a.jsonl")
    assert finding.kind == "bad record"
    assert finding.line.startswith("a.jsonl:41: not JSON")
    listed: list[Finding] = []
    assert show(["a.jsonl"], listed.append).sources[0].documents == 80
    assert listed == [finding]


def test_check_hides_nothing() -> None:
    write("a.jsonl", *["no"] * 50, {"text": "same"}, {"text": ""}, {"text": "same"})
    write("b.jsonl", FORMATS["prompt"], {"messages": TURNS[:1]}, {"text": "not a conversation"})
    Path("c.parquet").write_bytes(b"PAR1 no")
    Path("d.gz").write_bytes(gzip.compress(b"text" * 1000)[:-20])
    found: list[Finding] = []
    checked = check(["a.jsonl", "b.jsonl", "c.parquet", "d.gz", "none*.txt", "gone.txt"], found.append)
    kinds = [finding.kind for finding in found]
    assert kinds.count("bad record") == checked.bad_records == 52
    assert kinds.count("empty") == checked.empty == 1
    assert kinds.count("duplicate") == checked.duplicates == 1
    files = [finding.line for finding in found if finding.kind == "bad file"]
    assert [line.split(":")[0] for line in files] == ["none*.txt", "gone.txt", "c.parquet", "d.gz"]
    assert "a.jsonl:53: an exact duplicate of a.jsonl:51" in [finding.line for finding in found]
    assert not checked.usable


def test_usable_or_not() -> None:
    write("a.jsonl", "no", {"text": "yes"})

    def usable(spec: str, skip_bad: int = 0) -> bool:
        return check([spec], lambda finding: None, skip_bad=skip_bad).usable

    assert not usable("a.jsonl")
    assert usable("a.jsonl", skip_bad=1)
    assert not usable(write("b.jsonl", {"text": ""}), skip_bad=9)
    assert usable(write("c.jsonl", {"text": "same"}, {"text": "same"}))


def test_longer_conversations_need_a_tokenizer() -> None:
    long = {"prompt": "word " * 100, "completion": "yes"}
    write("a.jsonl", FORMATS["prompt"], long)
    with pytest.raises(UserError, match="counts tokens"):
        findings("a.jsonl", seq_len=50)
    (finding,) = findings("a.jsonl", seq_len=50, tokenizer="bpe")
    assert finding.kind == "longer"
    assert finding.line.startswith("a.jsonl:2: ")


def test_a_template_may_refuse() -> None:
    write("a.jsonl", {"messages": TURNS}, FORMATS["messages"])
    data = resolve("debug", ['data.train=["a.jsonl"]']).config.data
    corpus, _ = prepare_folder(data, Path("out"), vocab=300)
    corpus.tokenizer.save("own")
    source = corpus.tokenizer.chat_template
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    Path("own/chat_template.jinja").write_text(refuse + source)
    (finding,) = findings("a.jsonl", tokenizer="own")
    assert finding == Finding("bad record", "a.jsonl:2: the chat template refuses it: no system turns")


def test_prepared_shards_are_no_files() -> None:
    write("a.jsonl", *({"text": f"text {i}"} for i in range(9)))
    prepare_folder(resolve("debug", ["data.train=a.jsonl"]).config.data, Path("out"), vocab=300)
    (finding,) = findings("out")
    assert finding == Finding("bad file", "out: prepared shards; give the files that they were made of")
