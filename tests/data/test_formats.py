"""Every format to records, and every file that is not what it seems to be: named by file, line and reason."""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.data import containers, formats
from lumina.data.files import find_files
from lumina.data.formats import cut, read_file, read_files
from lumina.data.records import MAX_PROBLEMS, Message, Problems, Record, digest
from lumina.data.shapes import format_of, normalise
from lumina.data.tokenizer import train_bpe
from lumina.errors import UserError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
MEANT = (Message("user", "hi"), Message("assistant", "hello"))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def read(*specs: str, tolerated: int = 0) -> tuple[list[Record], Problems]:
    problems = Problems(tolerated)
    return list(read_files(find_files(specs, problems), problems)), problems


def good(*specs: str) -> list[Record]:
    records, problems = read(*specs)
    assert problems.fatal == []
    return records


def bad(*specs: str) -> list[str]:
    return read(*specs)[1].fatal


def lines(*values: object) -> str:
    return "".join(f"{json.dumps(value)}\n" for value in values)


# -- text


def test_text_file_is_one_record_to_the_byte() -> None:
    write("a.txt", "one\r\n\n  two\u2028three\0\n")
    (record,) = good("a.txt")
    assert (record.text, record.where, record.last) == ("one\r\n\n  two\u2028three\0\n", "a.txt", True)


def test_byte_order_mark_is_not_text() -> None:
    write("a.txt", b"\xef\xbb\xbfhello")
    write("b.jsonl", b'\xef\xbb\xbf{"text": "hello"}\n')
    write("c.json", b'\xef\xbb\xbf[{"text": "hello"}]')
    write("d.json", b'\xef\xbb\xbf{"text": "hello"}')
    assert [record.text for record in good("a.txt", "b.jsonl", "c.json", "d.json")] == ["hello"] * 4


def test_exact_duplicates_are_one_family() -> None:
    for name, text in (("a.txt", "same"), ("b.txt", "same"), ("c.txt", "other")):
        write(name, text)
    write("d.jsonl", lines({"text": "same"}))
    a, b, c, d = (record.key for record in good("a.txt", "b.txt", "c.txt", "d.jsonl"))
    assert a == b == d != c


def test_an_empty_file_in_a_folder_is_an_empty_record() -> None:
    write("d/__init__.py", "")
    write("d/a.py", "x = 1\n")
    assert [record.text for record in good("d")] == ["", "x = 1\n"]


def test_ignored_files_give_nothing() -> None:
    write("d/a.png", b"\xff")
    write("d/a.txt", "x")
    assert [record.where for record in good("d")] == ["d/a.txt"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"one\ntwo\xe9\n", "a.txt:2: not UTF-8, byte 0xe9 at offset 7; convert it, for example with iconv"),
        (b"one\ntwo\xe2\x82", "a.txt:2: not UTF-8, byte 0xe2 at offset 7; convert it, for example with iconv"),
        ("hi".encode("utf-16"), "a.txt:1: not UTF-8, byte 0xff at offset 0; it looks like UTF-16"),
        (b"PK\x03\x04\0\0\xff", "a.txt:1: not UTF-8, byte 0xff at offset 6; it looks like a binary file"),
        (("words\n" * 900).encode("utf-16-le"), "a.txt:1: a NUL byte at offset 1; it looks like UTF-16"),
        (b"one line\n" + b"\0" * 9000, "a.txt:2: a NUL byte at offset 9; it looks like UTF-16 or a binary file"),
    ],
)
@pytest.mark.parametrize("chunk", [3, 5, 1 << 20])
def test_other_encodings_are_named_by_place(
    content: bytes, reason: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "CHUNK", chunk)
    (problem,) = bad(write("a.txt", content))
    assert problem.startswith(reason)


TEXTS = st.lists(st.sampled_from(["a", "é", " ", "\n", "\r\n", "\r", "🦊", "\t", "\u2028"]), max_size=120).map("".join)


