"""`lumina data show | check | prepare | difficulty`, as they are typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lumina.cli import main
from lumina.data import shards
from lumina.visible import visible

CHAT = {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUMINA_CACHE", str(tmp_path / "cache"))
    write("chats.jsonl", *[CHAT | {"id": i} for i in range(20)])
    Path("notes").mkdir()
    for i in range(40):
        Path(f"notes/{i}.txt").write_text(f"note {i}: " + "some words " * (i % 5 + 1) + "\n")


def write(name: str, *records: object) -> None:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_show_says_it_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", "chats.jsonl", "notes", "--examples", "3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("tokenizer  BPE of ")
    assert "chats.jsonl  messages: 20 conversations, 2.0 turns on average\n" in said
    assert "notes  text: 40 documents\n" in said
    assert "19 exact duplicates" in said
    assert "<|end|><|user|>What is it?<|assistant|>⟦A cat.<|end|>⟧\n" in said
    assert "⟦note " in said
    assert max(map(len, said.splitlines())) <= 120
    assert max(len(line) for line in said.splitlines() if line.endswith("#")) <= 80


def test_colours_take_the_place_of_brackets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["data", "show", "chats.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "\x1b[32mA cat.\x1b[0m" in said
    assert "⟦" not in said
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["data", "show", "chats.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "⟦A cat.<|end|>⟧" in said.replace("\x1b[0m", "")
    assert "\x1b[32m" not in said


def test_nothing_in_the_data_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    write("evil.jsonl", {"text": "\x1b[2J\x1b]0;title\x07 and \r\x9b [bold]plain[/bold]"})
    Path("\x1b[31m.txt").write_text("red")
    for verb in ("show", "check"):
        assert main(["data", verb, "evil.jsonl", "\x1b[31m.txt", "no\x1b"]) == (0 if verb == "show" else 2)
        said = capsys.readouterr().out
        assert said == visible(said)
        if verb == "show":
            assert " [bold]plain[/bold]" in said


def test_a_file_name_that_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    Path(os.fsdecode(b"notes/\xff.txt")).write_text("same")
    Path("notes/same.txt").write_text("same")
    assert main(["data", "check", "notes"]) == 0
    assert "notes/\ufffd.txt: an exact duplicate of notes/same.txt" in capsys.readouterr().out
    assert main(["data", "check", "notes", "--json"]) == 0
    assert "notes/?.txt: an exact duplicate" in document(capsys)["findings"][0]["line"]  # type: ignore[index]
    assert main(["data", "show", "notes", "--examples", "99"]) == 0


def test_show_goes_on_after_bad_records(capsys: pytest.CaptureFixture[str]) -> None:
    write("bad.jsonl", *["no"] * 30, CHAT)
    assert main(["data", "show", "bad.jsonl", "gone.txt"]) == 0
    said = capsys.readouterr().out
    assert "bad.jsonl  messages: 1 conversation, 2.0 turns on average" in said
    assert "\n31 problems:\n  gone.txt: no such file or folder" in said
    assert said.count("bad.jsonl:") == 1 + 19
    assert said.endswith("  … and 11 more; lumina data check shows all\n")
    assert main(["data", "show", "gone.txt"]) == 2


def test_show_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    write("bad.jsonl", "no", CHAT)
    assert main(["data", "show", "chats.jsonl", "bad.jsonl", "--json", "--examples", "1", "--seq-len", "8"]) == 0
    shown = document(capsys)
    chats, bad = shown["sources"]  # type: ignore[misc]
    assert (chats["documents"], chats["longer"], chats["formats"]) == (20, 20, {"messages": 20})
    assert sum(chats["lengths"].values()) == 20
    assert bad["documents"] == 1
    assert [run["trained"] for run in shown["examples"][0]["runs"]][-1] is True  # type: ignore[index]
    assert [problem["kind"] for problem in shown["problems"]] == ["bad record"]  # type: ignore[attr-defined]


def test_check_of_good_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "notes", "chats.jsonl"]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert lines == [f"chats.jsonl:{i}: an exact duplicate of chats.jsonl:1" for i in range(2, 21)]
    assert summary == "usable: 60 good documents, 19 exact duplicates"


def test_check_of_bad_data(capsys: pytest.CaptureFixture[str]) -> None:
    write("bad.jsonl", CHAT, *["no"] * 30)
    assert main(["data", "check", "bad.jsonl", "gone*"]) == 2
    said = capsys.readouterr()
    assert said.out.splitlines()[0].startswith("gone*: no file matches")
    assert [line.split(": ")[0] for line in said.out.splitlines()[1:]] == [f"bad.jsonl:{i}" for i in range(2, 32)]
    summary = "error: not usable as it is: 1 good document, 30 bad records, 1 problem with a file\n"
    assert said.err == f"{summary}  fix: mend what is listed\n"
    assert main(["data", "check", "bad.jsonl", "--skip-bad", "29"]) == 2
    assert "data.skip_bad=30" in capsys.readouterr().err
    assert main(["data", "check", "bad.jsonl", "--skip-bad", "30"]) == 0
    assert capsys.readouterr().out.endswith("usable: 1 good document, 30 bad records of 30 tolerated\n")


def test_check_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    write("bad.jsonl", CHAT, "no", CHAT)
    assert main(["data", "check", "bad.jsonl", "--json"]) == 2
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["usable"], found["documents"], found["bad_records"]) == (False, 2, 1)
    assert [finding["kind"] for finding in found["findings"]] == ["bad record", "duplicate"]
    assert "not usable" in json.loads(said.err)["error"]["message"]


def test_check_of_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "chats.jsonl", "--seq-len", "4"]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert main(["data", "check", "chats.jsonl", "notes", "--seq-len", "4", "--tokenizer", "bpe"]) == 0
    said = capsys.readouterr().out
    assert said.count("more than a sequence of 4 holds") == 20
    assert "40 texts longer than a sequence (cut without a loss)" in said


def test_prepare_and_train_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    write("bad.jsonl", "no", *[CHAT | {"messages": [*CHAT["messages"], *CHAT["messages"]]} for _ in range(3)])
    write("held.jsonl", CHAT)
    command = ["data", "prepare", "notes", "chats.jsonl", "bad.jsonl", "--out", "out", "--vocab", "300"]
    command += ["--eval", "held.jsonl", "--eval", "notes/../notes2.txt"]
    Path("notes2.txt").write_text("held out words " * 50)
    assert main([*command, "data.quality.exact=true", "data.skip_bad=1"]) == 0
    said = capsys.readouterr().out
    assert "removed 21 documents" in said
    assert "  chats.jsonl:2 (of chats.jsonl:1): What is it? A cat." in said
    assert "skipped bad.jsonl:1: not JSON" in said
    assert " MB/s\n" in said
    assert said.endswith("next   lumina train debug data.train=out data.mode=hybrid_interleaved\n")
    assert main([*command, "data.quality.exact=true", "data.skip_bad=1", "--json"]) == 0
    told = document(capsys)
    assert told["already"] is True
    rows = {source["name"]: source for source in told["sources"]}  # type: ignore[attr-defined]
    assert rows["chats.jsonl"]["documents"] == 1
    assert rows["held.jsonl"]["heldout_documents"] == 1
    assert sum(row["tokens"] for row in rows.values()) == told["tokens"]["train"]  # type: ignore[index]
    assert main([*command, "data.quality.exact=true", "data.skip_bad=1"]) == 0
    assert capsys.readouterr().out.startswith("prepared already: out")
    assert main(["data", "difficulty", "out", "--by", "rarity"]) == 0
    assert "wrote the difficulty by rarity of out" in capsys.readouterr().out
    assert main(["data", "difficulty", "out", "--by", "rarity", "--json"]) == 0
    assert document(capsys)["changed"] is False


def test_a_source_of_which_nothing_is_left_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    write("again.jsonl", CHAT)
    command = ["data", "prepare", "chats.jsonl", "notes", "again.jsonl", "data.quality.exact=1", "--out", "out"]
    assert main([*command[:-3], "data.quality.exact=true", "--out", "out", "--vocab", "300", "--eval", "held.txt"]) == 2
    Path("held.txt").write_text("held out")
    assert main([*command[:-3], "data.quality.exact=true", "--out", "out", "--vocab", "300", "--eval", "held.txt"]) == 0
    said = capsys.readouterr().out
    lost = [name for name in ("chats.jsonl", "again.jsonl") if f"note   nothing of {name} is left" in said]
    assert len(lost) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["notes", "data.mode=base"], "preparing does not read this key"),
        (["notes", "data.skip_bax=1"], "preparing does not read this key"),
        (["notes", "data.quality.exakt=true"], "did you mean data.quality.exact"),
        (["notes:2"], "a weight is not for preparing"),
        (["data.skip_bad=1"], "there is nothing to prepare"),
        (["gone"], "no such file or folder"),
        (["notes", "--vocab", "10"], "greater than or equal to 260"),
    ],
)
def test_what_prepare_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prepare", *arguments, "--out", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_ctrl_c_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    command = ["data", "prepare", "notes", "--out", "out", "--vocab", "300"]
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_streams", interrupted)
        assert main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert main(command) == 0


def test_difficulty_wants_a_prepared_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "difficulty", "notes", "--by", "length"]) == 2
    assert "not a folder of prepared shards" in capsys.readouterr().err


def test_no_torch_is_needed() -> None:
    """In a process where it cannot be imported: all four, one after the other."""
    code = """
import sys
sys.modules["torch"] = None
from lumina.cli import main
for line in ("show notes", "check notes", "prepare notes --out out --vocab 300", "difficulty out --by rarity"):
    assert main(["data", *line.split()]) == 0, line
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
