"""A run that was left on trial is the run that never was; a placebo is its control; the winner's steps are kept."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import STEPS, WHY, act, crash, history, request, require_equal, trained

from lumina.checkpoint import retention
from lumina.config.overlay import KEYS, Overlay
from lumina.errors import DiskRefused, UserError
from lumina.orchestrator.protocol import Outcome
from lumina.run.folder import Run
from lumina.training.controls import SessionControls
from lumina.training.endings import Stopped
from lumina.training.trainer import Trainer, resume

VARIANTS: list[dict[str, Any]] = [
    {"kind": "moe", "train__optimizer": "adamw"},
    {"kind": "mod", "model__mod__anneal": 6},
    {"kind": "hybrid", "precision__mode": "fp16"},
    {"kind": "dense", "data__mode": "hybrid_sequential", "data__base_ratio": 0.5},
]


def scaled(factor: float, begin: int = 5, end: int | None = None) -> list[Overlay]:
    return [Overlay("candidate", "lr.scale", factor, begin, end)]


def trial(controls: SessionControls) -> list[Outcome]:
    """Arms of several kinds from one place, a diverging one among them; with and without a probe."""
    with controls.fork(step_seconds=0.5) as fork:
        return [
            fork.run("control", [], 3, 2, hold=True),
            fork.run("placebo", [], 3, 2),
            fork.run("half", scaled(0.5), 3, 2, hold=True),
            fork.run("broken", scaled(1e20), 4, 0),
            fork.run("other order", [Overlay("o", "data.order", 1, 5)], 3, 2),
        ]


@pytest.fixture
def unbounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KEYS, "lr.scale", KEYS["lr.scale"]._replace(high=1e30))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(str(x) for x in v.values()))
def test_a_run_with_arms_in_the_middle_is_the_run_without(
    variant: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbounded: None
) -> None:
    monkeypatch.setattr("lumina.training.precision.FIRST_SCALE", 2.0**22)  # fp16 overflows in some steps
    outcomes: list[Outcome] = []
    keys = request(tmp_path, **variant)
    whole = trained(tmp_path / "whole", keys, monkeypatch)
    run = trained(tmp_path / "arms", keys, monkeypatch, {4: lambda controls: outcomes.extend(trial(controls))})
    require_equal(whole, run)
    control, placebo, half, broken, other = outcomes
    assert (placebo.losses, placebo.heldout) == (control.losses, control.heldout)
    assert [str(loss) for loss in control.losses] == [step[3] for step in history(whole) if step[0] == "step"][4:7]
    assert half.losses[0] == control.losses[0]  # the loss of a step is that of the weights before it
    assert len({control.heldout, half.heldout, other.heldout}) == 3
    assert other.losses[0] != control.losses[0]
    assert math.isnan(broken.heldout)
    assert [outcome.seconds for outcome in outcomes] == [2.5, 2.5, 2.5, 2.0, 2.5]


def test_the_events_of_an_arm_are_in_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:
        act(patch, {4: lambda controls: fork_once(controls, [("half", scaled(0.5))])})
        run = Trainer("tiny", root=tmp_path / "runs", listeners=[heard.append], **request(tmp_path, "dense")).fit()
    lines = (run.path / "trials" / "half.jsonl").read_text().splitlines()
    told = [(event["t"], event["step"]) for event in map(json.loads, lines)]
    assert [step for type, step in told if type == "step"] == [4, 5, 6, 7, 8, 9]  # 4 was pending, and still is
    assert told[-1] == ("eval", 9)
    assert [e["step"] for e in heard if e["t"] == "step"] == list(range(1, STEPS + 1))
    rates = {event["step"]: event["lr"] for event in map(json.loads, lines) if event["t"] == "step"}
    planned = {e["step"]: e["lr"] for e in heard if e["t"] == "step"}
    shares = [round(rates[step] / planned[step], 4) for step in range(4, 10)]
    assert shares == [1, 0.5, 0.5, 0.5, 0.3333, 0.1667]


def fork_once(controls: SessionControls, arms: list[tuple[str, list[Overlay]]]) -> list[Outcome]:
    with controls.fork(1.0) as fork:
        return [fork.run(name, overlays, 3, 2) for name, overlays in arms]


def test_the_steps_of_the_winner_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that went on from an arm is the one that had its overlay laid down, without any arm."""

    def commit(controls: SessionControls) -> None:
        with controls.fork(1.0) as fork:
            fork.run("control", [], 3, 2, hold=True)
            won = fork.run("half", scaled(0.5), 3, 2, hold=True)
            fork.run("twice", scaled(2.0), 3, 2)
            controls.commit(WHY, fork, won)
        assert controls.step == 7
        assert [one.id for one in controls.overlays] == ["candidate"]

    keys = request(tmp_path)
    run = trained(tmp_path / "arms", keys, monkeypatch, {4: commit})
    laid = trained(tmp_path / "laid", keys, monkeypatch, {4: lambda controls: controls.overlay(WHY, "lr.scale", 0.5)})
    require_equal(laid, run)
    crashed = tmp_path / "crashed"
    with monkeypatch.context() as patch:  # after the steps were kept, and before anything of them is saved
        act(patch, {4: lambda controls: (commit(controls), crash())})
        with pytest.raises(RuntimeError, match="power cut"):
            Trainer("tiny", root=crashed, **keys).fit()
    require_equal(laid, resume(Run(next(crashed.iterdir()))))