@given(TEXTS, st.integers(1, 12), st.integers(1, 7))
def test_parts_are_the_text_and_do_not_depend_on_the_chunks(text: str, part: int, chunk: int) -> None:
    chunks = [text[i : i + chunk] for i in range(0, len(text), chunk)]
    parts = list(cut(chunks, part))
    assert "".join(piece for piece, _ in parts) == text
    assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True]
    assert parts == list(cut([text], part))
    assert all(piece for piece, _ in parts) or parts == [("", True)]
    assert all(len(piece) <= max(part, formats.LONGEST_PART * part) for piece, _ in parts)


@settings(deadline=None)
@given(TEXTS, st.integers(1, 12))
def test_parts_have_the_tokens_of_the_text(text: str, part: int) -> None:
    tokenizer = train_bpe(["a a\na a\n aa é\n aa"], 300)
    parts = [piece for piece, _ in cut([text], part)]
    if all(len(piece) < formats.LONGEST_PART * part for piece in parts):  # else it may be cut anywhere
        assert [i for piece in parts for i in tokenizer.encode(piece)] == tokenizer.encode(text)


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.sampled_from(["", ".gz", ".zst"]), st.integers(1, 9))
def test_a_file_in_parts_is_the_text(
    tmp_path_factory: pytest.TempPathFactory, text: str, ending: str, part: int
) -> None:
    path = tmp_path_factory.mktemp("part") / f"a.txt{ending}"
    path.write_bytes(PACK[ending](text.encode()))
    (file,) = find_files([str(path)], Problems())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containers, "CHUNK", 3)
        records = list(read_file(file, problems := Problems(), part))
    assert problems.fatal == []
    assert "".join(record.text for record in records) == text
    assert {(record.where, record.family) for record in records} == {(file.name, digest(records[0].text))}
    assert [record.last for record in records] == [False] * (len(records) - 1) + [True]


def test_a_text_that_is_bad_at_its_end_gives_no_part() -> None:
    write("a.txt", b"a line\n" * 100 + b"\xff")
    (file,) = find_files(["a.txt"], problems := Problems(tolerated=1))
    assert list(read_file(file, problems, part=10)) == []
    assert (len(problems.skipped), problems.fatal) == (1, [])


# -- compression


def zstd(content: bytes) -> bytes:
    """Two frames, as parallel writers make them."""
    half = len(content) // 2
    return b"".join(
        zstandard.ZstdCompressor(write_checksum=True).compress(part) for part in (content[:half], content[half:])
    )


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def noise(count: int) -> str:
    """Records that hardly compress."""
    draw = random.Random(0)
    return lines(*({"text": f"{draw.getrandbits(1024):x}"} for _ in range(count)))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".ndjson"])
def test_compressed_files_are_read_like_plain_ones(ending: str, suffix: str) -> None:
    content = noise(500).encode()
    write(f"a{suffix}", content)
    write(f"a{suffix}{ending}", PACK[ending](content))
    plain, packed = good(f"a{suffix}"), good(f"a{suffix}{ending}")
    assert [record.content for record in plain] == [record.content for record in packed]
    assert packed[0].where.startswith(f"a{suffix}{ending}")


@pytest.mark.parametrize(("ending", "name"), [(".gz", "gzip"), (".zst", "zstd")])
@pytest.mark.parametrize("left", [0, 3, 9, 150_000, -1])
def test_a_compressed_file_that_was_cut_is_never_silently_shorter(ending: str, name: str, left: int) -> None:
    content = PACK[ending](noise(3000).encode())
    write(f"d/a.jsonl{ending}", content[:left])
    records, problems = read("d", tolerated=3000)
    after = f"; {len(records)} records before that were read" if records else ""
    assert f"d/a.jsonl{ending}: the file ends in the middle ({name}){after}" in problems.fatal
    assert (len(records) > 0) == (left in (150_000, -1))
    write(f"t/a.txt{ending}", content[:left])
    assert read("t", tolerated=1)[0] == []
    assert bad("t") == [f"t/a.txt{ending}: the file ends in the middle ({name})"]


