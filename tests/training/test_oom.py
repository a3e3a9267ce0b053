"""Memory that runs out: what failed is repeated in smaller pieces, and nothing else about the run changes."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import WHY, request, require_equal, trained
from support import same_tensors, settings, write_text

from lumina.checkpoint import store
from lumina.cli import main
from lumina.config.resolve import read
from lumina.errors import OutOfMemory, UserError
from lumina.orchestrator.protocol import Outcome
from lumina.run.exit_codes import OUT_OF_MEMORY
from lumina.run.folder import Run, write_json
from lumina.telemetry.console import Console
from lumina.training import oom
from lumina.training.controls import SessionControls
from lumina.training.oom import Fitting, Shortage, attempt, is_out_of_memory
from lumina.training.step import gradients
from lumina.training.trainer import Trainer, resume

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried …"


def history(run: Run) -> list[tuple[Any, ...]]:
    keys = ("t", "step", "tokens", "loss", "acc", "lr", "grad_norm", "bal", "agree", "bpb")
    return [tuple(event.get(key) for key in keys) for event in run.events() if event["t"] in ("step", "eval", "probe")]


def losses(run: Run) -> list[float]:
    return [event["loss"] for event in run.events() if event["t"] in ("step", "eval")]


def incidents(run: Run) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["t"] == "incident"]


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int, int, bool], bool]) -> None:
    """Gradients of (step, micro-batch, rehearsal?) that fail halfway: those of the first micro-batch are there then."""

    def scarce(*arguments: Any) -> Any:
        model, optimizer, batch, plan, precision, step, at_most = arguments
        micro = len(batch.ids_BS) // plan.micro_batches
        if fails(step, micro, at_most is not None):
            gradients(model, optimizer, batch, plan, precision, step, 1)
            raise RuntimeError(CPU)
        return gradients(*arguments)

    monkeypatch.setattr(oom, "gradients", scarce)


@pytest.mark.parametrize(
    ("error", "means"),
    [
        (RuntimeError(CPU), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB …)"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_means_out_of_memory(error: Exception, means: bool) -> None:
    assert is_out_of_memory(error) is means


def test_an_attempt_that_failed_holds_no_tensor() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def fail() -> None:
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        raise RuntimeError(CPU)

    gc.disable()
    try:
        assert attempt(fail) == Shortage(CPU)
        assert held[0]() is None
    finally:
        gc.enable()
    with pytest.raises(ZeroDivisionError):
        attempt(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="no memory of it"):
        attempt(lambda: (_ for _ in ()).throw(RuntimeError("no memory of it")))


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_a_rehearsal_leaves_no_trace(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"model.moe.dropout": 0.2, "model.mod.anneal": 4} if kind == "hybrid" else {"precision.mode": "fp16"}
    keys = settings(tmp_path, kind) | {"train.eval_every": 3} | extra
    seen: list[tuple[int, float]] = []
    real = Fitting.rehearse

    def watched(fitting: Fitting, batch: Any, step: int, plan: Any) -> None:
        real(fitting, batch, step, plan)
        seen.append((step, fitting.parts.model.routers[0].capacity if kind == "hybrid" else 1.0))
        assert all(p.grad is None for p in fitting.parts.model.parameters())

    monkeypatch.setattr(Fitting, "rehearse", watched)
    rehearsed = Trainer("tiny", root=tmp_path / "rehearsed", **keys).fit()
    assert seen == [(1, 1.0)]  # the whole depth, of which the routers take less later
    monkeypatch.setattr(Fitting, "rehearse", lambda *_: None)
    plain = Trainer("tiny", root=tmp_path / "plain", **keys).fit()
    assert history(rehearsed) == history(plain)
    assert same_tensors(rehearsed, plain)


@pytest.mark.parametrize("own", [False, True])
def test_what_does_not_fit_is_settled_before_the_first_step(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = settings(tmp_path) | ({"train.micro_batch": 4} if own else {})
    failing(monkeypatch, lambda step, micro, rehearsal: micro > 2)
    said: list[str] = []
    run = Trainer("tiny", root=tmp_path / "runs", listeners=[Console(show=said.append)], **keys).fit()
    assert any("out of memory; the batch stays" in line and "of 2 sequences, not 4" in line for line in said)
    steps = [event["step"] for event in run.events() if event["t"] == "step"]
    assert steps == list(range(1, 7))
    told = incidents(run)
    assert [event["micro_batch"] for event in told] == ([[4, 2]] if own else [[8, 4], [4, 2]])
    assert all(event["kind"] == "out of memory" and event["said"] == CPU and event["step"] == 1 for event in told)
    log = [event["t"] for event in run.events()]
    assert log.index("incident") < log.index("step")
    settled = read(run.config)
    assert settled.config.train.micro_batch == 2
    assert settled.origins["train.micro_batch"] == "resolved: out of memory with 4 in step 1"
    monkeypatch.undo()
    with_two = Trainer("tiny", root=tmp_path / "two", **keys | {"train.micro_batch": 2}).fit()
    assert same_tensors(run, with_two)


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_a_step_that_fails_is_taken_again_in_halves_and_a_resume_goes_on_so(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = settings(tmp_path, kind) | {"train.eval_every": 3, "train.micro_batch": 4}
    whole = Trainer("tiny", root=tmp_path / "whole", **keys).fit()
    failing(monkeypatch, lambda step, micro, rehearsal: step == 4 and micro > 2)
    split = Trainer("tiny", root=tmp_path / "split", **keys).fit()
    (told,) = incidents(split)
    assert (told["step"], told["micro_batch"]) == (4, [4, 2])
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
    assert history(split)[:3] == history(whole)[:3]

    monkeypatch.undo()
    failing(monkeypatch, lambda step, micro, rehearsal: step == 4 and micro > 2)

    def crash(event: dict[str, Any]) -> None:
        if event["t"] == "checkpoint" and event["step"] == 4:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        Trainer("tiny", root=tmp_path / "parts", listeners=[crash], **keys).fit()
    monkeypatch.undo()
    again = Trainer("tiny", root=tmp_path / "parts", **keys).fit()
    assert history(again) == history(split)
    assert same_tensors(again, split)


def test_gradients_of_halves_are_those_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, torch.Tensor]] = []
    real = oom.apply

    def watched(model: Any, *rest: Any) -> torch.Tensor:
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return real(model, *rest)

    monkeypatch.setattr(oom, "apply", watched)
    keys = settings(tmp_path) | {"train.steps": 1}
    Trainer("tiny", root=tmp_path / "whole", **keys).fit()
    failing(monkeypatch, lambda step, micro, rehearsal: micro > 2 and not rehearsal)
    Trainer("tiny", root=tmp_path / "split", **keys).fit()
    whole, split = found
    for name, want in whole.items():
        assert (split[name] - want).norm() <= 1e-5 * want.norm(), name


def test_one_sequence_that_does_not_fit_is_beyond_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, lambda *_: True)
    with pytest.raises(OutOfMemory, match=r"one sequence at a time(.|\n)*can't allocate") as error:
        Trainer("tiny", root=tmp_path / "runs", **settings(tmp_path)).fit()
    (run,) = (Run(path) for path in (tmp_path / "runs").iterdir())
    assert f"lumina resume {run.path} train.recompute=full" in error.value.fix
    assert [event["micro_batch"] for event in incidents(run)] == [[8, 4], [4, 2], [2, 1]]
    assert main(["resume", str(run.path), "train.recompute=full"]) == OUT_OF_MEMORY
    assert "recompute" not in capsys.readouterr().err
    monkeypatch.undo()
    assert resume(run).finished


def test_memory_that_runs_out_while_weights_move_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = settings(tmp_path)
    whole = Trainer("tiny", root=tmp_path / "whole", **keys).fit()
    real = oom.apply

    def scarce(*arguments: Any) -> Any:
        if int(arguments[1].steps_taken) == 4:
            arguments[0].embed.weight.data.zero_()  # part of it has happened
            raise RuntimeError(CPU)
        return real(*arguments)

    monkeypatch.setattr(oom, "apply", scarce)
    with pytest.raises(OutOfMemory, match="the optimizer, in step 5"):
        Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    monkeypatch.undo()
    again = Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    assert history(again) == history(whole)
    assert same_tensors(again, whole)


def test_compiling_anew_in_a_step_is_told_for_it_takes_longer_than_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lumina.model.transformer.Block.compile", lambda _: None)
    failing(monkeypatch, lambda step, micro, rehearsal: step == 3 and micro > 2 and not rehearsal)
    told: list[tuple[str, int]] = []

    def hear(what: str, done: int, total: int) -> None:
        told.append((what, done))

    Trainer("tiny", root=tmp_path, progress=hear, **settings(tmp_path) | {"train.compile": "on"}).fit()
    assert [word for word in told if word[0] == oom.COMPILING] == [(oom.COMPILING, 0), (oom.COMPILING, 1)] * 2


@pytest.mark.parametrize("where", ["gradients", "apply", "evaluate"])
def test_an_arm_that_the_memory_does_not_hold_cannot_win_and_changes_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Outcome] = []

    def go(controls: SessionControls) -> None:
        def scarce(*arguments: Any, **_: Any) -> Any:
            if where == "apply":
                arguments[0].embed.weight.data.zero_()  # part of it has happened
            raise RuntimeError(CPU)

        with controls.fork(0.5) as fork:
            outcomes.append(fork.run("sound", [], 2, 1))
            with monkeypatch.context() as patch:
                patch.setattr(oom, where, scarce)
                outcomes.append(fork.run("void", [], 2, 1, hold=True))
            with pytest.raises(UserError, match="was not held"):
                controls.commit(WHY, fork, outcomes[1])
            outcomes.append(fork.run("after", [], 2, 1))

    keys = request(tmp_path)
    whole = trained(tmp_path / "whole", keys, monkeypatch)
    run = trained(tmp_path / "tried", keys, monkeypatch, {4: go})
    require_equal(whole, run)
    assert incidents(run) == []
    assert read(run.config) == read(whole.config)
    sound, void, after = outcomes
    assert "can't allocate memory" in void.void
    assert not void.comparable
    assert not void.heldout < sound.heldout == after.heldout
    assert (sound.void, void.seconds) == ("", 1.5)


def test_an_evaluation_that_fails_is_done_again_in_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = settings(tmp_path) | {"train.eval_every": 2, "model.seq_len": 64}
    whole = Trainer("tiny", root=tmp_path / "whole", **keys).fit()
    real, sizes = oom.evaluate, list[int]()

    def scarce(model: Any, batches: Any, *rest: Any) -> Any:
        sizes.append(batches.sequences)
        if batches.sequences > 128:
            raise MemoryError
        return real(model, batches, *rest)

    monkeypatch.setattr(oom, "evaluate", scarce)

    def crash(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        Trainer("tiny", root=tmp_path / "runs", listeners=[crash], **keys).fit()
    monkeypatch.undo()
    again = Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    (told,) = incidents(again)
    assert (told["step"], told["eval_tokens"], told["said"]) == (2, [16384, 8192], "MemoryError")
    assert sizes == [256, 128, 128]
    assert same_tensors(again, whole)
    assert losses(again) == pytest.approx(losses(whole), rel=1e-5)
    newest, _ = store.newest(again.checkpoints)
    assert newest is not None
    assert newest.state["progress"]["eval_tokens"] == 8192


def test_what_has_no_smaller_pieces_is_beyond_repair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(*_: Any, **__: Any) -> None:
        raise MemoryError

    keys = settings(tmp_path)
    monkeypatch.setattr("lumina.training.setup.train_step", scarce)
    with pytest.raises(OutOfMemory, match=r"out of memory in timing a step: MemoryError(.|\n)*train.micro_batch"):
        Trainer("tiny", root=tmp_path / "runs", **{key: value for key, value in keys.items() if key != "train.steps"},
                **{"train.time": 2}).fit()  # fmt: skip
    monkeypatch.setattr("lumina.training.setup.build_model", scarce)
    with pytest.raises(OutOfMemory, match=r"in building the model(.|\n)*lumina presets"):
        Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    assert not (tmp_path / "runs").exists()  # a model that cannot be built is no run
    monkeypatch.undo()
    monkeypatch.setattr("lumina.training.course.Course.observe", scarce)
    with pytest.raises(OutOfMemory, match=r"in the run: MemoryError(.|\n)*lumina resume"):
        Trainer("tiny", root=tmp_path / "runs", **keys).fit()


def test_word_of_an_evaluation_that_did_not_fit_is_taken_once(tmp_path: Path) -> None:
    """As a process among several leaves it."""

    def crash(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == 3:
            raise RuntimeError("power cut")

    keys = settings(tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        Trainer("tiny", root=tmp_path / "runs", listeners=[crash], **keys).fit()
    (run,) = (Run(path) for path in (tmp_path / "runs").iterdir())
    write_json(run.retry, {"eval_tokens": 4096, "before": 8192, "step": 2, "said": "no room"})
    resume(run)
    (told,) = incidents(run)
    assert (told["step"], told["eval_tokens"], told["said"]) == (2, [8192, 4096], "no room")
    assert not run.retry.exists()
    newest, _ = store.newest(run.checkpoints)
    assert newest is not None
    assert newest.state["progress"]["eval_tokens"] == 4096


LIMITED = """
import json, resource, sys
import torch
from lumina.run.folder import Run
from lumina.training.trainer import Trainer

