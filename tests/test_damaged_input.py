"""Input that is damaged, hostile or of another kind: files that lost a part, copies that went wrong, odd bytes.

Each row is a name, how to make the situation, the command line, and what the answer must hold: what is wrong, where,
and what to do. The answer is a user error, nothing is left behind, and nothing that was there is touched.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import require_refusal, settings, write_text

from lumina.cli import main
from lumina.data.tokenizer import train_bpe
from lumina.events import read_events
from lumina.inference.sampler import Sampler
from lumina.run import index
from lumina.run.folder import Run
from lumina.run.lock import RunLock
from lumina.training.trainer import Trainer

Prepare = Callable[[Path], object]
STOPPED, DONE = Run(Path("runs/stopped")), Run(Path("runs/done"))
TRAIN = ["train", "tiny", "train.steps=4", "checkpoint.every=2"]
RESUME, GENERATE = ["resume", "runs/stopped"], ["generate", "runs/done", "-p", "x", "--max-tokens", "3"]


def put(name: str, content: str | bytes) -> Prepare:
    return lambda _: Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def nothing(_: Path) -> None:
    """The situation is in the command line."""


def config(old: str, new: str) -> Prepare:
    """Edits the stopped run's config.yaml by hand."""

    def edit(_: Path) -> None:
        text = STOPPED.config.read_text()
        assert old in text
        STOPPED.config.write_text(text.replace(old, new))

    return edit


def without(fact: str) -> Prepare:
    """Cuts a fact out of the stopped run's meta.json."""

    def cut(_: Path) -> None:
        facts = json.loads(STOPPED.meta.read_text())
        del facts[fact]
        STOPPED.meta.write_text(json.dumps(facts))

    return cut


def instead(path: Path) -> Prepare:
    """A folder where a file was."""

    def replace(_: Path) -> None:
        path.unlink(missing_ok=True)
        path.mkdir()

    return replace


def file_for_checkpoints(run: Run) -> Prepare:
    def replace(_: Path) -> None:
        shutil.rmtree(run.checkpoints)
        run.checkpoints.touch()

    return replace


def followed_link(_: Path) -> None:
    """What `scp -r` makes of `latest`."""
    latest = STOPPED.checkpoints / "latest"
    target = latest.resolve()
    latest.unlink()
    shutil.copytree(target, latest)


