"""A step that is taken again says whether machine, data or state is at fault, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import history, request, require_equal, trained

from lumina.data.loader import Batch, Loader
from lumina.orchestrator.diagnosis import judge
from lumina.orchestrator.protocol import Replay
from lumina.training.controls import SessionControls
from lumina.training.oom import Fitting

BATCH = Loader.batch
VARIANTS: list[dict[str, Any]] = [
    {"kind": "hybrid"},
    {"kind": "moe", "precision__mode": "fp16", "train__optimizer": "adamw"},
    {"kind": "dense", "data__mode": "hybrid_sequential", "data__base_ratio": 0.5},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(str(x) for x in v.values()))
def test_the_same_step_again_is_the_same_and_the_run_is_the_run_without(
    variant: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Replay | None] = []
    keys = request(tmp_path, **variant)
    whole = trained(tmp_path / "whole", keys, monkeypatch)
    keys["orchestrator.snapshot_every"] = 3
    at = {step: lambda controls: found.append(controls.replay(controls.step)) for step in (2, 4, 6, 7, 9)}
    run = trained(tmp_path / "again", keys, monkeypatch, at)
    require_equal(whole, run)
    losses = {step[1]: step[3] for step in history(whole) if step[0] == "step"}
    assert [one.step for one in found if one] == [1, 3, 5, 6, 8]  # the first two from the point of the start
    for one in found:
        assert one
        assert one.same
        assert str(one.again) == str(one.loss) == losses[str(one.step)]
        assert len(set(one.others)) == 3
        assert one.loss not in one.others
        stood = one.step == 1  # the restore point is that of the step before
        assert ((one.before, one.others_before) == (one.again, one.others)) is stood
        assert all(0 < other < 8 for other in (*one.others, one.heldout))


def test_the_point_before_the_last_lies_before_a_step_that_was_saved_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 6 is observed behind step 7, and there is a restore point of 6: the one of 3 is before it."""

    def look(controls: SessionControls) -> None:
        steps = [point.state["progress"].step for point in controls.session.ways.points]
        assert steps == [3, 6]
        assert (found := controls.replay(controls.step))
        assert found.step == 6

    keys = request(tmp_path, "dense", orchestrator__snapshot_every=3)
    trained(tmp_path, keys, monkeypatch, {7: look})


def test_data_hardware_and_state_look_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Replay | None] = []

    def junk(loader: Loader, i: int, *how: Any) -> Batch:
        batch = BATCH(loader, i, *how)
        noise = torch.randint(0, 260, batch.targets_BS.shape, generator=torch.Generator().manual_seed(i))
        return replace(batch, targets_BS=noise) if 14 <= i < 18 else batch

    keys = request(tmp_path, "dense", train__steps=20, train__decay=2, orchestrator__snapshot_every=5)
    keys["orchestrator.probe_every"] = 0
    at = {16: lambda controls: found.append(controls.replay(controls.step))}
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "batch", junk)
        trained(tmp_path / "data", keys, monkeypatch, at)

    def flip(controls: SessionControls) -> None:
        """A weight that a fault in the machine changed before step 15: the restore point has not seen it."""
        with torch.no_grad():
            controls.course.parts.model.norm.weight.mul_(-5)

    trained(tmp_path / "hardware", keys, monkeypatch, {14: flip, **at})
    data, hardware = found
    assert data
    assert hardware
    assert data.same
    assert data.loss > 2 * max(*data.others, data.heldout)
    assert (judge(data), judge(replace(data, again=data.heldout))) == ("data", "data")  # on either weights
    assert judge(replace(hardware, same=True)) == "any batch"
    assert (data.ahead, hardware.ahead) == (3, 0)  # batches 15 to 17 of the run's 20 are as bad
    assert not hardware.same
    assert hardware.again < hardware.loss - 0.5


def test_it_begins_before_the_fault_and_is_given_up_where_memory_does_not_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Replay | None] = []

    def short(*_: Any) -> None:
        raise MemoryError

    def ask(controls: SessionControls) -> None:
        found.append(controls.replay(4))  # the point of 6 is not before it
        found.append(controls.replay(1))
        with monkeypatch.context() as patch:
            patch.setattr(Fitting, "loss", short)
            found.append(controls.replay(4))

    keys = request(tmp_path, "dense", orchestrator__snapshot_every=3)
    whole = trained(tmp_path / "whole", keys, monkeypatch)
    run = trained(tmp_path / "asked", keys, monkeypatch, {7: ask})
    assert found[0]
    assert (found[0].step, found[0].same, found[1:]) == (6, True, [None, None])
    require_equal(whole, run)