torch.set_num_threads(1)

def limit(event):
    if event["t"] == "step" and event["step"] == 1:
        pages = int(open("/proc/self/statm").read().split()[0])
        most = pages * resource.getpagesize() + 64 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    if event["t"] == "incident":  # what comes now fits; threads, which saves need, are not what is tried here
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

text, root = sys.argv[1:]
keys = {"data.train": text, "model.kind": "dense", "train.steps": 3, "train.batch_tokens": 64 * 192,
        "train.micro_batch": 192, "precision.mode": "fp32", "parallel.threads": 1}
for name, listeners in (("whole", []), ("limited", [limit])):
    run = Trainer("tiny", keys, root=f"{root}/{name}", listeners=listeners).fit()
    events = [event for event in run.events() if event["t"] in ("step", "eval", "incident")]
    print(json.dumps(events))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="runs on Linux (CI's machine)",
)
def test_memory_that_really_runs_out(tmp_path: Path) -> None:
    """An allocator that fails in the middle of a backward pass, and pieces that fit."""
    command = [sys.executable, "-c", LIMITED, str(write_text(tmp_path)), str(tmp_path)]
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # to the system as soon as it is free, so that it counts as free
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | returned)
    assert done.returncode == 0, done.stderr
    whole, limited = map(json.loads, done.stdout.splitlines())
    told = [event for event in limited if event["t"] == "incident"]
    assert told
    assert all("can't allocate memory" in event["said"] for event in told)
    assert told[0]["micro_batch"] == [192, 96]
    mine, theirs = ([event["loss"] for event in events if event["t"] != "incident"] for events in (limited, whole))
    assert len(mine) == 4
    assert mine == pytest.approx(theirs, rel=1e-5)
