"""What each of two processes does: a plain run, and one that is asked by hand for everything, and undoes it all."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import act, request, require_equal

from lumina.byhand import open_run
from lumina.parallel.world import join
from lumina.run.inbox import Inbox
from lumina.training.controls import SessionControls
from lumina.training.trainer import Trainer

ASKED = [
    ("qk_clip", 1.0), ("router.reset", [0, 1]), ("expert.reseed", [1, 2]), ("optimizer.reset", None), ("skip", None),
    ("mod_capacity", 0.5), ("temperature", 2.0), ("predictor", 0.0), ("micro_batch", 1), ("decay", 4),
]  # fmt: skip


def ask(controls: SessionControls) -> None:
    if controls.session.world.main:
        for name, value in ASKED:
            open_run(controls.session.run).act(name, value)
        (Inbox(controls.session.run).folder / "broken.json").write_text("{")


def undo(controls: SessionControls) -> None:
    """All were laid over the plan behind step 4, in both processes, and hold."""
    told = [event for event in controls.session.run.events() if event["t"] == "incident"]
    assert len(controls.overlays) == len(ASKED), told
    assert all(one.begin == 5 for one in controls.overlays)
    assert controls.course.steps == 8
    if controls.session.world.main:
        for one in controls.overlays:
            open_run(controls.session.run).undo(one.id)


def main(root: Path) -> None:
    world = join()
    keys = request(root, train__warmup=2, train__decay=3)
    plain = Trainer("tiny", root=root / "plain", **keys).fit()
    with pytest.MonkeyPatch.context() as patch:
        act(patch, {4: ask, 7: undo})
        asked = Trainer("tiny", root=root / "asked", **keys).fit()
    if world.main:
        require_equal(plain, asked)
        assert len(list((asked.path / "inbox" / "refused").iterdir())) == 1
        broken = [event for event in asked.events() if event["t"] in ("step", "probe") and event.get("broken")]
        assert broken == []
