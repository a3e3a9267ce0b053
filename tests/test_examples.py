"""Every example runs, made tiny; the YAML files are also resolved as they stand there."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support import debug_made_tiny, write_chats, write_text

import lumina
from lumina.cli import main
from lumina.config.resolve import flatten, resolve

EXAMPLES = Path(__file__).parents[1] / "examples"
YAML = sorted(EXAMPLES.glob("*.yaml"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a text, `my.txt`, and conversations, `chats.jsonl`."""
    monkeypatch.chdir(tmp_path)
    write_chats(tmp_path)
    write_text(tmp_path).rename("my.txt")
    return tmp_path


def run_of(here: Path) -> lumina.Run:
    (path,) = here.glob("runs/*")
    return lumina.Run.open(path)


def run_script(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs `python examples/NAME arguments` in this process."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_a_file_says_something_and_nothing_twice(path: Path) -> None:
    """Every key in it differs from the preset, or is there to be explained; and a comment names the command."""
    resolved = resolve(path)
    preset = flatten(resolve(resolved.request["preset"], {"model.kind": resolved.config.model.kind}).config)
    mine = {key: value for key, value in resolved.request.items() if key not in ("preset", "model.kind")}
    explained = {"data.eval", "data.train_on", "model.moe.bias_rate", "model.mod.every", "model.ffn",
                 "train.warmup", "train.weight_decay", "train.betas"}  # fmt: skip
    assert mine
    for key, value in mine.items():
        assert key in explained or preset[key] != value, key
    assert f"lumina train examples/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("own_text.yaml", "hybrid", [*debug_made_tiny(train__steps=None), "train.tokens=512"]),
        ("moe.yaml", "moe", debug_made_tiny()),
        ("mod.yaml", "mod", debug_made_tiny()),
        ("dense_adamw_cosine.yaml", "dense", debug_made_tiny()),
        ("deadline.yaml", "hybrid", [*debug_made_tiny(train__steps=None), "train.time=0.1"]),
    ],
)
def test_it_trains(name: str, kind: str, settings: list[str], here: Path) -> None:
    assert main(["train", str(EXAMPLES / name), "data.train=my.txt", *settings]) == 0
    run = run_of(here)
    assert run.finished
    assert run.events()[0]["kind"] == kind
    assert run.path.name.startswith(name.removesuffix(".yaml"))
    if name == "deadline.yaml":
        assert "resolved: train.time=0.1s at" in run.config.read_text()


@pytest.mark.parametrize("name", ["finetune", "lora"])
def test_it_begins_with_a_run(name: str, here: Path) -> None:
    """The commands of its comment, one after the other."""
    tiny = debug_made_tiny(train__steps=None, model__seq_len="64")
    kind = ["model.kind=dense"] if name == "lora" else []
    assert main(["train", str(EXAMPLES / "own_text.yaml"), "data.train=my.txt", "train.tokens=256", *kind, *tiny]) == 0
    run_of(here).path.rename("first")
    begin = ["data.train=chats.jsonl", "train.init_from=first", "train.tokens=512"]
    assert main(["train", str(EXAMPLES / f"{name}.yaml"), *begin, *tiny]) == 0
    run = run_of(here)
    assert run.path.name.startswith(name)
    assert [event["kind"] for event in run.events() if event["t"] == "run"] == ["dense" if kind else "hybrid"]
    if name == "lora":
        assert main(["lora", "merge", str(run.path)]) == 0
        assert main(["lora", "export", str(run.path), "--out", "adapter"]) == 0


def test_both_at_once(here: Path) -> None:
    tiny = debug_made_tiny(train__steps=None, model__seq_len="64")
    settings = ["data.train=[my.txt, chats.jsonl]", "train.tokens=512"]
    assert main(["train", str(EXAMPLES / "hybrid_interleaved.yaml"), *settings, *tiny]) == 0
    run = run_of(here)
    assert run.finished
    assert run.path.name.startswith("hybrid_interleaved")


def test_a_tokenizer_of_ones_own(here: Path) -> None:
    assert main(["train", str(EXAMPLES / "own_text.yaml"), *debug_made_tiny(train__steps="2")]) == 0
    first = run_of(here)
    (first.tokenizer / "tokenizer.json").rename("tokenizer.json")
    first.path.rename("first")
    assert main(["train", str(EXAMPLES / "tokenizer.yaml"), *debug_made_tiny(model__vocab=None)]) == 0
    assert "of tokenizer.json, rounded up" in run_of(here).config.read_text()