def test_a_winner_whose_overlay_begins_within_its_steps_can_be_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way back is where the arm began: nobody saved inside it."""

    def commit(controls: SessionControls) -> None:
        with controls.fork(1.0) as fork:
            controls.commit(WHY, fork, fork.run("later", scaled(0.5, begin=6), 3, 2, hold=True))
        assert retention.pins(controls.session.run.checkpoints) == {4: "before candidate"}
        act(monkeypatch, {9: undo})

    def undo(controls: SessionControls) -> None:
        controls.undo(WHY, "candidate")
        assert controls.step == 4
        assert retention.pins(controls.session.run.checkpoints) == {}

    keys = request(tmp_path, "dense")
    whole = trained(tmp_path / "whole", keys, monkeypatch)
    require_equal(whole, trained(tmp_path / "undone", keys, monkeypatch, {4: commit}))


@pytest.mark.parametrize("on_error", ["stop", "continue"])
@pytest.mark.parametrize("within", [False, True])
def test_a_disk_that_refuses_a_trial_s_file_ends_the_trial_or_is_said(
    within: bool, on_error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go(controls: SessionControls) -> None:
        file = controls.session.run.path / "trials" / "half.jsonl"
        with controls.fork(1.0) as fork:
            if within:
                fork.between = lambda: file.unlink(missing_ok=True)
            else:
                file.mkdir(parents=True)
            if on_error == "continue":
                assert fork.run("half", scaled(0.5), 3, 2).losses
                return
            with pytest.raises(DiskRefused, match=r"half\.jsonl"):
                fork.run("half", scaled(0.5), 3, 2)

    keys = request(tmp_path, "dense", checkpoint__on_error=on_error)
    run = trained(tmp_path / "refused", keys, monkeypatch, {4: go})
    require_equal(trained(tmp_path / "whole", keys, monkeypatch), run)
    lost = [event["error"] for event in run.events() if event.get("kind") == "log lost"]
    assert [re.sub(r"\d+", "N", error.rpartition(": ")[2]) for error in lost] == (
        [] if on_error == "stop" else ["N" if within else "Is a directory"]
    )


def test_what_cannot_be_an_arm_or_a_winner_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(controls: SessionControls) -> None:
        with controls.fork(1.0) as fork:
            for steps, probe in ((5, 2), (0, 0), (7, 0), (0, 7), (2, -1)):
                with pytest.raises(UserError, match="the run has 6 left"):
                    fork.run("long", [], steps, probe)
            with pytest.raises(UserError, match="out of bounds"):
                fork.run("wild", scaled(1000.0), 2, 2)
            lost = fork.run("half", scaled(0.5), 2, 2)
            with pytest.raises(UserError, match="was not held"):
                controls.commit(WHY, fork, lost)
            other = fork.run("order", [Overlay("o", "data.order", 1, 5)], 2, 0, hold=True)
            with pytest.raises(UserError, match=r"data\.order"):  # its batches would be read twice
                controls.commit(WHY, fork, other)

    keys = request(tmp_path, "dense")
    whole = trained(tmp_path / "whole", keys, monkeypatch)
    require_equal(whole, trained(tmp_path / "refused", keys, monkeypatch, {4: refused}))


@pytest.mark.parametrize("caught", [True, False])
def test_what_goes_wrong_in_an_arm_is_left_in_it(caught: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step, in the evaluation or between two: the run is where it was, and the caller hears of it."""

    def plain_state(controls: SessionControls) -> tuple[Any, ...]:
        course = controls.course
        capacity = [router.capacity for router in course.parts.model.routers]
        pending = course.state.pending.read() if course.state.pending else None
        return deepcopy((course.state.progress, pending, course.state.overlays, course.last_eval, capacity))

    def go(controls: SessionControls) -> None:
        before = {name: tensor.clone() for name, tensor in controls.state.tensors().items()}
        state = plain_state(controls)
        for place in ("lumina.training.oom.apply", "lumina.training.oom.evaluate"):
            with controls.fork(1.0) as fork, monkeypatch.context() as patch:
                fork.run("sound", [], 1, 0)
                patch.setattr(place, crash)
                with pytest.raises(RuntimeError, match="power cut"):
                    fork.run("broken", scaled(2.0), 3, 2, hold=True)
            assert plain_state(controls) == state
        for name, tensor in controls.state.tensors().items():
            assert torch.equal(tensor, before[name]), name
        if not caught:
            with controls.fork(1.0) as fork:
                fork.between = crash  # type: ignore[assignment]
                fork.run("killed", scaled(2.0), 3, 2)

    keys = request(tmp_path, model__mod__anneal=6)  # the arms go on with another depth capacity
    whole = trained(tmp_path / "whole", keys, monkeypatch)
    if caught:
        require_equal(whole, trained(tmp_path / "caught", keys, monkeypatch, {4: go}))
        return
    with pytest.raises(RuntimeError, match="power cut"):
        trained(tmp_path / "crashed", keys, monkeypatch, {4: go})
    require_equal(whole, resume(Run(next((tmp_path / "crashed").iterdir()))))


