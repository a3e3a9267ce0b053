"""What the orchestrator hears, that its state goes on with the run, and that nothing it does wrong harms training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forks import STEPS, WHY, crash, request, require_equal, trained
from support import KINDS

from lumina.config.overlay import Overlay
from lumina.errors import UserError
from lumina.events import read_events
from lumina.orchestrator.orchestrator import Emit, Orchestrator
from lumina.orchestrator.protocol import Controls, Look, Observation
from lumina.orchestrator.signals import Facts
from lumina.run.folder import Run
from lumina.training import oversight
from lumina.training.invariants import Invariants
from lumina.training.probe import Probe
from lumina.training.trainer import Trainer, resume


class Spy:
    """An orchestrator that remembers what it hears, and fails or acts where a test wants it."""

    heard: list[Any]
    fails: dict[str, int]

    calm = True

    def __init__(self, mode: str, facts: Facts, emit: Emit) -> None:
        self.mode, self.count = mode, 0

    def learn(self, taught: Any) -> None:
        pass

    def pending(self, step: int) -> bool:
        return False

    def forecast(self, event: dict[str, Any]) -> None:
        pass

    def _heard(self, what: str, step: int, item: Any) -> None:
        Spy.heard.append(item)
        if Spy.fails.get(what) == step:
            raise ValueError("planted")

    def observe(self, observation: Observation) -> None:
        self.count += 1
        self._heard("observe", observation.step, observation)

    def looked(self, look: Look) -> None:
        self._heard("looked", look.step, look)

    def between(self, controls: Controls) -> None:
        self._heard("between", controls.step, controls.step)
        if Spy.fails.get("fork") == controls.step:
            with controls.fork(1.0) as fork:
                fork.run("half", [Overlay("half", "lr.scale", 0.5, controls.step + 1)], 2, 1)
                raise ValueError("planted")
        if Spy.fails.get("undone") == controls.step:
            with pytest.raises(UserError):
                controls.undo(WHY, "nothing")

    def pack(self) -> dict[str, Any]:
        self._heard("pack", self.count, "pack")
        return {"count": self.count}

    def unpack(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self._heard("unpack", self.count, "unpack")


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> type[Spy]:
    Spy.heard, Spy.fails = [], {}
    monkeypatch.setattr(oversight, "Orchestrator", Spy)
    return Spy


def keys(folder: Path, kind: str = "dense", **changes: Any) -> dict[str, Any]:
    return request(folder, kind, **{"orchestrator__mode": "act", "orchestrator__snapshot_every": 2} | changes)


def incidents(run: Run) -> list[tuple[int, str, str]]:
    return [(e["step"], e["kind"], e.get("error", "")) for e in run.events() if e["t"] == "incident"]


@pytest.mark.parametrize("kind", KINDS)
def test_watched_and_not_watched_are_one_run_to_the_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for mode in ("off", "act"):
        asked = keys(tmp_path, kind, orchestrator__mode=mode)
        runs.append(trained(tmp_path / mode, asked, monkeypatch))
    require_equal(*runs, watched=False)
    assert incidents(runs[1]) == []


def test_each_step_is_heard_one_step_later_and_each_look_at_once(
    spy: type[Spy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path, keys(tmp_path, "hybrid"), monkeypatch)
    order = [one if isinstance(one, int) else f"{type(one).__name__} {one.step}" for one in spy.heard if one != "pack"]
    wanted: list[Any] = []
    for step in range(1, STEPS + 1):
        wanted += [f"Observation {step - 1}"] * (step > 1) + [f"Look {step}"] * (step % 2 == 0 and step < STEPS)
        wanted.append(step)
    assert order == wanted
    told = [event for event in run.events() if event["t"] == "step"][:-1]
    seen = [one for one in spy.heard if isinstance(one, Observation)]
    assert [(one.loss, one.grad_norm, one.balance, one.agreement) for one in seen] == [
        (event["loss"], event["grad_norm"], event["bal"], event["agree"]) for event in told
    ]
    assert [(one.batch, one.tokens) for one in seen] == [(step - 1, step * 256) for step in range(1, STEPS)]
    assert len({one.content for one in seen}) == STEPS - 1
    for one in seen:
        assert 0 < one.update_ratio < 1
        assert 0 < one.adam_rms < 4
        assert 0 < one.grad_embed < one.grad_norm
        assert one.grad_router is not None
        assert 0 < one.grad_router < one.grad_norm
        assert one.log_z > 0


@pytest.mark.parametrize(
    ("what", "step"), [("observe", 5), ("looked", 6), ("between", 5), ("pack", 5), ("fork", 5), ("unpack", 5)]
)
def test_what_fails_in_it_ends_it_and_leaves_training_untouched(
    what: str, step: int, spy: type[Spy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = keys(tmp_path)
    whole = trained(tmp_path / "whole", {**asked, "orchestrator.mode": "off"}, monkeypatch)
    spy.fails = {what: step}
    if what == "unpack":
        with pytest.raises(RuntimeError, match="power cut"):
            trained(tmp_path / "failed", asked, monkeypatch, {8: crash})
        run = resume(Run(next((tmp_path / "failed").iterdir())))
    else:
        run = trained(tmp_path / "failed", asked, monkeypatch)
    require_equal(whole, run, watched=False)
    ((at, kind, error),) = incidents(run)
    assert kind == oversight.KIND
    assert error.startswith("ValueError: planted (in _heard, line" if what != "fork" else "ValueError: planted (in ")
    assert at == (6 if what in ("observe", "pack", "unpack") else step)
    last = [one for one in spy.heard if isinstance(one, int)][-1]
    assert last <= (8 if what == "unpack" else 6)  # it was not asked again


@pytest.mark.parametrize(
    ("of", "name", "step"), [(Probe, "__call__", 2), (Invariants, "at_look", 2), (Invariants, "after_step", 0)]
)
def test_a_check_that_fails_is_the_last_and_leaves_training_untouched(
    of: type, name: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = keys(tmp_path)
    nobody = {"orchestrator.mode": "off", "orchestrator.probe_every": 0}
    whole = trained(tmp_path / "whole", asked | nobody, monkeypatch)
    calls: list[None] = []

    def fails(*_: Any) -> None:
        calls.append(None)
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(of, name, fails)
    run = trained(tmp_path / "failed", asked, monkeypatch)
    require_equal(whole, run, watched=False)
    ((at, kind, error),) = incidents(run)
    assert (at, kind, len(calls)) == (step, "checks failed", 1)
    assert error.startswith("OutOfMemoryError: planted (in fails, line")


def test_its_state_goes_on_with_the_run(spy: type[Spy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = keys(tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        trained(tmp_path, asked, monkeypatch, {8: crash})
    run = Run(next(tmp_path.glob("tiny-*")))
    spy.heard.clear()
    resume(run)
    assert spy.heard[0] == "unpack"
    first = next(one for one in spy.heard if isinstance(one, Observation))
    assert first.step == 6  # the checkpoint of step 6 holds what was observed of 5, and the metrics of 6
    assert (first.batch, len(first.content)) == (5, 16)


def test_an_action_that_is_refused_is_its_own_to_hear(
    spy: type[Spy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy.fails = {"undone": 5}
    assert incidents(trained(tmp_path, keys(tmp_path), monkeypatch)) == []


def test_off_builds_none_of_it(spy: type[Spy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spy, "__init__", crash)
    points: list[int] = []
    at = {6: lambda controls: points.append(len(controls.session.ways.points))}
    run = trained(tmp_path, keys(tmp_path, orchestrator__mode="off"), monkeypatch, at)
    assert points == [0]
    assert spy.heard == []
    assert list(read_events(run.event_log))[-1]["reason"] == "done"


def test_the_mode_may_change_when_a_run_goes_on(
    spy: type[Spy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        trained(tmp_path, keys(tmp_path, orchestrator__mode="off"), monkeypatch, {8: crash})
    run = Run(next(tmp_path.glob("tiny-*")))
    assert spy.heard == []
    resume(run, settings=["orchestrator.mode=act"])
    assert [one.step for one in spy.heard if isinstance(one, Observation)] == [6, 7, 8, 9]
    assert incidents(run) == []


def test_a_run_with_restore_points_keeps_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: dict[int, list[int]] = {}

    def note(step: int) -> Any:
        return lambda c: steps.__setitem__(step, [point.state["progress"].step for point in c.session.ways.points])

    trained(tmp_path, keys(tmp_path), monkeypatch, {step: note(step) for step in (1, 2, 5, 8)})
    assert steps == {1: [0], 2: [0, 2], 5: [2, 4], 8: [6, 8]}
    with pytest.raises(UserError, match=r"orchestrator\.mode"):
        Trainer("tiny", root=tmp_path, **keys(tmp_path, orchestrator__mode="on"))


def test_batches_of_one_sequence_that_come_again_in_each_epoch_are_no_fault(tmp_path: Path) -> None:
    """40 windows, four epochs, one window a step: by chance three in a row come as they came before."""
    path = tmp_path / "few.txt"
    path.write_text("\n\n".join(f"{i} " + " ".join(str(i * j % 97) for j in range(9)) for i in range(90)))
    asked = {"model.kind": "dense", "model.layers": 1, "train.steps": 160, "train.batch_tokens": 64, "train.seed": 7}
    asked |= {"data.train": [str(path)], "checkpoint.every": 0, "orchestrator.mode": "act"}
    run = Trainer("tiny", asked | {"orchestrator.snapshot_every": 20}, root=tmp_path / "runs").fit()
    assert next(e for e in run.events() if e["t"] == "run")["data"]["windows"] < 60
    assert [e for e in run.events() if e["t"] == "decision" and e["rule"] in ("loader", "invariant")] == []


def test_a_state_in_which_calm_cannot_be_asked_ends_the_orchestrator_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Orchestrator, "calm", property(crash))
    run = trained(tmp_path, keys(tmp_path), monkeypatch)
    assert run.finished
    assert [kind for _, kind, _ in incidents(run)] == [oversight.KIND]
