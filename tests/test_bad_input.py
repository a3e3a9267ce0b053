"""Every wrong input we could think of, in one table: the answer says what is wrong, where, and what to do.

Each row is a name, how to make the situation, the command line, and what the answer must hold. `RUN` in a command line
is a finished tiny run, `STOPPED` one that could go on. Nothing may be left behind: every file is as it was.
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
from support import contents, require_refusal, settings, write_text

from lumina.checkpoint import store, tensors
from lumina.cli import main
from lumina.data.tokenizer import train_bpe
from lumina.run.folder import Run
from lumina.run.lock import RunLock
from lumina.training import memory
from lumina.training.trainer import Trainer

Prepare = Callable[[Path, pytest.MonkeyPatch], None]
KEYS = ["train.steps=4", "checkpoint.every=2"]


def put(name: str, content: str | bytes) -> Prepare:
    """Writes a file."""

    def prepare(here: Path, _: pytest.MonkeyPatch) -> None:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def nothing(here: Path, _: pytest.MonkeyPatch) -> None:
    """The situation is in the command line."""


def under_torchrun(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")


def tokenizer(change: Callable[[dict[str, Any]], None]) -> Prepare:
    """A tokenizer.json with something wrong in it."""

    def prepare(here: Path, _: pytest.MonkeyPatch) -> None:
        train_bpe([(here / "text.txt").read_text()], 300).save(here / "tok")
        path = here / "tok" / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return prepare


def no_end_token(content: dict[str, Any]) -> None:
    content["added_tokens"] = []
    content["model"]["vocab"] = {k: v for k, v in content["model"]["vocab"].items() if not k.startswith("<")}


def run(name: str = "stopped") -> Run:
    return Run(Path("runs") / name)


def damage(change: Callable[[Run], None], name: str = "stopped") -> Prepare:
    """Does something to a run."""
    return lambda here, _: change(run(name))


def newest(of: Run) -> Path:
    return (of.checkpoints / "latest").resolve()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def began_with(overlays: str) -> Prepare:
    """The stopped run began once more, with this over its plan."""
    event = '{"t":"run","v":1,"attempt":1,"step":2,"parent_step":2,"overlays":' + overlays + "}\n"
    return damage(lambda r: r.event_log.write_text(r.event_log.read_text() + event))


def every_checkpoint_flipped(of: Run) -> None:
    for path in store.checkpoints(of.checkpoints):
        flip(path / store.STATE)


def another_shape(of: Run) -> None:
    of.config.write_text(of.config.read_text().replace("ffn: 64", "ffn: 72"))


def fail_writes(part: str) -> Prepare:
    """A disk that is full where the path holds `part`."""

    def prepare(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened, write_text_ = Path.open, Path.write_text

        def refuse(path: Path) -> None:
            if part in str(path):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

        def guarded_open(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if set(mode) & set("wax"):
                refuse(self)
            return opened(self, mode, *rest, **more)

        def guarded_write(self: Path, *rest: Any, **more: Any) -> int:
            refuse(self)
            return write_text_(self, *rest, **more)

        monkeypatch.setattr(Path, "open", guarded_open)
        monkeypatch.setattr(Path, "write_text", guarded_write)

    return prepare


def read_only(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permission bits do not bind who runs tests as root."""

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("lumina.run.folder._new_folder", lambda root, prefix: refuse(root))


def little_memory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "usable", lambda device="cpu": 2**22)


def little_disk(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumina.training.room.free", lambda path: 2**10)


def cache_is_a_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "cache").touch()
    monkeypatch.setenv("LUMINA_CACHE", str(here / "cache"))