def test_a_signal_ends_an_arm_and_saves_the_run_where_it_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def go(controls: SessionControls) -> None:
        with controls.fork(1.0) as fork:
            fork.run("before", [], 1, 0)
            os.kill(os.getpid(), signal.SIGTERM)
            fork.run("stopped", scaled(2.0), 5, 0)

    keys = request(tmp_path, "dense")
    whole = trained(tmp_path / "whole", keys, monkeypatch)
    with pytest.raises(Stopped) as stopped:
        trained(tmp_path / "stopped", keys, monkeypatch, {4: go})
    assert stopped.value.step == 4
    require_equal(whole, resume(stopped.value.run))


KILLED = """
import os, signal, sys
sys.path[:0] = {paths}
from pytest import MonkeyPatch
from forks import act, request
from pathlib import Path
from lumina.config.overlay import Overlay
from lumina.training.trainer import Trainer

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def go(controls):
    with controls.fork(1.0) as fork:
        fork.run("control", [], 3, 2)
        steps = iter([lambda: None, lambda: None, die])
        fork.between = lambda: next(steps)()
        fork.run("half", [Overlay("a", "lr.scale", 0.5, 5)], 3, 2)

act(MonkeyPatch(), {{4: go}})
Trainer("tiny", root=Path({root!r}), **request(Path({folder!r}), "dense")).fit()
"""


def test_a_kill_in_an_arm_is_resumed_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent
    root = tmp_path / "killed"
    code = KILLED.format(paths=[str(here), str(here.parent)], root=str(root), folder=str(tmp_path))
    died = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert died.returncode == -signal.SIGKILL
    run = Run(next(root.iterdir()))
    assert (run.path / "trials" / "half.jsonl").exists()
    require_equal(trained(tmp_path / "whole", request(tmp_path, "dense"), monkeypatch), resume(run))