@pytest.mark.parametrize(("ending", "name"), [(".gz", "gzip"), (".zst", "zstd")])
def test_a_file_that_is_not_compressed_says_so(ending: str, name: str) -> None:
    (problem,) = bad(write(f"a.txt{ending}", "some plain words"))
    assert problem.startswith(f"a.txt{ending}: not readable as {name}, ")
    damaged = bytearray(PACK[ending](noise(500).encode()))
    damaged[len(damaged) // 3] ^= 255
    write(f"b.jsonl{ending}", bytes(damaged))
    assert any(problem.startswith(f"b.jsonl{ending}: not readable as {name}") for problem in bad(f"b.jsonl{ending}"))


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst", "hub:owner/name"])
def test_a_missing_library_is_named_with_its_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not name.startswith("hub:"):
        write(name, "x")
    for module in ("pyarrow.parquet", "zstandard", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        read(name)
    assert caught.value.message.startswith(f"{name}: reading it needs ")
    assert "pip install 'lumina-ai[data]'" in caught.value.fix


def test_a_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("a.txt", "b.jsonl", "c.json", "d.parquet", "e.txt.zst"):
        write(name, "x")
    monkeypatch.setattr(Path, "open", refuse)
    assert bad(".") == [
        f"{name}: Permission denied" for name in ("a.txt", "b.jsonl", "c.json", "d.parquet", "e.txt.zst")
    ]


# -- JSON


def test_jsonl_is_one_record_a_line() -> None:
    first, *rest = lines({"text": "one\u2028two"}, {"text": ""}, {"text": "é\n"}).splitlines(keepends=True)
    write("b.jsonl", "".join([first, "\r\n", *rest]).removesuffix("\n"))
    found = [(record.where, record.text) for record in good("b.jsonl")]
    assert found == [("b.jsonl:1", "one\u2028two"), ("b.jsonl:3", ""), ("b.jsonl:4", "é\n")]


@pytest.mark.parametrize("indent", [None, 1, 4])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_json_is_an_array(indent: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "CHUNK", chunk)
    values = [{"text": f'é"\\ {"x" * i}\n', "n": -1.5e10, "t": True} for i in range(30)]
    write("a.json", "\n" + json.dumps(values, indent=indent, ensure_ascii=False) + "\n")
    records = good("a.json")
    assert [record.text for record in records] == [value["text"] for value in values]
    per_record = 5 if indent else 0
    assert [record.where for record in records] == [f"a.json:{2 + bool(indent) + i * per_record}" for i in range(30)]


def test_json_is_one_object_or_lines_of_them() -> None:
    write("a.json", json.dumps({"text": "x"}, indent=2))
    write("b.json", '{"text": "x"}')
    write("c.json", "\n" + lines({"text": "x"}, {"text": "y"}))
    write("d.json", json.dumps({"text": "x"}, indent=2) + "\n" + json.dumps({"text": "y"}, indent=2))
    write("e.json", "[]")
    write("f.json", "[ {} ]".format('{"text": "x"}'))
    places = [record.where for record in good("a.json", "b.json", "c.json", "d.json", "e.json", "f.json")]
    assert places == ["a.json:1", "b.json:1", "c.json:2", "c.json:3", "d.json:1", "d.json:4", "f.json:1"]


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('{"text": ,}]', ":3: not JSON, Expecting value at column 10"),
        ("nope]", ":3: not JSON, Expecting value at column 1"),
        ('{"text": "x"} {"text": "y"}]', ":3: not JSON, Expecting ',' delimiter at column 15"),
        ('{"text": "x"}', ":4: not JSON, the array has no end at column 1"),
        ('{"text": "x"}]\nmore', ":4: not JSON, Extra data at column 1"),
        ('{"text": "x', ":3: not JSON, Invalid control character at column 12"),
        ('{"text": "x"},', ":4: not JSON, Expecting value at column 1"),
        ("[" * 100_000, ":3: not readable JSON, nested too deeply"),
        ("9" * 5000 + "]", ":3: not readable JSON, a number with more digits than can be meant"),
    ],
)
def test_a_broken_array_is_read_up_to_there(broken: str, reason: str, size: int) -> None:
    write("a.json", f'[\n{{"text": "{"x" * size}"}},\n{broken}\n')
    records, problems = read("a.json", tolerated=5)
    assert [len(record.text) for record in records[:1]] == [size]
    read_before = f"; {len(records)} records before that were read"
    assert problems.fatal == [f"a.json{reason}; the rest of the file cannot be read{read_before}"]