TRAIN = ["train", "tiny", *KEYS]
TEXT = [*TRAIN, "data.train=text.txt"]
CASES: list[tuple[str, Prepare, list[str], list[str]]] = [
    # -- command line
    ("unknown key", nothing, [*TEXT, "learning_rate=1"], ["learning_rate=1 (command line)", "train.lr"]),
    ("misspelt key", nothing, [*TEXT, "trian.stepz=2"], ["trian.stepz=2", "did you mean train.steps"]),
    ("no equals sign", nothing, [*TEXT, "fast"], ["fast", "a setting is key=value"]),
    ("key twice", nothing, [*TEXT, "train.lr=1", "train.lr=2"], ["train.lr", "given twice on the command line"]),
    ("section as key", nothing, [*TEXT, "model=moe"], ["model", "a section", "model.kind"]),
    ("not a number", nothing, [*TEXT, "train.lr=fast"], ["train.lr=fast", "a number is needed, such as"]),
    ("negative", nothing, [*TEXT, "train.lr=-1"], ["train.lr=-1 (command line)", "more than 0"]),
    ("not finite", nothing, [*TEXT, "train.lr=.nan"], ["train.lr", "a number is needed"]),
    ("no steps", nothing, ["train", "tiny", "train.steps=0"], ["train.steps=0", "at least 1"]),
    ("half a step", nothing, ["train", "tiny", "train.steps=2.5"], ["train.steps=2.5", "whole number"]),
    ("restarts of nothing", nothing, [*TRAIN, "--restarts", "3"], ["--restarts", "add --supervise"]),
    ("processes of nothing", nothing, ["resume", "STOPPED", "--processes", "2"], ["--processes", "add --supervise"]),
    ("a supervisor in each process", under_torchrun, [*TRAIN, "--supervise"], ["--supervise", "without torchrun"]),
    ("two lengths", nothing, ["train", "tiny", "train.steps=3", "train.time=2h"], ["train.steps, train.time", "one"]),
    ("not a duration", nothing, ["train", "tiny", "train.time=soon"], ["train.time=soon", "1h30m"]),
    ("warm-up longer than the run", nothing, [*TEXT, "train.warmup=9"], ["train.warmup=9", "shorten one"]),
    ("batch not whole", nothing, [*TEXT, "train.batch_tokens=500"], ["train.batch_tokens=500", "use", "448 or 512"]),
    ("micro-batch", nothing, [*TEXT, "train.micro_batch=3"], ["train.micro_batch=3", "2 or 4"]),
    ("heads", nothing, [*TEXT, "model.heads=3"], ["model.heads=3", "model.kv_heads=2", "kv_heads 1 or 3"]),
    ("odd head", nothing, [*TEXT, "model.head_dim=15"], ["model.head_dim=15", "14 or 16"]),
    ("top-1", nothing, [*TEXT, "model.moe.top_k=1"], ["model.moe.top_k=1", "gradient", "2 or more"]),
    ("more than all experts", nothing, [*TEXT, "model.moe.top_k=9"], ["top_k=9", "experts=4", "4 or less"]),
    ("key of another kind", nothing, [*TEXT, "model.kind=dense", "model.moe.experts=8"],
     ["model.moe.experts=8 (command line)", "leave it out", "model.kind=moe or hybrid"]),
    ("unknown kind", nothing, [*TEXT, "model.kind=sparse"], ["model.kind=sparse", "dense, moe, mod or hybrid"]),
    ("vocabulary too small", nothing, [*TEXT, "model.vocab=100"], ["model.vocab=100", "at least 260"]),
    ("unlike precisions", nothing, [*TEXT, "precision.mode=bf16_pure", "precision.eval=fp32"],
     ["precision.mode=bf16_pure", "precision.eval=auto"]),
    ("no such device", nothing, [*TEXT, "parallel.device=cuda"], ["parallel.device=cuda", "has no cuda", "auto"]),
    ("does not fit", little_memory, [*TEXT, "model.width=512"], ["does not fit", "model.width=512", "smaller"]),
    ("failures that never come", nothing, [*TEXT, "checkpoint.mtbf=0"], ["checkpoint.mtbf=0", "must be more than 0"]),
    ("saves before the start", nothing, ["train", "tiny", "checkpoint.every=-5"],
     ["checkpoint.every=-5", "auto or a whole number of steps"]),
    ("no best one", nothing, [*TEXT, "checkpoint.keep_best=0"], ["checkpoint.keep_best=0", "at least 1"]),
    ("neither stop nor continue", nothing, [*TEXT, "checkpoint.on_error=ignore"],
     ["checkpoint.on_error=ignore", "stop or continue"]),
    ("disk too small", little_disk, [*TEXT, "--fresh"], ["two of them have to fit", "0.0 MiB are free", "--root"]),
    ("quiet and json", nothing, [*TEXT, "--quiet", "--json"], ["--quiet and --json", "use one"]),
    ("no such preset", nothing, ["train", "debgu"], ["unknown preset 'debgu'", "did you mean debug"]),
    # -- configuration files
    ("no such file", nothing, ["train", "mine.yaml"], ["mine.yaml", "No such file", "check the path"]),
    ("a folder as file", nothing, ["train", "folder.yaml/"], ["folder.yaml", "check the path"]),
    ("tabs", put("my.yaml", "train:\n\tsteps: 3\n"), ["train", "my.yaml"], ["my.yaml: line 2", "indent with spaces"]),
    ("a list", put("my.yaml", "- train\n"), ["train", "my.yaml"], ["my.yaml", "no sections in it", "train:"]),
    ("not UTF-8", put("my.yaml", b"train: {steps: 3} # \xe9"), ["train", "my.yaml"], ["my.yaml", "byte 20", "UTF-8"]),
    ("repeated key", put("my.yaml", "train: {lr: 1, lr: 2}"), ["train", "my.yaml"],
     ["my.yaml: line 1", "'lr' is given twice", "mend it"]),
    ("unknown section", put("my.yaml", "trainer: {lr: 1}"), ["train", "my.yaml"],
     ["trainer.lr=1 (file my.yaml)", "did you mean train.lr"]),
    ("extends nothing", put("my.yaml", "extends: b8\n"), ["train", "my.yaml"],
     ["my.yaml", "unknown preset 'b8'", "b7"]),
    ("from the future", put("my.yaml", "schema_version: 9\n"), ["train", "my.yaml"],
     ["my.yaml: schema_version is 9", "the version that wrote"]),
    ("three at once", put("my.yaml", "train: {lr: -1, clip: no}\nmodel: {layers: 0}"), ["train", "my.yaml"],
     ["3 problems", "train.lr=-1", "train.clip=no", "model.layers=0"]),
    # -- data
    ("no data", nothing, [*TRAIN, "data.train=missing.txt"], ["missing.txt", "no such file"]),
    ("glob without matches", nothing, [*TRAIN, "data.train=*.csv"], ["*.csv", "match"]),
    ("empty file", put("empty.txt", ""), [*TRAIN, "data.train=empty.txt"],
     ["empty.txt: the file is empty", "leave them out"]),
    ("latin-1", put("old.txt", "déjà vu\n".encode("latin-1")), [*TRAIN, "data.train=old.txt"],
     ["old.txt", "UTF-8", "iconv"]),
    ("UTF-16", put("w.txt", "text".encode("utf-16")), [*TRAIN, "data.train=w.txt"], ["w.txt", "UTF-8"]),
    ("too short", put("short.txt", "short\n"), [*TRAIN, "data.train=short.txt"],
     ["shorter than one sequence", "give more text"]),
    ("a broken line", put("b.jsonl", '{"text": "fine"}\n{"text": \n'), [*TRAIN, "data.train=b.jsonl"], ["b.jsonl:2"]),
    ("no text in a record", put("b.jsonl", '{"body": "x"}\n'), [*TRAIN, "data.train=b.jsonl"], ["b.jsonl:1", "text"]),
    ("text that is none", put("b.jsonl", '{"text": 3}\n'), [*TRAIN, "data.train=b.jsonl"], ["b.jsonl:1", "text"]),
    ("a lone surrogate", put("b.jsonl", '{"text": "\\ud800"}\n'), [*TRAIN, "data.train=b.jsonl"], ["b.jsonl:1"]),
    ("a device", nothing, [*TRAIN, "data.train=/dev/zero"], ["/dev/zero", "a pipe or a device gives no text"]),
    ("a broken link", lambda here, _: (here / "gone.txt").symlink_to("nowhere"), [*TRAIN, "data.train=gone.txt"],
     ["gone.txt", "broken link"]),
    ("an empty folder", lambda here, _: (here / "none").mkdir(), [*TRAIN, "data.train=none"], ["none", ".txt"]),
    ("no held-out file", nothing, [*TEXT, "data.eval=missing.txt"], ["missing.txt", "no such file"]),
    ("the cache is a file", cache_is_a_file, TEXT, ["cache", "set LUMINA_CACHE"]),
    # -- tokenizers
    ("no tokenizer", nothing, [*TEXT, "data.tokenizer=no.json"], ["no.json"]),
    ("not a tokenizer", put("tok/tokenizer.json", "{}"), [*TEXT, "data.tokenizer=tok"], ["tok", "tokenizer"]),
    ("no end token", tokenizer(no_end_token), [*TEXT, "data.tokenizer=tok"], ["tok", "end"]),
    ("a vocabulary too small for it", tokenizer(lambda content: None), [*TEXT, "data.tokenizer=tok", "model.vocab=260"],
     ["model.vocab=260", "leave model.vocab out"]),
    # -- runs and checkpoints
    ("no such run", nothing, ["resume", "runs/stoped"], ["runs/stoped: no such run", "did you mean runs/stopped"]),
    ("not a run", nothing, ["resume", "."], ["not a run folder", "config.yaml"]),
    ("no configuration", damage(lambda r: r.config.unlink()), ["resume", "STOPPED"], ["no config.yaml"]),
    ("a damaged configuration", damage(lambda r: r.config.write_text("train: [")), ["resume", "STOPPED"],
     ["runs/stopped/config.yaml: line 1", "mend it"]),
    ("damaged facts", damage(lambda r: r.meta.write_text("{")), ["resume", "STOPPED"],
     ["meta.json: not JSON", "restore"]),
    ("settings for a run", nothing, ["config", "show", "RUN", "train.lr=1"], ["a run has its settings", "leave out"]),
    ("another run by resuming", nothing, ["resume", "STOPPED", "train.lr=1", "train.compile=off"],
     ["train.lr: a run keeps what it computes", "train.recompute, precision.mode", "begin another run: lumina train"]),
    ("a run's key misspelt", nothing, ["resume", "STOPPED", "train.recompile=full"],
     ["train.recompile", "unknown key"]),
    ("a value out of range for a run", nothing, ["resume", "STOPPED", "train.recompute=much"],
     ["train.recompute=much (lumina resume)", "must be none, selective or full"]),
    ("a device for a run that is not here", nothing, ["resume", "STOPPED", "parallel.device=mps"],
     ["parallel.device=mps", "has no mps"]),
    ("a micro-batch for a run that does not divide", nothing, ["resume", "STOPPED", "train.micro_batch=3"],
     ["train.micro_batch=3 (lumina resume)", "does not divide"]),
    ("damaged word of a lack of memory", damage(lambda r: r.retry.write_text("[]")), ["resume", "STOPPED"],
     ["retry.json: damaged", "delete it"]),
    ("word of half a lack of memory", damage(lambda r: r.retry.write_text('{"micro_batch": 0}')), ["resume", "STOPPED"],
     ["retry.json: damaged", "delete it"]),
    ("every checkpoint damaged", damage(every_checkpoint_flipped), ["resume", "STOPPED"],
     ["every checkpoint is damaged", "state.json has other bytes", "--fresh"]),
    ("no checkpoint to go back to", nothing, ["resume", "STOPPED", "--from", "1"],
     ["runs/stopped: no checkpoint of step 1", "those of 2"]),
    ("back to where it stands", nothing, ["resume", "RUN", "--from", "4"], ["stands at step 4", "earlier"]),
    ("batches left out without going back", nothing, ["resume", "STOPPED", "--skip"], ["go back to", "--from"]),
    ("half a range to leave out", nothing, ["resume", "RUN", "--from", "2", "--skip-steps", "3:"],
     ["--skip-steps 3:", "120:140"]),
    ("two ways to leave out", nothing, ["resume", "RUN", "--from", "2", "--skip", "--skip-steps", "3:4"],
     ["beside --skip", "without --skip"]),
    ("batches before the step to go back to", nothing, ["resume", "RUN", "--from", "2", "--skip-steps", "1:3"],
     ["steps 1 to 3: not after step 2"]),
    ("an overlay out of bounds", began_with('[{"id":"a","key":"lr.scale","value":900,"begin":3,"end":null}]'),
     ["resume", "STOPPED"], ["events.jsonl: damaged overlays: lr.scale=900: out of bounds", "restore"]),
    ("overlays that are none", began_with("7"), ["resume", "STOPPED"], ["events.jsonl: damaged overlays", "restore"]),
    ("a parent step that is none", damage(lambda r: r.event_log.write_text(
        r.event_log.read_text() + '{"t":"run","v":1,"attempt":1,"parent_step":"2"}\n')), ["resume", "STOPPED"],
     ["events.jsonl: damaged: `attempt` and `parent_step`", "restore"]),
    ("no tokenizer in the run", damage(lambda r: shutil.rmtree(r.tokenizer)), ["resume", "STOPPED"],
     ["runs/stopped/tokenizer: the run's tokenizer is gone", "restore it"]),
    ("no tokenizer to write with", damage(lambda r: shutil.rmtree(r.tokenizer), "done"), ["generate", "RUN", "-p", "x"],
     ["runs/done/tokenizer: the run's tokenizer is gone", "restore it"]),
    ("other data", put("text.txt", "other words\n" * 4000), ["resume", "STOPPED"],
     ["data or tokenizer changed", "--fresh"]),
    ("data gone", lambda here, _: (here / "text.txt").unlink(), ["resume", "STOPPED"], ["text.txt", "no such file"]),
    ("nothing to write with", damage(lambda r: shutil.rmtree(r.checkpoints), "done"), ["generate", "RUN", "-p", "x"],
     ["no complete checkpoint", "lumina resume"]),
    ("a checkpoint of another shape", damage(another_shape, "done"), ["generate", "RUN", "-p", "x"],
     ["saved from another model", "shape"]),
    ("root is a file", put("file", ""), [*TEXT, "--root", "file"], ["file", "cannot make a run folder", "--root"]),
    ("root cannot be made", put("file", ""), [*TEXT, "--root", "file/runs"], ["file/runs", "--root"]),
    ("read-only folder", read_only, [*TEXT, "--fresh"], ["cannot make a run folder here: Read-only", "--root"]),
    ("disk full: run folder", fail_writes("config.yaml"), [*TEXT, "--fresh"],
     ["run cannot be written: No space left", "--root"]),
    ("disk full: cache", fail_writes("building"), [*TRAIN, "data.train=other.txt"], ["token cache", "LUMINA_CACHE"]),
    # -- checkpoints
    ("no such checkpoint", nothing, ["checkpoints", "RUN", "--diff", "2", "3"], ["no checkpoint '3'", "steps 2, 4"]),
    ("a checkpoint elsewhere", nothing, ["checkpoints", "RUN", "--diff", "2", "../../../text.txt"], ["no checkpoint"]),
    ("a difference to what is damaged", damage(lambda r: flip(newest(r) / store.STATE)),
     ["checkpoints", "STOPPED", "--diff", "2", "latest"], ["state.json has other bytes"]),
    ("two wishes at once", nothing, ["checkpoints", "RUN", "--verify", "--prune"], ["different things", "use one"]),
    ("yes to nothing", nothing, ["checkpoints", "RUN", "--yes"], ["go with --prune"]),
    ("notes that are none", damage(lambda r: (r.checkpoints / "notes.json").write_text("[")),
     ["checkpoints", "STOPPED"], ["notes.json: not the notes", "delete it"]),
    # -- writing
    ("top-p", nothing, ["generate", "RUN", "-p", "x", "--top-p", "2"], ["top_p=2.0", "(0, 1]"]),
    ("temperature", nothing, ["generate", "RUN", "-p", "x", "--temperature", "nan"], ["temperature=nan", "positive"]),
    ("prompt not UTF-8", nothing, ["generate", "RUN", "-p", "ab\udcff"], ["character 3", "iconv"]),
    ("verify: unknown preset", nothing, ["verify", "resume", "tinny"], ["tinny", "tiny"]),
    (
        "verify: unknown configuration",
        nothing,
        ["verify", "resume", "--configuration", "dense-muon"],
        ["no such configuration", "(dense|moe|mod|hybrid)-(muon|adamw)"],
    ),
    ("verify: report into a file", nothing, ["verify", "resume", "--out", "text.txt"], ["text.txt", "another folder"]),
    ("json without prompt", nothing, ["chat", "RUN", "--json"], ["--json needs a prompt", "-p TEXT"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a finished run and a run that was stopped."""
    here = tmp_path_factory.mktemp("made")
    write_text(here)
    keys = settings(here) | {"train.steps": 4, "checkpoint.every": 2, "data.train": "text.txt"}

    def stop(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == 3:
            raise RuntimeError("power cut")

    before = Path.cwd()
    os.chdir(here)
    try:
        Trainer("tiny", keys).fit().path.rename("runs/done")
        with pytest.raises(RuntimeError):
            Trainer("tiny", keys, fresh=True, listeners=[stop]).fit()
        next(path for path in Path("runs").iterdir() if path.name != "done").rename("runs/stopped")
    finally:
        os.chdir(before)
    return here


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    meta = run().meta
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"started_in": str(Path.cwd())}))
    (tmp_path / "here" / "other.txt").write_text("a text that no cache knows\n" * 2000)
    return tmp_path / "here"


@pytest.mark.parametrize(("prepare", "arguments", "needles"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_bad_input(
    prepare: Prepare,
    arguments: list[str],
    needles: list[str],
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        prepare(here, patch)
        command = [{"RUN": "runs/done", "STOPPED": "runs/stopped"}.get(word, word) for word in arguments]
        require_refusal(here, command, needles, capsys)


def test_there_are_many_kinds() -> None:
    assert len(CASES) >= 40
    assert len({case[0] for case in CASES}) == len(CASES)


def test_two_processes_on_one_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(run().lock):
        assert main(["resume", "runs/stopped"]) == 2
        said = capsys.readouterr().err
        assert f"in use by process {os.getpid()}" in said
        assert "--fresh" in said
        assert main(["generate", "runs/stopped", "-p", "x", "--max-tokens", "3"]) == 0  # reading is free


def test_a_prompt_longer_than_the_context_works_and_says_what_is_left_out(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "runs/done", "-p", "word " * 100, "--max-tokens", "3"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("word word")
    assert "left out" in said.err


def test_a_full_disk_stops_the_run_with_its_checkpoints_whole(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "write", refuse)
        assert main(["resume", "runs/stopped"]) == 2
    said = capsys.readouterr().err
    assert "checkpoint not written: No space left on device" in said
    assert "what was saved before is untouched" in said
    assert [path.name for path in run().checkpoints.iterdir() if not path.is_symlink()] == ["step-000002"]
    assert store.verify(newest(run())) == []
    assert main(["resume", "runs/stopped"]) == 0  # once there is space, the run goes on


def test_one_damaged_checkpoint_is_passed_over_and_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(newest(run("done")) / store.STATE)
    assert main(["generate", "runs/done", "-p", "x", "--max-tokens", "3"]) == 0
    assert "skipped step-000004: state.json has other bytes than were saved" in capsys.readouterr().err


def test_a_finished_run_has_nothing_to_go_on_with(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(here)
    assert main(["resume", "runs/done"]) == 0
    assert "is finished: there is nothing to go on with" in capsys.readouterr().out
    assert contents(here) == before


def test_an_unknown_verb_and_a_missing_option_show_the_usage(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["trian"], ["generate", "runs/done"], ["generate", "runs/done", "-p", "x", "--max-tokens", "0"]):
        assert main(command) == 2
        assert "lumina" in capsys.readouterr().err
