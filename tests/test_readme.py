"""What the README shows is run, or at least parsed, as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
import test_bad_data
import test_bad_input
import test_damaged_input
from support import write_text

from lumina.cli import main
from lumina.cli.app import VERBS
from lumina.config.resolve import presets, resolve
from lumina.errors import UserError
from lumina.telemetry.figures import count

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every `lumina …` line of the shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("lumina ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    write_text(tmp_path).rename(tmp_path / "x.txt")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["losses"]) == 30  # type: ignore[arg-type]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_is_understood(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("extends: debug\n")
    verb, *arguments = command
    assert verb in VERBS
    if verb == "train":
        resolve(arguments[0], arguments[1:])


def test_the_demo_figures_are_those_of_its_raw_log() -> None:
    folder = max((ROOT / "benchmarks/demo").glob("*/"))
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["t"] == "step"]
    bpb = [event for event in events if event["t"] == "eval" and event["split"] == "heldout"]
    rate = sorted(event["tok_s"] for event in steps)
    median, low, high = statistics.median(rate), rate[len(rate) // 20], rate[-len(rate) // 20]
    table = (ROOT / "benchmarks/demo/README.md").read_text(encoding="utf-8")
    for figure in (
        f"{1000 * 4096 / median:.0f} ms",
        f"{count(median)}",
        f"{count(low)} to {count(high)}",
        f"{100 * statistics.median(event['mfu'] for event in steps):.0f} %",
        f"{max(event['mem'] for event in steps) / 2**30:.1f} GiB",
        f"{bpb[-1]['bpb']:.3f}",
    ):
        assert figure in README
        assert figure in next(line for line in table.splitlines() if line.startswith(f"| {folder.name}"))


def test_every_verb_is_in_the_table() -> None:
    assert all(f"| `lumina {verb}" in README for verb in VERBS)


def test_the_error_shown_is_the_error_printed(capsys: pytest.CaptureFixture[str]) -> None:
    command, shown = re.findall(r"```\n\$ lumina ([^\n]*)\n(.*?)```", README, re.S)[0]
    assert main(shlex.split(command)) == 2
    assert capsys.readouterr().err == shown


def test_the_wrong_inputs_are_as_many_as_it_says() -> None:
    tables = [module.CASES for module in (test_bad_input, test_damaged_input, test_bad_data)]
    assert f"| {sum(map(len, tables))} wrong or damaged inputs " in README


def test_the_presets_named_exist() -> None:
    (named,) = re.findall(r"^Presets, smallest first: (.*?)\. ", README, re.M)
    assert re.findall(r"`(\w+)`", named) == presets()
    with pytest.raises(UserError):
        resolve("large")