def test_bad_records_of_an_array_are_no_reason_to_stop() -> None:
    write("a.json", '[\n{"text": "x"},\n3,\n{"text": null},\n{"text": "y"}\n]')
    records, problems = read("a.json", tolerated=1)
    assert [record.text for record in records] == ["x", "y"]
    assert problems.skipped == ['a.json:3: must be an object such as {"text": "…"}, is a number']
    assert problems.fatal == ['a.json:4: "text" must be a string, is null']


def test_json_in_another_encoding() -> None:
    (problem,) = bad(write("a.json", b'[{"text": "x"},\n{"text": "\xe9"}]'))
    assert problem.startswith("a.json:2: not UTF-8, byte 0xe9 at offset 26; convert it")
    assert "the rest of the file cannot be read" in problem


def test_a_line_too_long_is_skipped_without_being_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "LONGEST", 50)
    monkeypatch.setattr(containers, "CHUNK", 20)
    long = {"text": "x" * 500}
    write("b.jsonl", lines({"text": "a"}, long, {"text": "b"}, long).removesuffix("\n"))
    records, problems = read("b.jsonl", tolerated=2)
    assert [(record.where, record.text) for record in records] == [("b.jsonl:1", "a"), ("b.jsonl:3", "b")]
    assert problems.skipped == [f"b.jsonl:{n}: a line longer than 50 bytes" for n in (2, 4)]
    write("a.json", json.dumps([{"text": "a"}, long, {"text": "b"}]))
    (problem,) = bad("a.json")
    assert problem.startswith("a.json:1: a value longer than 50 characters; the rest of the file cannot be read")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON, Expecting ',' delimiter at column 13"),
        (b'{"text": "a', "not JSON, Unterminated string starting at column 10"),
        (b"hello", "not JSON, Expecting value at column 1"),
        (b"[" * 100_000, "not readable JSON, nested too deeply"),
        (b'{"text": "x", "id": ' + b"9" * 5000 + b"}", "a number with more digits than can be meant"),
        (b"[1]", "must be an object"),
        (b"true", 'must be an object such as {"text": "…"}, is true or false'),
        (b'{"body": "x", "id": 1}', "its keys: body, id"),
        (b"{}", "its keys: none"),
        (b'{"text": 3}', '"text" must be a string, is a number'),
        (b'{"text": null}', '"text" must be a string, is null'),
        (b'{"text": ["x"]}', '"text" must be a string, is an array'),
        (b'{"text": "a\xff"}', "not UTF-8, byte 0xff at offset 28"),
        (b'{"text": "a\\ud800"}', '"text" has half a surrogate pair, \\ud800, no character'),
        (json.dumps({"messages": CHAT}).encode(), 'is a record of format "messages", but this file began with "text"'),
    ],
)
def test_bad_record_is_named_by_file_and_line(line: bytes, reason: str) -> None:
    write("b.jsonl", b'{"text": "good"}\n' + line + b"\n")
    (problem,) = bad("b.jsonl")
    assert problem.startswith("b.jsonl:2: ")
    assert reason in problem


