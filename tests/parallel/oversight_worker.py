"""What each of two processes does: a run that nobody watches, and one whose main process thinks and both act."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import WHY, act, request, require_equal
from trials import HEARD, STEPS, keys, plant, told

from lumina.config.overlay import Overlay
from lumina.orchestrator.protocol import Controls, Observation, Replay
from lumina.parallel.world import join
from lumina.training import oversight
from lumina.training.controls import SessionControls
from lumina.training.trainer import Trainer


class Thinker:
    """Tries arms, takes a step again, goes back, and fails."""

    found: list[Replay | None]
    heard: list[int]

    calm = True

    def __init__(self, mode: str, *_: object) -> None:
        self.back = False

    def learn(self, taught: Any) -> None:
        pass

    def pending(self, step: int) -> bool:
        return False

    def forecast(self, event: dict[str, Any]) -> None:
        pass

    def observe(self, observation: Observation) -> None:
        assert observation.broken == ()
        Thinker.heard.append(observation.step)

    def looked(self, look: Any) -> None:
        assert look.broken == ()

    def between(self, controls: Controls) -> None:
        if controls.step == 6:
            Thinker.found.append(controls.replay(controls.step))
            with controls.fork(1.0) as fork:
                fork.run("half", [Overlay("a", "lr.scale", 0.5, 7)], 2, 1, hold=True)
        if controls.step == 7 and not self.back:
            self.back = True
            controls.rollback(WHY, 4)
        if controls.step == 8:
            with controls.fork(1.0) as fork:
                fork.run("third", [Overlay("a", "lr.scale", 0.3, 9)], 1, 1)
                raise ValueError("planted")

    def return_to(self, packed: Any, by_hand: bool) -> None:
        assert packed == {}

    def pack(self) -> dict[str, Any]:
        return {}


def main(root: Path) -> None:
    world = join()
    Thinker.found, Thinker.heard = [], []
    keys = request(root) | {"orchestrator.snapshot_every": 4}
    plain = Trainer("tiny", root=root / "plain", **keys, **{"orchestrator.mode": "off"}).fit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oversight, "Orchestrator", Thinker)
        watched = Trainer("tiny", root=root / "watched", **keys, **{"orchestrator.mode": "act"}).fit()
    if world.main:
        require_equal(plain, watched, watched=False)
        assert Thinker.heard == [1, 2, 3, 4, 5, 6, 4, 5, 6, 7]
        events = [json.loads(line) for line in watched.event_log.read_text().splitlines()]
        assert [event["parent_step"] for event in events if event["t"] == "run"] == [None, 4]
        assert [(e["step"], e["kind"]) for e in events if e["t"] == "incident"] == [(8, oversight.KIND)]
    else:
        assert Thinker.heard == []
    assert [found.same for found in Thinker.found if found] == [True, True] * world.main
    replicas(root, world.rank)
    trials(root, world.main)


def trials(root: Path, main: bool) -> None:
    """Arms are taken by both in step: what won is the run that had it, what did not the run that never tried."""
    wanted = keys(root, "moe")
    alone = Trainer("tiny", root=root / "alone", **keys(root, "moe", orchestrator__mode="off")).fit()
    with pytest.MonkeyPatch.context() as patch:
        act(patch, {HEARD + 1: lambda controls: controls.overlay(WHY, "lr.scale", 2.0)})
        laid = Trainer("tiny", root=root / "laid", **keys(root, "moe", orchestrator__mode="off")).fit()
    for winner, same in (("", alone), ("lr-2", laid)):
        with pytest.MonkeyPatch.context() as patch:
            plant(patch, winner)
            run = Trainer("tiny", root=root / f"tried {winner}", **wanted).fit()
        if main:
            require_equal(same, run, watched=False, steps=STEPS)
            (verdict,) = told(list(run.events()), "trial", kind="verdict")
            assert verdict["winner"] == (winner or None)
            assert verdict["placebo"] is not None
            assert verdict["void"] == ""


def replicas(root: Path, rank: int) -> None:
    """One process whose router biases are others is told at the next look."""

    def part(controls: SessionControls) -> None:
        if rank == 1:
            with torch.no_grad():
                controls.course.parts.model.moes[0].router.bias_E.add_(1e-4)

    keys = request(root, "moe", orchestrator__mode="advise")
    with pytest.MonkeyPatch.context() as patch:
        act(patch, {6: part})
        run = Trainer("tiny", root=root / "parted", **keys).fit()
    if rank == 0:
        said = {event["step"]: event["broken"] for event in run.events() if event["t"] == "probe" and "broken" in event}
        assert said == {8: ["replicas: processes 1 hold other values than process 0"]}