def test_python_api(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = dict(setting.split("=") for setting in debug_made_tiny(train__steps="6"))
    runpy.run_path(str(EXAMPLES / "python_api.py"))["main"]("my.txt", **keys)
    said = capsys.readouterr().out
    evals = {event["step"]: event["bpb"] for event in run_of(here).events() if event["t"] == "eval"}
    assert {int(step): float(bpb) for step, bpb in re.findall(r"^ +(\d+) +([\d.]+) ", said, re.M)} == {
        step: round(bpb, 3) for step, bpb in evals.items()
    }
    assert sorted(evals) == [2, 4, 6]
    assert said.endswith(lumina.load(run_of(here)).generate("The", 60, temperature=0.8, seed=0) + "\n")


def test_sweep_compares_and_does_not_repeat(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_script("sweep.py", "my.txt", *debug_made_tiny(), monkeypatch=monkeypatch)
    said = capsys.readouterr().out
    found = {float(rate): float(bpb) for rate, bpb in re.findall(r"train.lr=(\S+)  (\S+) bits", said)}
    assert sorted(found) == [2e-3, 6e-3, 2e-2]
    best = min(found, key=found.__getitem__)
    assert f"best: train.lr={best:g}" in said
    run_script("sweep.py", "my.txt", *debug_made_tiny(), monkeypatch=monkeypatch)
    assert capsys.readouterr().out == said
    assert len(list(here.glob("runs/*"))) == 3


def test_a_script_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"did you mean train\.lr"):
        run_script("sweep.py", "my.txt", "learning_rate=1", monkeypatch=monkeypatch)
    with pytest.raises(SystemExit, match=r"no\.txt: no such file"):
        run_script("python_api.py", "no.txt", monkeypatch=monkeypatch)
    with pytest.raises(SystemExit, match=r"no/such: not a run folder"):
        run_script("compare_runs.py", "no/such", monkeypatch=monkeypatch)
    (tmp_path / "events.jsonl").write_text('{"t":"run","step":0}\n')
    with pytest.raises(SystemExit, match="has no step yet"):
        run_script("compare_runs.py", str(tmp_path), monkeypatch=monkeypatch)
    for name in ("sweep.py", "python_api.py", "compare_runs.py"):
        with pytest.raises(SystemExit, match=re.escape(f"python examples/{name}")):
            run_script(name, monkeypatch=monkeypatch)


def test_compare_runs(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded events with known answers: 50 steps, 10 of them to warm up, one told twice, a torn line."""
    begun = {"t": "run", "step": 0, "kind": "moe", "params": 2e6, "active": 1e6, "device": "cpu", "precision": "bf16",
             "batch_tokens": 1525, "data": {"tokens": {"train": 30500}}}  # fmt: skip

    def step(n: int, speed: float) -> dict[str, object]:
        return {"t": "step", "step": n, "tokens": 1525 * n, "tok_s": speed, "mfu": 0.25, "mem": n * 2**30, "loss": 9.0}

    events = [begun, step(11, 1e9), *(step(n, 100.0 * n) for n in range(1, 51))]
    events += [{"t": "eval", "step": n, "loss": 3.0, "bpb": 20 / n} for n in (5, 10)]
    for name in ("before", "after"):
        Path(name).mkdir()
        lines = [json.dumps(event) for event in events]
        Path(name, "events.jsonl").write_text("\n".join([*lines, '{"t":"st']))
    run_script("compare_runs.py", "before", "after", monkeypatch=monkeypatch)
    rows = dict(re.findall(r"^\| (\w[^|]*) \| ([^|]*) \| \2 \|$", capsys.readouterr().out, re.M))
    assert rows["throughput, tokens/s (median)"] == "3,050"
    assert rows["step, ms (median)"] == "500"
    assert rows["seconds per epoch"] == "10.0"
    assert rows["memory, GiB (largest)"] == "50.00"
    assert rows["steps · tokens"] == "50 · 76,250"
    assert rows["held-out bits per byte"] == "2.0000 at step 10"


def test_routing_figures(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [*debug_made_tiny(train__steps="12"), "data.train=my.txt"]
    assert main(["train", "debug", *keys, "telemetry.log_every=4"]) == 0
    run = run_of(here)
    run_script("routing_figures.py", str(run.path), "figures", "line 7: abc", monkeypatch=monkeypatch)
    config = lumina.load(run).transformer.config
    for name, rows in (("load", config.layers * config.moe.experts), ("depth", config.layers)):  # type: ignore[union-attr]
        tree = ElementTree.parse(here / "figures" / f"{name}.svg")
        places = {cell.get("y") for cell in tree.iter("{http://www.w3.org/2000/svg}rect") if cell.get("y")}
        assert len(places) == rows
    with pytest.raises(SystemExit, match="usage"):
        run_script("routing_figures.py", monkeypatch=monkeypatch)
    assert "depth.svg" in capsys.readouterr().out


def test_the_table_names_every_example() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".yaml", ".py", ".sh")}
    assert set(re.findall(r"^\| `([^`]+)` \|", table, re.M)) == files
    assert all(f"examples/{name}" in table for name in files)