def test_keys_are_few_and_cannot_steer_a_terminal() -> None:
    (problem,) = bad(write("b.jsonl", lines(dict.fromkeys(["\x1b[31mred", *(f"key {i}" for i in range(3000))], 1))))
    assert r"its keys: \x1b[31mred, key 0, " in problem
    assert problem.endswith("and 2993 more")


def test_all_problems_come_at_once() -> None:
    write("bad.txt", b"\xff")
    write("b.jsonl", '{"txt": "a"}\n{"text": "fine"}\nnope\n')
    problems = bad("missing.txt", "bad.txt", "b.jsonl")
    assert [problem.split(": ")[0] for problem in problems] == ["missing.txt", "bad.txt:1", "b.jsonl:1", "b.jsonl:3"]


def test_endless_problems_stop() -> None:
    write("a.jsonl", "nope\n" * 1000)
    write("b.txt", b"\xff")
    problems = bad("a.jsonl", "b.txt")
    assert problems[-1].startswith(f"a.jsonl:{MAX_PROBLEMS}:")
    assert len(problems) == MAX_PROBLEMS


def test_some_bad_records_may_be_tolerated_but_no_bad_file() -> None:
    write("a.jsonl", '{"text": "x"}\nnope\n{"text": 3}\n{"text": "y"}\n')
    write("b.txt", b"\xff")
    records, problems = read("a.jsonl", "b.txt", tolerated=3)
    assert [record.text for record in records] == ["x", "y"]
    assert ([problem.split(": ")[0] for problem in problems.skipped], problems.fatal) == (
        ["a.jsonl:2", "a.jsonl:3", "b.txt:1"],
        [],
    )
    assert len(read("a.jsonl", "b.txt", tolerated=2)[1].fatal) == 1


# -- tables


def test_parquet_is_one_record_a_row() -> None:
    pq.write_table(pa.table({"id": range(3000), "text": [f"row {i}" for i in range(3000)]}), "a.parquet")
    found = [(record.where, record.text) for record in good("a.parquet")]
    assert found == [(f"a.parquet:{i + 1}", f"row {i}") for i in range(3000)]


def test_parquet_of_conversations() -> None:
    turns = [*CHAT, {"role": "user", "content": None}]
    pq.write_table(pa.table({"messages": [CHAT, turns], "text": [None, "x"], "source": ["a", "b"]}), "a.parquet")
    records, problems = read("a.parquet")
    assert [record.messages for record in records] == [MEANT]
    assert problems.fatal == ['a.parquet:2: messages[2]: "content" must be a string, is null']


def test_parquet_without_a_known_column_names_those_it_has() -> None:
    pq.write_table(pa.table({"body": ["a"], "input": ["b"]}), "a.parquet")
    (problem,) = bad("a.parquet")
    assert problem.startswith("a.parquet:1: must have the key")
    assert problem.endswith("its keys: body, input")