def no_unknown_token(_: Path) -> None:
    """A tokenizer of whole words that has no id for any other."""
    train_bpe([Path("text.txt").read_text()], 300).save("tok")
    path = Path("tok/tokenizer.json")
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    vocab = {token["content"]: token["id"] for token in content["added_tokens"]}
    content["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    path.write_text(json.dumps(content))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
KEYS = {"\x1b[31mred": 1} | {f"key {i}": 1 for i in range(3000)}

CASES: list[tuple[str, Prepare, list[str], list[str]]] = [
    # -- configuration files
    ("alias bomb", put("my.yaml", BOMB + "train: {steps: *i}\n"), ["train", "my.yaml"],
     ["my.yaml: line 2", "alias", "write the value"]),
    ("contains itself", put("my.yaml", "a: &a\n  b: *a\n"), ["train", "my.yaml"],
     ["my.yaml: line 2", "*a is an alias"]),
    ("nested lists", put("my.yaml", "[" * 5000), ["train", "my.yaml"], ["my.yaml: nested too deeply", "mend it"]),
    ("nested mappings", put("my.yaml", "train: " + "{a: " * 3000), ["train", "my.yaml"], ["my.yaml", "too deeply"]),
    ("endless digits", put("my.yaml", f"train: {{steps: {'9' * 5000}}}"), ["train", "my.yaml"],
     ["my.yaml: line 1", "more digits than can be meant"]),
    ("a corpus as configuration", put("my.yaml", "words\n" * 200_000), ["train", "my.yaml"],
     ["my.yaml", "no configuration", "data.train=my.yaml"]),
    ("an endless device", lambda here: (here / "my.yaml").symlink_to("/dev/zero"), ["train", "my.yaml"],
     ["my.yaml", "no configuration"]),
    ("an empty name", nothing, ["train", ""], ["unknown preset ''", "the presets are"]),
    ("text as preset", nothing, ["train", "text.txt"], ["unknown preset 'text.txt'", "data.train=text.txt"]),
    ("too many threads", nothing, [*TRAIN, "data.train=text.txt", "parallel.threads=100k"],
     ["parallel.threads=100k (command line)", "at most 1024"]),
    # -- data
    ("nobody's home", nothing, [*TRAIN, "data.train=~nobody-here/x.txt"], ["~nobody-here/x.txt", "no such file"]),
    ("UTF-16 without a mark", put("w.txt", ("words\n" * 900).encode("utf-16-le")), [*TRAIN, "data.train=w.txt"],
     ["w.txt:1: a NUL byte at offset 1", "UTF-16", "iconv"]),
    ("nothing but NUL", put("w.txt", b"one line\n" + b"\0" * 9000), [*TRAIN, "data.train=w.txt"],
     ["w.txt:2: a NUL byte at offset 9", "binary"]),
    ("a record with endless digits", put("b.jsonl", f'{{"text": "x", "id": {"9" * 5000}}}'),
     [*TRAIN, "data.train=b.jsonl"], ["b.jsonl:1", "more digits than can be meant"]),
    ("null, a list, true", put("b.jsonl", '{"text": null}\n{"text": ["x"]}\ntrue\n'), [*TRAIN, "data.train=b.jsonl"],
     ['b.jsonl:1: "text" must be a string, is null', "b.jsonl:2", "is an array", "b.jsonl:3", "is true or false"]),
    ("a name too long", nothing, [*TRAIN, "data.train=" + "n" * 300 + ".txt"], ["nnn.txt: File name too long"]),
    # -- tokenizers
    ("no token for the unknown", no_unknown_token, [*TRAIN, "data.train=text.txt", "data.tokenizer=tok"],
     ["tok/tokenizer.json cannot encode", "unknown token"]),
    # -- runs
    ("facts that are a list", lambda _: STOPPED.meta.write_text("[]"), RESUME, ["meta.json: not the facts", "restore"]),
    ("facts without data", without("data"), RESUME, ["meta.json: damaged: it has no 'data'", "restore"]),
    ("facts without processes", without("processes"), RESUME,
     ["meta.json: damaged: it has no 'processes'", "restore"]),
    ("a device left behind", config("device: cpu", "device: cuda"), RESUME,
     ["runs/stopped/config.yaml: parallel.device=cuda", "has no cuda", "resume it where there is one",
      "lumina resume runs/stopped parallel.device=cpu"]),
    ("a choice left open", config("device: cpu", "device: auto"), RESUME,
     ["runs/stopped/config.yaml: it does not say parallel.device", "restore the file"]),
    ("no length", config("  steps: 4", "  time: 1h"), RESUME, ["does not say train.steps", "restore the file"]),
    ("a folder as log", instead(STOPPED.event_log), RESUME, ["events.jsonl: not a file", "move it away"]),
    ("a folder as lock", instead(STOPPED.lock), RESUME, ["runs/stopped/lock: Is a directory", "check the path"]),
    ("a run's name too long", nothing, ["resume", "n" * 300], ["File name too long", "check the path"]),
    ("a root too long", nothing, [*TRAIN, "data.train=text.txt", "--root", "n" * 300], ["File name too long", "fix:"]),
    ("a file for checkpoints", file_for_checkpoints(STOPPED), RESUME,
     ["runs/stopped/checkpoints: a file where the folder", "move it away"]),
    ("a file for checkpoints, writing", file_for_checkpoints(DONE), GENERATE,
     ["runs/done/checkpoints", "move it away"]),
    ("a copy that followed links", followed_link, RESUME,
     ["checkpoints/latest: a folder, which has to be a link", "rm -r runs/stopped/checkpoints/latest"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a finished run and one that was stopped after its checkpoint of step 2."""
    here = tmp_path_factory.mktemp("made")
    write_text(here)
    keys = settings(here) | {"train.steps": 4, "checkpoint.every": 2, "data.train": "text.txt"}

    def stop(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == 3:
            raise RuntimeError("power cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        Trainer("tiny", keys).fit().path.rename(DONE.path)
        with pytest.raises(RuntimeError, match="power cut"):
            Trainer("tiny", keys, fresh=True, listeners=[stop]).fit()
        next(path for path in Path("runs").iterdir() if path.name != "done").rename(STOPPED.path)
    return here


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of it, which is the current folder."""
    folder = tmp_path / "here"
    shutil.copytree(made, folder, symlinks=True)
    monkeypatch.chdir(folder)
    facts = json.loads(STOPPED.meta.read_text())
    STOPPED.meta.write_text(json.dumps(facts | {"started_in": str(folder)}))
    return folder


@pytest.mark.parametrize(("prepare", "arguments", "needles"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_the_answer(
    prepare: Prepare, arguments: list[str], needles: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(here)
    require_refusal(here, arguments, needles, capsys)


def test_keys_of_a_record_are_few_and_cannot_steer_a_terminal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "b.jsonl").write_text(json.dumps(KEYS))
    assert main([*TRAIN, "data.train=b.jsonl"]) == 2
    said = capsys.readouterr().err
    assert r"its keys: \x1b[31mred, key 0, " in said
    assert "and 2993 more" in said
    assert "\x1b" not in said


@pytest.mark.parametrize("lost", ["gone", "empty", "torn"])
def test_a_lost_event_log_does_not_cost_the_checkpoints(
    lost: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if lost == "gone":
        STOPPED.event_log.unlink()
    else:
        STOPPED.event_log.write_bytes(b"" if lost == "empty" else b'{"t":"run","v":1,"att')
    assert main(RESUME) == 0
    assert "resume runs/stopped from step 2" in capsys.readouterr().out
    steps = [event["step"] for event in read_events(STOPPED.event_log) if event["t"] == "step"]
    assert steps == [2, 3, 4]  # the metrics of step 2 were not yet observed when it was saved


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"t":"step"}', b"3", b"\xff\0"])
def test_a_last_line_that_is_no_event_is_passed_over(line: bytes, here: Path) -> None:
    with STOPPED.event_log.open("ab") as log:
        log.write(line + b"\n")
    assert not STOPPED.finished
    assert STOPPED.next_attempt() == 1


@pytest.mark.parametrize("line", ['{"attempt":"x"}', '{"t":"end","attempt":null}', '{"t":1,"attempt":1}'])
def test_a_last_event_that_no_crash_left_is_said(line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with STOPPED.event_log.open("a") as log:
        log.write(line + "\n")
    assert main(RESUME) == 2
    said = capsys.readouterr().err
    assert "runs/stopped/events.jsonl: its last line is no event" in said
    assert "delete the line" in said


def test_an_end_without_a_reason_is_no_end(here: Path) -> None:
    with STOPPED.event_log.open("a") as log:
        log.write('{"t":"end","attempt":0}\n')
    assert not STOPPED.finished


@pytest.mark.parametrize("facts", ["[]", "null", '{"created": "yesterday"}', '{"created": null}', "[" * 100_000])
def test_facts_that_are_none_do_not_hide_other_runs(facts: str, here: Path) -> None:
    STOPPED.meta.write_text(facts)
    assert index.runs(Path("runs")) == [DONE]


def test_a_stray_file_with_the_name_of_a_leftover_is_swept(here: Path) -> None:
    stray = STOPPED.checkpoints / "step-000009.tmp-999999999"
    stray.touch()
    assert main(RESUME) == 0
    assert not stray.exists()


def test_a_full_disk_takes_no_signature_but_the_lock_holds(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with RunLock(STOPPED.lock):
            assert main(RESUME) == 2
    with RunLock(STOPPED.lock):
        pass


def test_a_full_disk_leaves_no_half_built_cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = here / "cache"
    monkeypatch.setenv("LUMINA_CACHE", str(cache))
    monkeypatch.setattr("lumina.data.shards.write_streams", full)
    assert main([*TRAIN, "data.train=text.txt", "--fresh"]) == 2
    assert list(cache.iterdir()) == []


def test_the_smallest_temperature_is_greedy() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature in (1e-300, 1e-44, 1e-30):
        assert Sampler(temperature, 2, 0.9).pick(logits, torch.Generator()).tolist() == [1]


def test_an_alphabet_of_letters_is_a_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer ids than bytes: the preset's vocabulary grows to what the schema takes."""
    train_bpe([""], 260).save("tok")
    path = here / "tok" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = content["added_tokens"][:1]
    letters = sorted(set((here / "text.txt").read_text()))
    vocab = {token: i for i, token in enumerate(["<|end|>", "[UNK]", *letters])}
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    content["decoder"] = {"type": "Fuse"}
    content["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    path.write_text(json.dumps(content))
    assert main([*TRAIN, "data.train=text.txt", "data.tokenizer=tok", "train.decay=0"]) == 0
    assert "[Step 4]" in capsys.readouterr().out
