"""What the documents say exists: messages in the source, commands, files; and the first run can be walked."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from support import debug_made_tiny, write_chats, write_text

from lumina.cli import main
from lumina.cli.app import VERBS
from lumina.config.resolve import resolve
from lumina.training import course

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/*.md", ".github/*.md", ".github/ISSUE_TEMPLATE/*.yml")
    for path in ROOT.glob(pattern)
)
COMING: set[str] = set()  # verbs that documents name before they are here
HOLE = "\0"  # stands for what a message fills in


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@functools.cache
def messages() -> list[str]:
    """Every text of the source, implicit concatenation joined, `HOLE` where a value is filled in; the Makefile's."""
    found = [read("Makefile")]
    for path in (ROOT / "lumina").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                text = node.value.decode("latin-1") if isinstance(node.value, bytes) else node.value
                found.append(re.sub(r"\{\w*(:[^}]*)?\}", HOLE, text))  # `str.format` fills these in
    return found


def quoted() -> list[str]:
    """The lines of the grey blocks of troubleshooting."""
    return [line for block in re.findall(r"```text\n(.*?)```", read("docs/troubleshooting.md"), re.S)
            for line in block.splitlines()]  # fmt: skip


def shell_lines(document: str) -> list[str]:
    return [line for block in re.findall(r"```sh\n(.*?)```", document, re.S) for line in block.splitlines()]


def says(message: str, quote: str) -> bool:
    """Whether the fixed parts of a quote stand in one line of the message, with a hole at least where it has `…`."""
    return re.search(f"[^\n]*{HOLE}[^\n]*".join(map(re.escape, quote.split("…"))), message) is not None


def test_troubleshooting_quotes_the_program() -> None:
    known = messages()
    # An ellipsis at either end may stand for another message that is filled in or comes after.
    invented = [quote for quote in quoted() if not any(says(message, quote.strip("…")) for message in known)]
    assert not invented
    assert len(quoted()) > 30


def test_a_message_that_nobody_says_is_found_out() -> None:
    assert says(f"{HOLE}: cannot be read: {HOLE}", ": cannot be read: ")
    assert says(f"a {HOLE} of {HOLE} b", "a … of … b")
    assert not says("a x of y b", "a … of … b")
    assert not any(says(message, "the disk is on fire, unplug …") for message in messages())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_files_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    commands = re.findall(r"`([^`\n]+)`", text) + shell_lines(text)
    words = [re.sub(r"^([A-Z_]+=\S+ )+|\s+#.*$", "", command).split() for command in commands]
    verbs = {w[1] for w in words if len(w) > 1 and w[0] == "lumina" and w[1].isalpha()}
    assert verbs <= VERBS.keys() | COMING
    targets = {target for w in words if w[:1] == ["make"] for target in w[1:] if target.isalpha()}
    assert targets <= set(re.findall(r"^(\w+):", read("Makefile"), re.M))
    files = {
        word
        for w in words
        if w[:1] in (["pytest"], ["python"], ["sh"])
        for word in w[1:]
        if re.match(r"(tests|examples|docs)/", word)
    }
    files |= {
        w[0] for w in words if len(w) == 1 and re.fullmatch(r"(docs|examples|tests|benchmarks|lumina)/[\w/.]*", w[0])
    }
    files |= {w[0] for w in words if len(w) == 1 and re.fullmatch(r"[A-Z_]+\.md", w[0])}
    files |= {link for link in re.findall(r"\]\(([^)#:\s]+)\)", text)}
    assert [name for name in files if not (ROOT / name).exists() and not (path.parent / name).exists()] == []


@pytest.mark.parametrize("name", ["docs/troubleshooting.md", "examples/README.md", "docs/first_run.md"])
def test_every_setting_named_resolves(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = read(name)
    commands = re.findall(r"`(lumina train [^`…]+)`", text) + [
        line for line in shell_lines(text) if line.startswith("lumina train") and "my.yaml" not in line
    ]
    assert commands
    for command in commands:
        source, *settings = shlex.split(command, comments=True)[2:]
        resolve(source, settings)
    for setting in re.findall(r"`((?:train|model|precision|parallel|checkpoint|data)\.[\w.]+=[^`…]+)`", text):
        key = setting.partition("=")[0]
        if "steps" not in key:
            resolve("debug", [setting])


def test_links_within_troubleshooting() -> None:
    text = read("docs/troubleshooting.md")
    headings = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_the_first_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its `lumina` lines in order, on a small text, made tiny; the run of my.yaml is stopped twice by ctrl-C."""
    document = read("docs/first_run.md")
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path).rename("my.txt")
    write_chats(tmp_path)
    (own,) = re.findall(r"```yaml\n(.*?)```", document, re.S)
    Path("my.yaml").write_text(own, encoding="utf-8")
    real, steps = course.train_step, itertools.count(1)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(steps) in (5, 6):  # after the 3 of the first run: in the 2nd and the 3rd step of the second
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(course, "train_step", interrupted)
    codes, runs = [], list[Path]()
    for line in (line for line in shell_lines(document) if line.startswith("lumina ")):
        verb, subject, *arguments = shlex.split(line, comments=True)[1:]
        if verb == "train":
            tiny = debug_made_tiny(train__steps="4" if subject == "my.yaml" else "3", model__seq_len="64")
            given = {setting.partition("=")[0] for setting in tiny}
            arguments = [*(setting for setting in arguments if setting.partition("=")[0] not in given), *tiny]
            first = runs[0].as_posix() if runs else ""
            arguments = [re.sub(r"runs/my-\S+", first, setting) for setting in arguments]
        elif verb != "data":
            runs += [path for path in Path("runs").glob("my-*") if path not in runs]
            subject = str(runs[-1])
        codes.append((verb, main([verb, subject, *arguments])))
        said = capsys.readouterr().out
        assert verb != "generate" or said.startswith("Once upon a time")
    stopped = [("train", 0), ("train", 3), ("train", 3), ("resume", 0)]
    answered = [("data", 0), ("train", 0), ("chat", 0)]
    assert codes == [*stopped, *[("generate", 0)] * 2, *answered, *[("train", 0)] * 3]
    attempts = [json.loads(line)["attempt"] for line in (runs[0] / "events.jsonl").read_text().splitlines()]
    assert sorted(set(attempts)) == [0, 1, 2]
