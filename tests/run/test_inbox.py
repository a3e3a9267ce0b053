"""The inbox of a run: nothing is lost, nothing is read twice, what is broken is set aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumina.errors import UserError
from lumina.run.folder import Run
from lumina.run.inbox import Inbox


def test_what_is_put_is_read_in_order_until_it_is_answered(tmp_path: Path) -> None:
    inbox = Inbox(Run(tmp_path))
    assert not inbox.waiting()
    assert inbox.letters() == []
    names = [inbox.put({"name": "save", "number": i}) for i in range(3)]
    assert inbox.waiting()
    assert [letter.name for letter in inbox.letters()] == names
    assert [letter.content for letter in inbox.letters()] == [{"name": "save", "number": i} for i in range(3)]
    inbox.aside(names[1], "done")
    inbox.aside(names[0], "refused")
    assert [letter.name for letter in inbox.letters()] == names[2:]
    assert (inbox.folder / "done" / names[1]).exists()
    assert (inbox.folder / "refused" / names[0]).exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b" " * 2**20])
def test_what_is_no_request_is_said(content: bytes, tmp_path: Path) -> None:
    inbox = Inbox(Run(tmp_path))
    inbox.folder.mkdir()
    (inbox.folder / "a.json").write_bytes(content)
    (letter,) = inbox.letters()
    assert letter.content is None
    assert "not " in letter.problem


def test_a_folder_is_no_request_and_half_written_ones_are_not_looked_at(tmp_path: Path) -> None:
    inbox = Inbox(Run(tmp_path))
    inbox.folder.mkdir()
    (inbox.folder / "a.json.tmp-1").write_text("{")
    assert not inbox.waiting()
    (inbox.folder / "b.json").mkdir()
    assert inbox.letters()[0].problem == "cannot be read: Is a directory"
    inbox.aside("b.json", "refused")
    assert not inbox.waiting()


def test_a_disk_that_refuses_is_said(tmp_path: Path) -> None:
    (tmp_path / "inbox").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Inbox(Run(tmp_path)).put({})
    with pytest.raises(UserError, match="cannot be moved"):
        Inbox(Run(tmp_path)).aside("a.json", "done")
