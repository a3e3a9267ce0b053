"""What a stranger may hand over: files, folders, globs, names of data sets, and what can be wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lumina.data.files import TEXT_SUFFIXES, DataFile, find_files, parse_hub
from lumina.data.records import Problems


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(*names: str, content: str = "x") -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)


def found(*specs: str) -> list[DataFile]:
    files = find_files(specs, problems := Problems())
    assert problems.fatal == []
    return files


def wrong(*specs: str) -> list[str]:
    find_files(specs, problems := Problems())
    return problems.fatal


@pytest.mark.parametrize(
    ("name", "container", "compression"),
    [
        ("a.txt", "text", ""), ("a.R", "text", ""), ("a.weird", "text", ""), ("bare", "text", ""),
        ("a.json", "json", ""), ("a.jsonl", "jsonl", ""), ("a.ndjson", "jsonl", ""), ("a.parquet", "parquet", ""),
        ("a.JSONL", "jsonl", ""), ("a.txt.gz", "text", "gz"), ("a.jsonl.gz", "jsonl", "gz"),
        ("a.json.zst", "json", "zst"), ("a.py.zst", "text", "zst"), ("a.gz", "text", "gz"),
    ],
)  # fmt: skip
def test_the_suffix_says_what_a_file_holds(name: str, container: str, compression: str) -> None:
    write(name)
    (file,) = found(name)
    assert (file.name, file.container, file.compression) == (name, container, compression)


def test_folder_takes_what_it_knows_in_order_and_nothing_hidden() -> None:
    write("d/b.txt", "d/a/z.md", "d/a/c.py", "d/a/e.jsonl.zst", "d/image.png", "d/n.ipynb", "d/.git/x.txt", "d/.h.txt")
    files = found("d")
    kept = [file.name for file in files if file.container != "ignored"]
    assert kept == ["d/b.txt", "d/a/c.py", "d/a/e.jsonl.zst", "d/a/z.md"]
    assert [file.name for file in files if file.container == "ignored"] == ["d/image.png", "d/n.ipynb"]


def test_folder_takes_sources_of_all_languages() -> None:
    write(*(f"d/a{suffix}" for suffix in TEXT_SUFFIXES))
    assert [file.container for file in found("d")] == ["text"] * len(TEXT_SUFFIXES)


def test_glob_takes_each_file_once() -> None:
    write("d/b.txt", "d/e/a.txt")
    assert [file.name for file in found("d/**")] == ["d/b.txt", "d/e/a.txt"]


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    write("a.txt")
    assert [file.path for file in found("~/a.txt")] == [Path.cwd() / "a.txt"]


def test_an_empty_file_is_a_problem_if_named_and_none_in_a_folder() -> None:
    write("d/__init__.py", content="")
    assert [file.name for file in found("d")] == ["d/__init__.py"]
    assert wrong("d/__init__.py") == ["d/__init__.py: the file is empty"]


def test_missing_files_get_a_suggestion() -> None:
    write("data/corpus.txt")
    assert wrong("data/corpsu.txt") == ["data/corpsu.txt: no such file or folder; did you mean data/corpus.txt?"]
    assert wrong("nowhere/a") == [f"nowhere/a: no such file or folder (in {Path.cwd()})"]
    assert wrong("*.md") == [f"*.md: no file matches (in {Path.cwd()})"]
    assert wrong("") == ["'': an empty name gives no file"]
    assert "nnn.txt: File name too long" in wrong("n" * 300 + ".txt")[0]


def test_links_and_pipes_that_hold_no_text() -> None:
    write("d/a.txt")
    os.mkfifo("d/pipe.txt")
    os.symlink("loop.txt", "d/loop.txt")
    os.symlink("gone", "d/dead.txt")
    named = ("d/pipe.txt", "d/loop.txt", "d/dead.txt")
    for problems in (wrong("d"), wrong("d/*"), wrong(*named)):
        assert len(problems) == 3
        assert all(f"{name}: neither a file nor a folder" in "\n".join(problems) for name in named)


def test_folder_without_text_says_what_it_holds() -> None:
    write("d/a.png")
    (problem,) = wrong("d")
    assert problem.startswith("d: the folder has no files that can be read (.txt, .md, .jsonl, .json, .parquet, ")
    assert problem.endswith(", only others such as d/a.png")


def test_compressed_parquet_is_refused() -> None:
    write("a.parquet.gz")
    assert wrong("a.parquet.gz") == ["a.parquet.gz: parquet inside .gz cannot be read in parts; unpack it"]


@pytest.mark.parametrize("again", ["a.txt", "./a.txt", "*.txt", "."])
def test_a_file_may_be_given_once(again: str) -> None:
    write("a.txt")
    assert "a.txt is already given by 'a.txt'" in wrong("a.txt", again)[0]
    seen: dict[str, str] = {}
    find_files(["a.txt"], problems := Problems(), seen)
    assert find_files([again], problems, seen) == []
    assert len(problems.fatal) == 1


def test_all_problems_come_at_once() -> None:
    write("good.txt")
    assert [problem.split(":")[0] for problem in wrong("missing", "good.txt", "*.md")] == ["missing", "*.md"]


def test_the_sample_may_be_text_and_conversations() -> None:
    files = found("sample", "sample_chat")
    assert {file.container for file in files} == {"sample", "sample_chat"}
    text, chat = ([f.name for f in files if f.container == container] for container in ("sample", "sample_chat"))
    assert text == chat
    assert "already given by 'sample_chat'" in wrong("sample_chat", "sample_chat")[0]


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("hub:wikitext", ("wikitext", "train", None)),
        ("hub:owner/name", ("owner/name", "train", None)),
        ("hub:owner/name@test", ("owner/name", "test", None)),
        ("hub:owner/name#en", ("owner/name", "train", "en")),
        ("hub:owner/name@test#en", ("owner/name", "test", "en")),
        ("hub:owner/name#en@test", ("owner/name", "test", "en")),
    ],
)
def test_data_sets_of_the_hub(spec: str, meant: tuple[str, str, str | None]) -> None:
    assert parse_hub(spec) == meant
    (file,) = found(spec)
    assert (file.name, file.container) == (spec, "hub")


@pytest.mark.parametrize("spec", ["hub:", "hub:@train", "hub:a/b@", "hub:a/b@x@y", "hub:a/b#"])
def test_names_that_no_data_set_has(spec: str) -> None:
    assert wrong(spec) == [
        f"{spec}: a data set of the hub is given as hub:OWNER/NAME, hub:OWNER/NAME@SPLIT or …@SPLIT#CONFIG"
    ]


def test_a_data_set_may_be_given_once() -> None:
    assert "hub:a/b@train is already given by 'hub:a/b'" in wrong("hub:a/b", "hub:a/b@train")[0]
    assert len(found("hub:a/b", "hub:a/b@test", "hub:a/b#en")) == 3
