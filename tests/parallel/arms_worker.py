"""What each of two processes does: a plain run, and one that tries arms and goes back, which must be the same.

So must be what it may not do, for the disk of one process refuses it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
from forks import WHY, act, request, require_equal
from support import full

from lumina.config.overlay import Overlay
from lumina.errors import DiskRefused
from lumina.parallel.world import join
from lumina.training.controls import SessionControls
from lumina.training.session import Session
from lumina.training.trainer import Trainer


@contextmanager
def refused(session: Session) -> Iterator[None]:
    """The log of the main process meets a full disk, and all processes hear of it."""
    with full(session.events) if session.world.main else nullcontext(), pytest.raises(DiskRefused, match="No space"):
        yield


def meet_a_full_disk(controls: SessionControls) -> None:
    """Nothing is done then, in any process."""
    session = controls.session
    session.secure()
    session.course.observe()
    with refused(session):
        controls.overlay(WHY, "lr.scale", 0.5)
    with refused(session):
        controls.rollback(WHY, 3)
    with refused(session):
        controls.stop(WHY)
    assert (controls.step, controls.overlays, session.state.attempt, session.ending) == (6, (), 0, "")
    if session.world.main:
        assert session.events.attempt == 0
        (session.run.path / "trials" / "blocked.jsonl").mkdir()
    with controls.fork(1.0) as fork, pytest.raises(DiskRefused, match=r"blocked\.jsonl"):
        fork.run("blocked", [], 2, 0)


def try_and_go_back(patch: pytest.MonkeyPatch, controls: SessionControls) -> None:
    controls.snapshot()
    with controls.fork(1.0) as fork:
        control, placebo = (fork.run(name, [], 3, 2) for name in ("control", "placebo"))
        half = fork.run("half", [Overlay("a", "lr.scale", 0.5, 5)], 3, 2, hold=True)
    assert control.losses == placebo.losses
    assert control.heldout == placebo.heldout != half.heldout
    act(patch, {7: lambda controls: controls.rollback(WHY, 4)})  # in memory


def main(root: Path) -> None:
    world = join()
    keys = request(root)
    plain = Trainer("tiny", root=root / "plain", **keys).fit()
    with pytest.MonkeyPatch.context() as patch:
        on_disk = partial(SessionControls.rollback, why=WHY, step=3)
        act(patch, {4: partial(try_and_go_back, patch), 6: meet_a_full_disk, 9: on_disk})
        tried = Trainer("tiny", root=root / "tried", **keys).fit()
    if world.main:
        require_equal(plain, tried)
        events = [json.loads(line) for line in tried.event_log.read_text().splitlines()]
        assert [event["parent_step"] for event in events if event["t"] == "run"] == [None, 4, 3]
