"""docs/data.md: every block runs as it stands there, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lumina.cli import main

PAGE = (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")


def blocks() -> list[tuple[str, str]]:
    """The heading and the lines of every block that is to be run."""
    found, title = [], ""
    for match in re.finditer(r"^## (.*)$|(<!-- not run: .* -->\n)?```sh\n((?:.*\n)*?)```", PAGE, re.M):
        if match[1]:
            title = match[1]
        elif not match[2]:
            found.append((title, match[3]))
    return found


def arguments(command: str) -> list[str]:
    """What the shell makes of a line."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], check=True, capture_output=True, timeout=60)
    return done.stdout.decode().split("\0")[1:-1]


@pytest.mark.parametrize(("title", "lines"), blocks(), ids=[title for title, _ in blocks()])
def test_it_runs(title: str, lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pyarrow" in lines:
        pytest.importorskip("pyarrow", reason="runs where the extra `data` is installed")
    monkeypatch.chdir(tmp_path)
    for part in re.split(r"^(lumina .*\n)", lines, flags=re.M):
        if not part.startswith("lumina "):
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            subprocess.run(["bash", "-ec", part], check=True, timeout=60, env={**os.environ, "PATH": path})
            continue
        command, _, comment = part.partition(" #")
        few = ["parallel.threads=1", "train.compile=off"] if command.startswith("lumina train") else []
        expected = 2 if "exits with 2" in comment else 0
        assert main([*arguments(command.strip()), *few]) == expected, part


def test_most_blocks_run_and_every_format_has_one() -> None:
    assert len(blocks()) >= 14
    (formats,) = (lines for title, lines in blocks() if title == "Formats" and "sharegpt" in lines)
    assert all(f'"{key}"' in formats for key in re.findall(r"^\| \w+ \| `(\w+)`", PAGE, re.M))


def test_what_show_is_said_to_show_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text('{"prompt": "2 + 3?", "completion": "5"}\n')
    for line in re.findall(r"^lumina data show chats.jsonl.*⟧$", PAGE, re.M):
        command, _, shown = line.partition("#")
        assert main(arguments(command)) == 0
        assert capsys.readouterr().out.endswith(f"\n{shown.strip()}\n")
