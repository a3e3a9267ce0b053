"""`lumina plan` and `lumina.plan`."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import write_text

import lumina
from lumina import planning
from lumina.cli import main
from lumina.config.resolve import resolve
from lumina.errors import UserError
from lumina.planner import calibration, hardware
from lumina.planner.hardware import DEVICES
from lumina.run.folder import Run

SECTIONS = ["model", "train", "memory", "time", "loss", "ratio", "data", "lr", "batch", "warmup"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and a CPU whose rates are known."""
    monkeypatch.setenv("LUMINA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware, "matmul_rate", lambda: 1e11)
    monkeypatch.setattr(hardware, "copy_rate", lambda: 2e10)


def page(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_page_answers_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    lines = page(capsys, "b7", "--gpus", "8xH100", "--tokens-available", "20B", "--price", "2.5")
    names = [line[:7].strip() for line in lines if line[:7].strip() and not line.startswith(("!", "next"))]
    assert names == [*SECTIONS[:4], "cost", *SECTIONS[4:]]
    text = "\n".join(lines)
    assert "6.99B active a token" in text
    assert "of 8xH100-SXM, each" in text
    assert "NVIDIA, H100 data sheet; utilisation 16% to 49%" in text
    assert "7 epochs, worth 119B fresh tokens" in text
    assert "not counted: evaluating, starting, compiling, saving" in text
    assert "20 tokens a parameter are what Chinchilla was trained with: a rule, no constant" in text
    assert "at 2.5 an hour of a device" in text
    assert lines[-1] == "next   lumina train b7 precision.mode=bf16_pure --supervise --processes 8"
    assert any(line.startswith("! 7.0 epochs") for line in lines)


def test_programs_get_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "b1", "--gpus", "H200", "--inference-tokens", "1T", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["cost"]["total"] > 6e9
    assert plan["steps"] * 524288 == plan["tokens"]
    assert plan["flops"] == plan["cost"]["flops_per_token"] * plan["tokens"]
    assert plan["step"]["seconds"]["low"] < plan["step"]["seconds"]["mid"] < plan["step"]["seconds"]["high"]
    assert plan["memory"]["total"] == sum(plan["memory"]["parts"].values())
    assert plan["losses"][0]["law"] == "besiroglu"
    assert plan["use"]["smaller"]["params"] < plan["losses"][0]["params"]
    assert plan["devices"] == {"name": "H200", "count": 1, "here": False, "source": DEVICES["H200"].source}


def test_a_mixture_that_takes_all_of_its_experts_gains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    told = {}
    for experts in (2, 4):
        assert main(["plan", "debug", "model.kind=moe", f"model.moe.top_k={experts}", "--gpus", "H200", "--json"]) == 0
        told[experts] = json.loads(capsys.readouterr().out)["moe"]
    assert told[4] == {"expansion": 1, "gain": pytest.approx(1), "extrapolated": []}
    assert told[2]["gain"] < 1  # so little compute that the law says nothing
    assert "so few that the law gains nothing" in told[2]["extrapolated"][0]
    text = "\n".join(page(capsys, "b300", "--gpus", "8xB200"))
    assert "8.12 experts for each one taken: a dense model needs 2.6 times the FLOPs" in text
    assert "that is extrapolated: 3e+11 active, beyond 2.7e+09; 2.04e+12 in all" in text


def test_more_parameters_more_data_or_more_epochs_of_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for tokens in ("20B", "300B"):
        assert main(["plan", "b7", "--gpus", "H200", "--tokens-available", tokens, "--json"]) == 0
        found[tokens] = json.loads(capsys.readouterr().out)["repeats"]
    little, enough = found["20B"], found["300B"]
    assert little["twice"]["data"] < little["twice"]["epochs"] < little["twice"]["params"] < little["loss"]
    assert (little["more_data"], little["better"]) == (False, "epochs")  # it was said that there are no more
    assert (enough["more_data"], enough["better"]) == (True, "data")
    text = "\n".join(page(capsys, "b7", "--gpus", "H200", "--tokens-available", "20B"))
    assert (
        "twice the compute on more parameters 2.239, more data 2.197, more epochs 2.226 nats of C4, now 2.255" in text
    )
    assert "more epochs make most of what can be had" in text


def test_the_written_configuration_is_checked_and_trained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    lines = page(
        capsys, "--params", "150k", "--tokens", "4k", "--data", "text.txt", "--out", "plan.yaml", "parallel.device=cpu"
    )
    assert lines[-1] == "next   lumina train plan.yaml"
    assert lines[0].startswith("why    preset tiny, of all the nearest to 1.5e+05 active parameters")
    assert main(["config", "check", "plan.yaml"]) == 0
    config = resolve("plan.yaml").config
    assert config.data.train == ("text.txt",)
    assert config.train.tokens == 4096
    assert main(["train", "plan.yaml", "--quiet"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert Run.open(run).finished
    capsys.readouterr()
    compared = page(capsys, run.name)
    assert compared[0].startswith(f"run    {run.relative_to(tmp_path)}: finished")
    assert main(["plan", str(run), "--json"]) == 0
    items = json.loads(capsys.readouterr().out)["items"]
    assert items["memory"]["actual"] > 0
    assert any("one finished run of this kind ended" in line for line in page(capsys, "plan.yaml"))


def test_python_asks_the_same() -> None:
    plan = lumina.plan("b1", gpus="8xH100", time="24h", **{"price": 2.5})
    assert plan.price is not None
    assert plan.price.mid == pytest.approx(2.5 * 8 * plan.run.total.mid / 3600)
    assert plan.run.total.mid < 86400
    assert plan.memory.fits
    assert plan.resolved.config.train.time == 86400
    with pytest.raises(UserError, match="unknown GPU"):
        lumina.plan("b1", gpus="8xH1000")


def test_the_plan_is_of_the_run_that_it_starts() -> None:
    """What was asked does not fit, what is shown and started does, and everything is of the latter."""
    made = lumina.plan("b7", gpus="8xH100", data=None, tokens="20B")
    assert made.asked is not None
    assert made.asked.total > made.asked.capacity >= made.memory.total
    assert made.config.precision.mode == "bf16_pure"
    started = planning.next_command(made, None)
    assert started == "lumina train b7 precision.mode=bf16_pure train.tokens=20000000000 --supervise --processes 8"
    same = lumina.plan("b7", ["precision.mode=bf16_pure"], gpus="8xH100", tokens="20B")
    assert same.asked is None
    assert (same.memory, same.step, same.run) == (made.memory, made.step, made.run)
    assert "precision:\n  mode: bf16_pure  # or it would not fit" in planning.configuration(made)
    assert any("as asked it does not fit" in warning and "small updates" in warning for warning in made.warnings)
    asked = lumina.plan("b7", ["precision.mode=bf16"], gpus="8xH100", tokens="20B")  # also of who said otherwise
    assert planning.next_command(asked, None) == started
    assert planning.command(asked.question) == "lumina plan b7 precision.mode=bf16 --tokens 20000000000 --gpus 8xH100"


LONG = ("model.seq_len=65536", "train.batch_tokens=524288")


@pytest.mark.parametrize(
    "arguments", [("b7", "--gpus", "L4"), ("b50", "--gpus", "8xH100"), ("b1", *LONG, "--gpus", "8xL4")]
)
def test_what_does_not_fit_leads_to_a_plan_that_does(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        lines = page(capsys, *arguments)
        verb, *arguments = shlex.split(next(line for line in lines if line.startswith("next"))[7:])[1:]
        if verb != "plan":
            break
        assert "! it does not fit" in lines
    assert "does not fit" not in lines[4]
    assert verb == "train" or "HOST:29400" in lines[-2]


def test_several_machines_are_started_by_torchrun_on_each(capsys: pytest.CaptureFixture[str]) -> None:
    *_, started, where = page(capsys, "b1", "--gpus", "24xH100", "train.batch_tokens=786432")
    assert started.split() == [
        "next", "torchrun", "--nnodes", "3", "--nproc-per-node", "8", "--rdzv-backend", "c10d", "--rdzv-endpoint",
        "HOST:29400", "-m", "lumina", "train", "b1", "train.batch_tokens=786432",
    ]  # fmt: skip
    assert "on each of the 3 machines" in where


def test_without_a_preset_the_next_command_can_be_pasted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = page(capsys, "--params", "150k", "--tokens", "4096", "--kind", "dense", "parallel.device=cpu")
    first, second = lines[-1].removeprefix("next   ").split(" && ")
    assert second == "lumina train plan.yaml"
    assert main(shlex.split(first)[1:]) == 0
    assert main(["config", "check", "plan.yaml"]) == 0


def test_what_a_file_says_is_not_said_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: debug\nmodel:\n  kind: dense\ntrain:\n  steps: 300\n  lr: 1e-3\n")
    for settings in ([], ["train.lr=2e-3"]):
        made = lumina.plan(file, settings, gpus="H100")
        assert planning.next_command(made, None) == " ".join(["lumina train", str(file), *settings])


def test_a_question_is_the_command_that_asks_it() -> None:
    keys = {
        "gpus": "2xX9",
        "peak_tflops": 362.5,
        "mem": "46068MiB",
        "time": "90m",
        "price": 2.5,
        "available": 123456789,
    }
    known: dict[str, Any] = {
        ("tokens_available" if name == "available" else name): value for name, value in keys.items()
    }
    made = lumina.plan("b1", ["model.kind=dense", "train.micro_batch=1"], **known)
    arguments = shlex.split(planning.command(made.question))
    assert arguments[:3] == ["lumina", "plan", "b1"]
    options = dict(zip(arguments[5::2], arguments[6::2], strict=True))
    assert options == {
        "--time": "5400s", "--price": "2.5", "--tokens-available": "123456789", "--gpus": "2xX9",
        "--peak-tflops": "362.5", "--mem": "46068MiB",
    }  # fmt: skip
    assert made.fleet.device.memory == 46068 * 2**20


def test_a_laptop_is_told_what_it_can_do_in_the_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = write_text(tmp_path)
    assert main(["plan", "b1", "--data", str(text), "--time", "24h", "parallel.device=cpu"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"24 hours hold \d+ steps? of b1 on .*: one, of 524,288 tokens, takes", said)
    assert re.search(r"leave b1 out: --time alone finds what fits \(.* active parameters, .* tokens\)", said)
    lines = page(capsys, "--data", str(text), "--time", "24h", "parallel.device=cpu")
    assert any(line.startswith("time   22h") for line in lines)


def test_a_price_of_this_cpu_is_said_to_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    warned = "! the price is taken for an hour of this machine"
    lines = page(capsys, "--budget", "300", "--price", "2.5", "parallel.device=cpu")
    assert sum(line.startswith(warned) for line in lines) == 1
    lines = page(capsys, "--budget", "300", "--price", "2.5", "--gpus", "H100")
    assert not any(line.startswith(warned) for line in lines)


def test_more_than_fits_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    lines = page(capsys, "b7", "--gpus", "L4", "--tokens-available", "200B")
    assert any("does not fit" in line for line in lines[:10])
    assert "! it does not fit" in lines
    processes, _, *settings = next(line for line in lines if "to fit: " in line).split("to fit: ")[1].split()
    assert (
        lines[-1] == f"next   lumina plan b7 {' '.join(settings)} --tokens-available 200000000000 --gpus {processes}xL4"
    )


def test_a_measurement_is_kept_and_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {
        "step": 0.25, "step_low": 0.2, "step_high": 0.3, "start": 9.0, "end": 1.0, "evaluation": 5.0, "probe": 0.0,
        "save": 0.0, "compiled": 0.0, "memory": 1e9, "matmul_bf16": 4e11, "matmul_fp32": 2e11,
    }  # fmt: skip
    files: list[str] = []

    def measure(file: Path, progress: object) -> dict[str, float]:
        files.append(file.read_text())
        return dict(figures)

    monkeypatch.setattr(planning, "measure_in_process", measure)
    asked = ["tiny", "train.steps=100", "parallel.device=cpu", "checkpoint.every=0", "orchestrator.probe_every=0"]
    first = "\n".join(page(capsys, *asked, "--measure"))
    assert "40s (35s to 45s)" in first  # 100 steps of 0.25 s, 9 and 1 s around them, 5 s of evaluation
    assert "measured here, of this configuration" in first
    assert "steps: 100" in files[0]
    assert len(files) == 1
    assert "\n".join(page(capsys, *asked)) == first
    page(capsys, *asked, "--measure")
    assert len(files) == 1  # it is known
    near = "\n".join(page(capsys, *asked, "model.moe.ffn=72"))
    assert "corrected by what another shape took here" in near
    (entry,) = calibration.load().entries
    assert entry.figures["ratio_launches"] > 0


def test_a_damaged_calibration_is_said_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cache").mkdir()
    calibration.path().write_text("{")
    assert any("planner-1.json: not used: damaged" in line for line in page(capsys, "b1", "--gpus", "H200"))


def test_loss_beyond_guessing_is_no_loss(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(page(capsys, "tiny", "--gpus", "H200"))
    assert "nothing (" in text
    assert "and guessing has 5.6" in text


def test_data_is_counted_or_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path)
    lines = page(capsys, "tiny", "--data", str(text), "--gpus", "H200")
    assert any(f"estimated from {text.stat().st_size:.3g} bytes at 1 a token" in line for line in lines)
    assert any("no data is named" in line for line in page(capsys, "b1", "--gpus", "H200"))


WRONG = {
    "an unknown preset": (["b8"], "unknown preset 'b8'"),
    "an unknown key": (["b1", "learning_rate=1"], "did you mean train.lr"),
    "an unknown GPU": (["b1", "--gpus", "8xH1000"], "did you mean H100"),
    "an unknown law": (["b1", "--law", "kaplan"], "kaplan: no such scaling law"),
    "an unknown kind": (["b1", "--kind", "sparse"], "model.kind=sparse"),
    "two lengths": (["b1", "--tokens", "1B", "--time", "1h"], "each says how long to train"),
    "a budget alone": (["--budget", "300"], "add --price"),
    "a wrong unit": (["--compute", "24h"], "FLOPs are needed"),
    "zero": (["--params", "0"], "more than 0"),
    "no such data": (["b1", "--data", "nowhere.txt"], "nowhere.txt"),
    "a folder that is no run": (["folder"], "not a run folder"),
    "a run that is not there": (["runs/nope"], "no such run"),
    "measuring another machine": (["tiny", "--gpus", "H200", "--measure"], "--measure times this machine"),
    "a name that is none": (["tiny", "--gpus", "H200", "--out", "plan.json"], "ends in .yaml"),
    "a folder that is not there": (["tiny", "--gpus", "H200", "--out", "no/plan.yaml"], "cannot be written"),
    "a batch that does not divide": (["tiny", "--gpus", "3xH100"], "do not divide among 3 processes"),
    "a precision without units": (["b1", "precision.mode=bf16", "--gpus", "T4"], "T4 has no bf16 units"),
}


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert main(["plan", *arguments]) == 2
    answer = capsys.readouterr()
    assert said in answer.err
    assert "fix: " in answer.err or "the configuration has a problem" in answer.err
    assert not answer.out


def test_a_run_is_held_against_its_own_plan_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--gpus, --tokens: .* is a run"):
        planning.require_alone(Run(tmp_path), ["--gpus", "--tokens"])


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from lumina.cli import main; "
        "sys.exit(main(['plan', 'b1', '--gpus', '8xH100', '--time', '24h']) or main(['plan', '--compute', '1e19']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next   ") == 2
