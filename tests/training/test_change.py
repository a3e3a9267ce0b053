"""A run goes on with another precision, device, micro-batch or recomputation where the user asks for that, and only
there."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import history, same_tensors, settings, tensors
from test_saving import reseal

from lumina.checkpoint import store
from lumina.cli import main
from lumina.config.change import RESUME
from lumina.config.resolve import read
from lumina.errors import UserError
from lumina.run.folder import Run
from lumina.training import interval
from lumina.training.endings import Stopped
from lumina.training.trainer import Trainer, resume
from lumina.training.ways_back import Back

STEPS = 6


class StopAt:
    """A listener that sends this process a SIGTERM when it sees a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped(folder: Path, keys: dict[str, Any], step: int = 2) -> Run:
    with pytest.raises(Stopped) as stop:
        Trainer("tiny", root=folder, listeners=[StopAt(step)], **keys).fit()
    return stop.value.run


def begun(run: Run) -> dict[str, Any]:
    return [event for event in run.events() if event["t"] == "run"][-1]


@pytest.mark.parametrize("change", [{"train.recompute": "full"}, {"train.recompute": "selective"}])
def test_recomputation_changes_no_bit(change: dict[str, Any], tmp_path: Path) -> None:
    keys = settings(tmp_path) | {"train.eval_every": 3}
    whole = Trainer("tiny", root=tmp_path / "whole", **keys).fit()
    run = stopped(tmp_path / "parts", keys)
    assert resume(run, settings=change).finished
    assert begun(run)["changed"] == {"train.recompute": ["none", change["train.recompute"]]}
    assert history(run) == history(whole)
    assert same_tensors(run, whole)


def test_a_smaller_micro_batch_and_another_kernel_keep_the_numbers(tmp_path: Path) -> None:
    keys = settings(tmp_path) | {"train.optimizer": "adamw"}
    whole = Trainer("tiny", root=tmp_path / "whole", **keys).fit()
    run = stopped(tmp_path / "parts", keys)
    resume(run, settings=["train.micro_batch=2", "model.moe.kernel=loop", "parallel.threads=1"])
    assert begun(run)["changed"]["train.micro_batch"] == [8, 2]
    assert begun(run)["changed"]["model.moe.kernel"] == ["grouped", "loop"]
    mine, theirs = ([event[3] for event in history(one)] for one in (run, whole))
    assert mine == pytest.approx(theirs, rel=1e-4)
    assert [event[1] for event in history(run)] == [event[1] for event in history(whole)]


