"""The command line as a person types it: right input, and every wrong one we could think of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import ended, until, write_text

from lumina.cli import main
from lumina.errors import OutOfMemory
from lumina.training.trainer import Trainer

FAST = ["train.steps=3", "checkpoint.every=0"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    return tmp_path


@pytest.fixture
def trained(here: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The path of a finished tiny run."""
    assert main(["train", "tiny", "data.train=text.txt", *FAST]) == 0
    capsys.readouterr()
    return str(next(here.glob("runs/tiny-*")).relative_to(here))


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command line that must fail as a user error, without a traceback; returns what it said."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    return said.err


def test_train_resume_generate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny", "data.train=text.txt", "model.kind=moe", *FAST]) == 0
    said = capsys.readouterr().out
    run = next(here.glob("runs/tiny-*"))
    assert "dropped from the preset" in said
    assert "[Step 3]" in said
    assert "bits per byte" in said
    assert f"lumina generate runs/{run.name}" in said
    assert "[Step 3]" in (run / "log.txt").read_text()
    assert main(["resume", f"runs/{run.name}"]) == 0
    assert "nothing to go on with" in capsys.readouterr().out
    for prompt in ("line 7:", "", "zwölf 🙂"):
        assert main(["generate", run.name, "-p", prompt, "--max-tokens", "5", "--temperature", "0"]) == 0
        assert capsys.readouterr().out.startswith(prompt)


def test_generation_is_reproducible_and_streams_more_than_the_context(
    trained: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", trained, "-p", "line " * 40, "--max-tokens", "80", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_full_context_is_said(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", trained, "-p", "line", "--max-tokens", "500", "--temperature", "0"]) == 0
    assert "context of 64 tokens is full" in capsys.readouterr().err


def test_wrong_options_are_user_errors_too(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error(capsys, "generate", trained, "-p", "x", "--top-p", "2").count("top_p") == 1
    assert "not UTF-8 text at character 3" in error(capsys, "generate", trained, "-p", "ab\udcff")
    assert main(["generate", trained]) == 2
    assert main(["no-such-verb"]) == 2


def test_a_tokenizer_that_does_not_match_the_checkpoint(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(trained) / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {
        token: (5 if i == 6 else 6 if i == 5 else i) for token, i in content["model"]["vocab"].items()
    }
    path.write_text(json.dumps(content))
    assert "was trained with" in error(capsys, "generate", trained, "-p", "x")


def test_a_folder_that_is_no_run_and_a_run_without_checkpoint(
    trained: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "not a run folder" in error(capsys, "generate", str(here), "-p", "x")
    for path in Path(trained, "checkpoints").iterdir():
        path.unlink() if path.is_symlink() else path.rename(here / path.name)
    assert "no complete checkpoint" in error(capsys, "generate", trained, "-p", "x")


def start(here: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lumina", "train", "tiny", "data.train=text.txt", "train.steps=100000"]
    return subprocess.Popen(
        [*command, "checkpoint.every=0", *arguments],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_steps(here: Path, process: subprocess.Popen[str]) -> Path:
    """Waits until the process trains; returns its run."""

    def training() -> list[Path]:
        return [log.parent for log in here.glob("runs/*/events.jsonl") if '"t":"step"' in log.read_text()]

    run: Path = until(training, process)[0]
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number: signal.Signals, here: Path) -> None:
    process = start(here)
    run = wait_for_steps(here, process)
    locked = subprocess.run(
        [sys.executable, "-m", "lumina", "resume", str(run)],
        cwd=here,
        capture_output=True,
        text=True,
    )
    assert locked.returncode == 2
    assert f"process {process.pid}" in locked.stderr
    process.send_signal(number)
    out, err = ended(process)
    assert process.returncode == 3, err
    assert f"lumina resume runs/{run.name}" in out
    assert (run / "checkpoints" / "latest" / "COMPLETE").is_file()
    assert json.loads((run / "events.jsonl").read_text().splitlines()[-1])["signal"] == number.name


def test_main_py_is_the_same_program(here: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    (here / "my.yaml").write_text("extends: tiny\ndata: {train: text.txt}\ntrain: {steps: 2}\ncheckpoint: {every: 0}\n")
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, str(root / "Main.py"), "my.yaml"],
        cwd=here, capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[Step 2]" in done.stdout
    assert next(here.glob("runs/my-*")).is_dir()


def test_an_interrupt_outside_training_is_one_line(
    trained: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lumina.inference.engine.load", interrupt)
    assert main(["generate", trained, "-p", "x"]) == 130
    assert capsys.readouterr().err == "\nstopped at once; checkpoints saved before are complete\n"


def test_a_reader_that_goes_away_is_no_error(trained: str, here: Path) -> None:
    command = [sys.executable, "-m", "lumina", "generate", trained, "-p", "x", "--max-tokens", "50"]
    process = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert process.stderr is not None
    assert b"Error" not in process.stderr.read()
    process.stderr.close()


def test_memorised_evaluation_and_passed_over_files_are_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "data").mkdir()
    (here / "data" / "same.txt").write_text((here / "text.txt").read_text())
    (here / "data" / "table.csv").write_text("1,2")
    assert main(["train", "tiny", "data.train=data", "data.eval=text.txt", *FAST]) == 0
    said = capsys.readouterr().out
    assert "1 of 1 held-out documents are in the training data too" in said
    assert "1 file was passed over" in said
    assert "passes over the data" in said


def test_out_of_memory_has_its_own_code_and_a_bug_is_told_to_torchrun(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[Exception] = [OutOfMemory("one sequence is too much", fix="a smaller model"), RuntimeError("a bug")]

    def fit(trainer: Trainer) -> None:
        raise raised.pop(0)

    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(here / "error.json"))
    assert main(["train", "tiny", "data.train=text.txt"]) == 5
    assert capsys.readouterr().err == "error: one sequence is too much\n  fix: a smaller model\n"
    assert not (here / "error.json").exists()
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", "tiny", "data.train=text.txt"])
    assert "a bug" in (here / "error.json").read_text()
