"""The embedded corpus and its near-duplicate families."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import read_records

from lumina.data import sample
from lumina.data.families import SHARE, SHINGLE, near_duplicates
from lumina.data.records import KINDS, Record
from lumina.data.scan import ROW
from lumina.data.split import MOST, decide
from lumina.data.split import SHARE as HELD_OUT
from lumina.errors import UserError


@pytest.fixture(scope="module")
def documents() -> list[Record]:
    return list(read_records(["sample"]))


def test_the_library_without_tables_tests_and_machine_facts(documents: list[Record]) -> None:
    names = [document.where for document in documents]
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


def test_no_held_out_file_shares_much_with_training(documents: list[Record]) -> None:
    given = [document for document in documents if document.text]
    split = decide(np.array([(d.key, d.size, len(d.text), 0, 0, 0) for d in given], ROW), [False])
    assert split.rule == "families"
    heldout = [document for document in given if split.heldout[document.key >> 48]]
    train = [document for document in given if not split.heldout[document.key >> 48]]
    assert HELD_OUT <= sum(d.size for d in heldout) / sum(d.size for d in given) <= MOST
    trained = [lines(document.text) for document in train]
    for document in heldout:
        mine = lines(document.text)
        assert all(len(mine & other) < SHARE * min(len(mine), len(other)) for other in trained), document.where


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


def test_a_files_text_and_its_conversations_are_on_the_same_side(documents: list[Record]) -> None:
    """What is asked about a held-out source must not be answered by a source in training."""
    chats = list(read_records(["sample_chat"]))
    rows = [(r.key, r.size, len(r.text), 0, KINDS.index(r.kind), 0) for r in [*documents, *chats] if r.size]
    split = decide(np.array(rows, ROW), [False, False])
    assert split.rule == "families"
    keys = {document.where: document.key for document in documents}
    sides = {True: 0, False: 0}
    for record in chats:
        key = keys[record.where.rpartition(":")[0]]
        assert (record.kind, record.format, record.key) == ("chat", "docstrings", key)
        sides[bool(split.heldout[key >> 48])] += 1
    assert min(sides.values()) > 10
