"""What a stranger may hand over: files, folders, globs, and everything that can be wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support import read_documents

from lumina.data.documents import MAX_PROBLEMS
from lumina.errors import UserError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def refusal(*specs: str) -> str:
    with pytest.raises(UserError) as caught:
        list(read_documents(specs))
    return caught.value.message


def test_text_file_is_one_document_to_the_byte() -> None:
    write("a.txt", "one\r\n\n  two\u2028three\0\n")
    (document,) = read_documents(["a.txt"])
    assert (document.text, document.source) == ("one\r\n\n  two\u2028three\0\n", "a.txt")


def test_byte_order_mark_is_not_text() -> None:
    write("a.txt", b"\xef\xbb\xbfhello")
    write("b.jsonl", b'\xef\xbb\xbf{"text": "hello"}\n')
    assert [document.text for document in read_documents(["a.txt", "b.jsonl"])] == ["hello", "hello"]


def test_jsonl_is_one_document_a_line() -> None:
    lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(["one\u2028two", "", "é\n"])]
    write("b.jsonl", "\n".join([lines[0], "", *lines[1:]]))
    found = [(document.source, document.text) for document in read_documents(["b.jsonl"])]
    assert found == [("b.jsonl:1", "one\u2028two"), ("b.jsonl:3", ""), ("b.jsonl:4", "é\n")]


def test_folder_takes_text_files_in_order_and_no_hidden_ones() -> None:
    for name in ("d/b.txt", "d/a/z.md", "d/a/c.py", "d/image.png", "d/.git/x.txt", "d/.hidden.txt"):
        write(name, name)
    assert [document.source for document in read_documents(["d"])] == ["d/b.txt", "d/a/c.py", "d/a/z.md"]


def test_glob_takes_each_file_once() -> None:
    for name in ("d/b.txt", "d/e/a.txt"):
        write(name, name)
    assert [document.source for document in read_documents(["d/**"])] == ["d/b.txt", "d/e/a.txt"]


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    write("a.txt", "hello")
    assert [document.text for document in read_documents(["~/a.txt"])] == ["hello"]


def test_exact_duplicates_are_one_family() -> None:
    for name, text in (("a.txt", "same"), ("b.txt", "same"), ("c.txt", "other")):
        write(name, text)
    a, b, c = (document.family for document in read_documents(["a.txt", "b.txt", "c.txt"]))
    assert a == b != c


def test_an_empty_file_is_a_problem_if_named_and_counted_in_a_folder() -> None:
    write("d/__init__.py", "")
    write("d/a.py", "x = 1\n")
    assert [document.text for document in read_documents(["d"])] == ["", "x = 1\n"]
    assert "d/__init__.py: the file is empty" in refusal("d/__init__.py")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON, Expecting ',' delimiter at column 13"),
        (b"hello", "not JSON, Expecting value at column 1"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "must be an object"),
        (b'{"messages": [], "id": 1}', 'must have the key "text"; its keys: messages, id'),
        (b"{}", "its keys: none"),
        (b'{"text": 3}', '"text" must be a string, is a number'),
        (b'{"text": null}', '"text" must be a string, is null'),
        (b'{"text": "a\xff"}', "not UTF-8, byte 0xff at offset 28"),
        (b'{"text": "a\\ud800"}', "half a surrogate pair, \\ud800"),
    ],
)
def test_bad_record_is_named_by_file_and_line(line: bytes, reason: str) -> None:
    write("b.jsonl", b'{"text": "good"}\n' + line + b"\n")
    message = refusal("b.jsonl")
    assert "b.jsonl:2: " in message
    assert reason in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"one\ntwo\xe9\n", "a.txt:2: not UTF-8, byte 0xe9 at offset 7; convert it"),
        ("hi".encode("utf-16"), "a.txt:1: not UTF-8, byte 0xff at offset 0; it looks like UTF-16"),
        (b"PK\x03\x04\0\0\xff", "it looks like a binary file"),
    ],
)
def test_other_encodings_are_named_by_place(content: bytes, reason: str) -> None:
    write("a.txt", content)
    assert reason in refusal("a.txt")


def test_missing_files_get_a_suggestion() -> None:
    write("data/corpus.txt", "x")
    assert "data/corpsu.txt: no such file or folder; did you mean data/corpus.txt?" in refusal("data/corpsu.txt")
    assert f"nowhere/a: no such file or folder (in {Path.cwd()})" in refusal("nowhere/a")
    assert "*.md: no file matches" in refusal("*.md")
    assert "an empty name" in refusal("")


def test_links_and_pipes_that_hold_no_text() -> None:
    write("d/a.txt", "x")
    os.mkfifo("d/pipe.txt")
    os.symlink("loop.txt", "d/loop.txt")
    os.symlink("gone", "d/dead.txt")
    named = ("d/pipe.txt", "d/loop.txt", "d/dead.txt")
    for message in (refusal("d"), refusal("d/*"), refusal(*named)):
        assert all(f"{name}: neither a file nor a folder" in message for name in named)


def test_folder_without_text_says_what_it_holds() -> None:
    write("d/a.parquet", "x")
    assert "d: the folder has no .txt, .md, .jsonl, .py files, only others such as d/a.parquet" in refusal("d")


@pytest.mark.parametrize("again", ["a.txt", "./a.txt", "*.txt", "."])
def test_a_file_may_be_given_once(again: str) -> None:
    write("a.txt", "x")
    assert "a.txt is already given by 'a.txt'" in refusal("a.txt", again)


def test_all_problems_come_at_once() -> None:
    write("bad.txt", b"\xff")
    write("b.jsonl", '{"txt": "a"}\n{"text": "fine"}\nnope\n')
    message = refusal("missing.txt", "bad.txt", "b.jsonl")
    assert message.count("\n  - ") == 4
    assert all(place in message for place in ("missing.txt:", "bad.txt:1:", "b.jsonl:1:", "b.jsonl:3:"))


def test_endless_problems_stop() -> None:
    write("b.jsonl", "nope\n" * 1000)
    assert f"b.jsonl:{MAX_PROBLEMS}:" in (message := refusal("b.jsonl"))
    assert f"b.jsonl:{MAX_PROBLEMS + 1}:" not in message
    assert "there may be more" in message