CHANGES = [("fp32", "bf16"), ("fp32", "bf16_pure"), ("bf16_pure", "fp32"), ("fp32", "fp16"), ("fp16", "bf16_pure")]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run in fp32."""
    folder = tmp_path_factory.mktemp("exact")
    run = Trainer("tiny", root=folder / "runs", **settings(folder, "dense") | {"checkpoint.every": 0}).fit()
    return [event[3] for event in history(run)]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_another_precision_is_kept_to_the_bit(before: str, after: str, exact: list[float], tmp_path: Path) -> None:
    """What was asked for once holds for a plain resume, also before a checkpoint was saved in it."""
    keys = settings(tmp_path, "dense") | {"precision.mode": before, "checkpoint.every": 0}
    run, twin = (stopped(tmp_path / name, keys) for name in ("one", "other"))
    asked = {"precision.mode": after}

    def power_cut(event: dict[str, Any]) -> None:
        if event["t"] == "step":
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        resume(run, [power_cut], settings=asked)
    with pytest.raises(Stopped):
        resume(run, [StopAt(4)])  # from the checkpoint in the old format
    assert resume(run).finished  # from one in the new format
    assert resume(twin, settings=asked).finished
    assert history(run) == history(twin)
    assert same_tensors(run, twin)
    changed = begun(twin)["changed"]
    assert changed["precision.mode"] == [before, after]
    same = before.removesuffix("_pure") == after.removesuffix("_pure")
    assert ("precision.eval" in changed) is not same
    assert read(run.config).origins["precision.mode"] == RESUME
    state = tensors(run)
    assert ("optim/loss_scale" in state) is (after == "fp16")
    wanted = torch.bfloat16 if after == "bf16_pure" else torch.float32
    assert {t.dtype for name, t in state.items() if name.endswith(("w_qkv", "exp_avg", "momentum"))} == {wanted}
    assert [event[3] for event in history(run)] == pytest.approx(exact, abs=0.05)


def test_a_device_that_is_not_here_is_left_by_the_command_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = settings(tmp_path) | {"precision.mode": "bf16"}
    run = stopped(tmp_path / "runs", keys)
    original = run.config.read_text()
    run.config.write_text(original.replace("device: cpu", "device: cuda"))
    with pytest.raises(UserError, match="has no cuda") as error:
        resume(run)
    command = error.value.fix.rpartition(": ")[2].split()
    assert command[:4] == ["lumina", "resume", str(run.path), "parallel.device=cpu"]
    assert command[4].startswith("precision.mode=")
    assert main([*command[1:4], "precision.mode=fp32", "--quiet"]) == 0
    assert run.finished
    assert begun(run)["changed"]["parallel.device"] == ["cuda", "cpu"]
    assert begun(run)["device"] == "cpu"


def test_what_the_machine_decides_can_be_left_to_it_again(tmp_path: Path) -> None:
    run = stopped(tmp_path / "runs", settings(tmp_path) | {"train.micro_batch": 2, "precision.mode": "fp32"})
    config = read(run.config).config
    resume(run, settings={"train.micro_batch": "auto", "parallel.device": "auto", "train.compile": "auto"})
    assert begun(run)["changed"] == {"train.micro_batch": [2, 8]}
    assert read(run.config).config.parallel == config.parallel


def test_the_interval_between_saves_is_measured_again_where_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = interval.measure
    at_once = lambda *how: {way: replace(cost, lasts=0.0) for way, cost in measure(*how).items()}  # noqa: E731
    monkeypatch.setattr(interval, "measure", at_once)
    run = stopped(tmp_path / "runs", settings(tmp_path, "dense"))
    often = ["checkpoint.every=auto", "checkpoint.mtbf=0.000001s"]
    with pytest.raises(Stopped):
        resume(run, [StopAt(3)], settings=often)
    assert begun(run)["changed"]["checkpoint.every"] == [2, 1]
    assert read(run.config).origins["checkpoint.every"].startswith("resolved: sqrt(")
    assert begun(run)["disk"]["every"] == 1
    assert resume(run, settings=["checkpoint.mtbf=1000d"]).finished  # what it was reckoned from is another
    assert begun(run)["changed"]["checkpoint.every"] == [1, STEPS]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.path.name]


def test_how_a_run_is_kept_and_shown_may_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = stopped(tmp_path / "runs", settings(tmp_path))
    capsys.readouterr()
    assert main(["resume", str(run.path), "checkpoint.every=1", "checkpoint.keep_last=4", "telemetry.log_every=1"]) == 0
    said = capsys.readouterr().out
    assert "checkpoint.keep_last is 4 from here on, it was 2" in said
    assert "[Step 4]" in said
    assert "[Step 5]" in said
    assert {store.step_of(path) for path in store.checkpoints(run.checkpoints)} >= {4, 5, 6}
    assert read(run.config).source == "tiny"


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    run = stopped(tmp_path / "runs", settings(tmp_path))
    before, log = run.config.read_bytes(), run.event_log.read_bytes()
    for asked in ("train.lr=1", "model.width=64", "data.train=x.txt", "train.seed=1", "orchestrator.probe_every=3"):
        with pytest.raises(UserError, match=r"a run keeps what it computes(.|\n)*lumina train"):
            resume(run, settings=[asked])
    dense = stopped(tmp_path / "dense", settings(tmp_path, "dense"))
    with pytest.raises(UserError, match="has no use for it"):
        resume(dense, settings=["model.moe.kernel=loop"])
    with pytest.raises(UserError, match=r"stands at step \d, not behind 999"):
        resume(run, settings=["precision.mode=bf16"], back=Back(999))
    assert (run.config.read_bytes(), run.event_log.read_bytes()) == (before, log)


def test_a_checkpoint_of_the_run_s_own_precision_is_not_cast(tmp_path: Path) -> None:
    """Only one of another precision is, and only where that was asked: tensors of other dtypes are no sound ones."""
    run = stopped(tmp_path, settings(tmp_path, "dense") | {"precision.mode": "fp32", "checkpoint.every": 0})
    with pytest.raises(Stopped):
        resume(run, [StopAt(4)], settings=["precision.mode=bf16"])
    newest = (run.checkpoints / "latest").resolve()
    (file,) = (newest / "model").glob("*.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    reseal(newest)
    with pytest.raises(UserError, match=r"was saved as torch\.bfloat16, wanted is torch\.float32"):
        resume(run)