def test_parquet_with_a_string_that_is_none() -> None:
    strings = pa.array([b"good", b"b\xff", b"also"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": strings}), "a.parquet")
    records, problems = read("a.parquet")
    assert [record.text for record in records] == ["good", "also"]
    assert problems.fatal == ["a.parquet:2: not UTF-8"]
    pq.write_table(pa.table({"text": [b"bytes"]}), "b.parquet")
    assert bad("b.parquet") == ['b.parquet:1: "text" must be a string, is bytes']


@pytest.mark.parametrize("left", [0, 3, 100, -1])
def test_parquet_that_was_cut(left: int) -> None:
    pq.write_table(pa.table({"text": noise(300).splitlines()}), "whole.parquet")
    write("d/a.parquet", Path("whole.parquet").read_bytes()[:left])
    records, problems = read("d", tolerated=1000)
    assert records == []
    assert problems.fatal[0].startswith("d/a.parquet: the file ends in the middle or is damaged (parquet), ")


def test_parquet_that_is_damaged_inside() -> None:
    pq.write_table(pa.table({"text": noise(5000).splitlines()}), "a.parquet", row_group_size=1024)
    content = bytearray(Path("a.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 5000] = bytes(5000)
    write("a.parquet", bytes(content))
    records, problems = read("a.parquet", tolerated=10_000)
    assert 0 < len(records) < 5000
    assert problems.fatal or problems.skipped


class Hub(ModuleType):
    """What stands in for the library."""

    def __init__(self, *records: object, error: Exception | None = None) -> None:
        super().__init__("datasets")
        self.asked: list[tuple[str, str | None, str, bool]] = []
        self.records, self.error = records, error

    def load_dataset(
        self, name: str, config: str | None, split: str, streaming: bool, revision: str
    ) -> Iterator[object]:
        assert revision == "a commit"
        self.asked.append((name, config, split, streaming))
        return self.rows()

    def rows(self) -> Iterator[object]:
        yield from self.records
        if self.error:
            raise self.error


@pytest.fixture
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "hub_revision", lambda _: "a commit")


@pytest.mark.usefixtures("_found")
def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, {"text": "x"})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    records, problems = read("hub:owner/name", "hub:owner/name@test#en")
    assert [(record.where, record.messages) for record in records] == [("hub:owner/name:1", MEANT)] * 2
    assert hub.asked == [("owner/name", None, "train", True), ("owner/name", "en", "test", True)]
    assert all(problem.startswith("hub:owner/name:2: is a record of format") for problem in problems.fatal)


@pytest.mark.usefixtures("_found")
def test_a_data_set_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Hub({"text": "x"}, error=ConnectionError("no route\nto host")))
    reason = "hub:a/b: cannot be loaded, ConnectionError: no route; 1 records before that were read"
    assert bad("hub:a/b") == [reason]


# -- shapes of records

SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    ("record", "name", "messages"),
    [
        ({"messages": CHAT}, "messages", MEANT),
        ({"messages": [SYSTEM, *CHAT]}, "messages", (Message("system", "be kind"), *MEANT)),
        ({"messages": [*CHAT, *CHAT[1:]], "id": 3}, "messages", (*MEANT, MEANT[1])),
        ({"messages": CHAT[1:]}, "messages", MEANT[1:]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, "conversations",
         MEANT),
        ({"conversation": CHAT}, "conversation", MEANT),
        ({"conversation": [{"from": "user", "content": "hi"}, {"role": "bot", "value": "hello"}]}, "conversation",
         MEANT),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                       {"role": "model", "content": "hello"}]}, "messages", MEANT),
        ({"messages": [{"role": None, "from": "ai", "content": None, "value": "hello"}]}, "messages", MEANT[1:]),
        ({"instruction": "hi", "output": "hello"}, "alpaca", MEANT),
        ({"instruction": "hi", "input": "", "output": "hello", "text": "all"}, "alpaca", MEANT),
        ({"instruction": "hi", "input": "all", "output": "hello"}, "alpaca", (Message("user", "hi\n\nall"), MEANT[1])),
        ({"instruction": "hi", "input": None, "output": "hello", "system": "be kind"}, "alpaca",
         (Message("system", "be kind"), *MEANT)),
        ({"prompt": "hi", "completion": "hello"}, "prompt", MEANT),
        ({"prompt": "hi", "response": "hello"}, "prompt", MEANT),
        ({"prompt": "hi", "completion": None, "response": "hello"}, "prompt", MEANT),
        ({"messages": None, "prompt": "hi", "response": "hello"}, "prompt", MEANT),
    ],
)  # fmt: skip
def test_conversations_in_every_spelling(record: dict[str, Any], name: str, messages: tuple[Message, ...]) -> None:
    assert format_of(record) == name
    assert normalise(record, "a:1") == Record("a:1", messages=messages, format=name)


