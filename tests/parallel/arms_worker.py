"""What each of two processes does: a plain run, and one that tries arms and goes back, which must be the same.

arms_worker.py ROOT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from forks import WHY, act, request, require_equal

from lumina.config.overlay import Overlay
from lumina.parallel.world import join
from lumina.training.controls import SessionControls
from lumina.training.trainer import Trainer


def try_and_go_back(controls: SessionControls) -> None:
    controls.snapshot()
    with controls.fork(1.0) as fork:
        control, placebo = (fork.run(name, [], 3, 2) for name in ("control", "placebo"))
        half = fork.run("half", [Overlay("a", "lr.scale", 0.5, 5)], 3, 2, hold=True)
    assert control.losses == placebo.losses
    assert control.heldout == placebo.heldout != half.heldout
    act(patch, {7: lambda controls: controls.rollback(WHY, 4)})  # in memory


if __name__ == "__main__":
    root, world = Path(sys.argv[1]), join()
    keys = request(root)
    plain = Trainer("tiny", root=root / "plain", **keys).fit()
    with pytest.MonkeyPatch.context() as patch:
        act(patch, {4: try_and_go_back, 9: lambda controls: controls.rollback(WHY, 3)})  # on disk
        tried = Trainer("tiny", root=root / "tried", **keys).fit()
    if world.main:
        require_equal(plain, tried)
        events = [json.loads(line) for line in tried.event_log.read_text().splitlines()]
        assert [event["parent_step"] for event in events if event["t"] == "run"] == [None, 4, 3]
