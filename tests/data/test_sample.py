"""The embedded corpus and its near-duplicate families."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import read_documents

from lumina.data import sample
from lumina.data.documents import Document
from lumina.data.families import SHARE, SHINGLE, near_duplicates
from lumina.data.split import MOST, split
from lumina.data.split import SHARE as HELD_OUT
from lumina.errors import UserError


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(read_documents(["sample"]))


def test_the_library_without_tables_tests_and_machine_facts(documents: list[Document]) -> None:
    names = [document.source for document in documents]
    assert names == sorted(set(names))
    assert {"ast.py", "json/decoder.py", "argparse.py"} <= set(names)
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert not folders & {"encodings", "pydoc_data", "test", "tests", "idle_test", "site-packages"}
    assert not any("sysconfigdata" in name or name.startswith("config-") for name in names)
    assert 5e6 < sum(len(document.text) for document in documents) < 20e6


def lines(text: str) -> set[tuple[str, ...]]:
    """Shingles of stripped lines, made in the plainest way."""
    kept = [line.strip() for line in text.splitlines() if line.strip()]
    return {tuple(kept[i : i + SHINGLE]) for i in range(max(1, len(kept) - SHINGLE + 1))}


def test_no_held_out_file_shares_much_with_training(documents: list[Document]) -> None:
    train, heldout, rule = split([document for document in documents if document.text])
    size = sum(len(document.text.encode()) for document in documents)
    assert rule == "families"
    assert HELD_OUT <= sum(len(document.text.encode()) for document in heldout) / size <= MOST
    assert len(train) + len(heldout) == sum(bool(document.text) for document in documents)
    trained = [lines(document.text) for document in train]
    for document in heldout:
        mine = lines(document.text)
        assert all(len(mine & other) < SHARE * min(len(mine), len(other)) for other in trained), document.source


def test_families_join_copies_transitively_and_ignore_indentation() -> None:
    base = [f"line {i}" for i in range(40)]
    texts = [
        "\n".join(base),
        "\n".join(f"other {i}" for i in range(40)),
        "\n\n".join("    " + line for line in base[:20]) + "\nnew",
        "\n".join(base[20:]),
        "short",
        "short",
        "",
    ]
    assert near_duplicates(texts) == [0, 1, 0, 0, 4, 4, 6]


def test_a_text_that_joins_two_families_makes_them_one() -> None:
    first, second = ([f"{name} {i}" for i in range(40)] for name in "ab")
    texts = ["\n".join(part) for part in (first, second, first[:20] + second[:20])]
    assert near_duplicates(texts) == [0, 0, 0]


def test_a_few_common_lines_do_not_make_a_family() -> None:
    licence = "\n".join(f"licence {i}" for i in range(8))
    texts = [licence + "\n" + "\n".join(f"{name} {i}" for i in range(60)) for name in "ab"]
    assert near_duplicates(texts) == [0, 1]


def test_no_texts_no_families() -> None:
    assert near_duplicates([]) == []


def test_a_python_without_sources_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match="holds no sources"):
        sample.sample_files()