def test_texts_and_what_is_neither() -> None:
    assert normalise({"text": "x", "messages": None}, "a:1") == Record("a:1", text="x")
    assert format_of({"text": "x", "instruction": "y"}) == "text"
    assert format_of({"text": None}) == "text"
    assert format_of({"instruction": "y"}) is None


def chat(*turns: object) -> dict[str, Any]:
    return {"messages": [*CHAT, *turns]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": "hi"}, '"messages" must be an array of turns, is a string'),
        ({"messages": None}, '"messages" must be an array of turns, is null'),
        ({"conversation": []}, '"conversation" is empty'),
        ({"messages": CHAT[:1]}, '"messages" has no assistant turn, there is nothing to learn'),
        (chat("hi"), "messages[2] must be an object with role and content, is a string"),
        (chat({"content": "x"}), 'messages[2] has no "role"; its keys: content'),
        (chat({"role": "user", "tool_calls": 1}), 'messages[2] has no "content"; its keys: role, tool_calls'),
        (chat({"role": "user", "content": None}), 'messages[2]: "content" must be a string, is null'),
        (chat({"from": "gpt", "value": {}}), 'messages[2]: "value" must be a string, is an object'),
        (chat({"role": 3, "content": "x"}), 'messages[2]: "role" must be a string, is a number'),
        (chat({"role": "tool", "content": "x"}), "messages[2]: unknown role 'tool'; known are system, user, assistant"),
        (chat({"role": "\x1b[31m", "content": "x"}), "messages[2]: unknown role '\\x1b[31m'; known are"),
        (chat({"role": "user", "content": "\ud800"}), 'messages[2]: "content" has half a surrogate pair, \\ud800'),
        (chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
         "messages[2].content[0]: a part of type 'image_url'; only text can be learned"),
        (chat({"role": "user", "content": ["x"]}), "messages[2].content[0] must be an object with type and text"),
        (chat({"role": "user", "content": [{"type": "text"}]}), 'messages[2].content[0] has no "text"; its keys: type'),
        (chat({"role": "assistant", "content": " \n"}), "messages[2]: the assistant's turn is empty"),
        (chat({"role": "assistant", "content": []}), "messages[2]: the assistant's turn is empty"),
        (chat(SYSTEM), "messages[2]: a system turn that is not the first one"),
        ({"instruction": "x", "output": ""}, '"output" is empty, there is nothing to learn'),
        ({"instruction": "x", "input": ["a"], "output": "y"}, '"input" must be a string, is an array'),
        ({"instruction": "x", "output": "y", "system": 1}, '"system" must be a string, is a number'),
        ({"instruction": "x"}, "its keys: instruction"),
        ({"prompt": CHAT, "completion": "y"}, '"prompt" must be a string, is an array'),
        ({"prompt": "x", "response": ""}, '"response" is empty, there is nothing to learn'),
        ({"prompt": "x\udc00", "response": "y"}, '"prompt" has half a surrogate pair, \\udc00'),
    ],
)  # fmt: skip
def test_a_conversation_that_is_none_says_why(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is what is tested
        normalise(record, "a:1")
    assert reason in str(caught.value)


# -- the embedded corpus


def test_the_sample_is_text_and_conversations_of_the_same_families(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("lumina.data.sample_chat")
    fake.conversations = lambda text, name: [(name, text[:9]), ("?", "!")]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    problems = Problems()
    texts = list(read_files(find_files(["sample"], problems), problems))
    chats = list(read_files(find_files(["sample_chat"], problems), problems))
    assert problems.fatal == []
    families = {record.where: record.family for record in texts}
    assert len(set(families.values())) < len(families)  # near-duplicates
    assert [record.where for record in chats] == [f"{record.where}:{i}" for record in texts for i in (1, 2)]
    assert all(record.family == families[record.where.rpartition(":")[0]] for record in chats)
    assert chats[0].messages[0] == Message("user", texts[0].where)
