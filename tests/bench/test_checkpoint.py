"""What a save costs training: told inside a run, compared inside a round, and every arm really saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lumina.bench import checkpoint as saves
from lumina.bench.harness import TOTAL, Measurement
from lumina.cli import main
from lumina.model import cost


def measured(ours: float) -> Measurement:
    """Rounds of very different length, in which each arm costs the same."""
    costs = {saves.NONE: 0.0, saves.SAVE: 1.0, saves.SYNCED: 2.0, saves.ASYNC: 1.5}
    costs |= dict(zip(saves.OURS.values(), (ours, ours + 0.1), strict=True))
    rounds = (10.0, 70.0, 20.0, 40.0, 30.0, 90.0)
    seconds = {
        name: {
            TOTAL: [*rounds],
            saves.LOST: [cost + r / 100 for r in rounds],
            saves.BLOCKED: [cost] * 6,
            saves.REST: [0.0] * 6,
        }
        | ({} if name in (saves.NONE, saves.SAVE) else {saves.ON_DISK: [2.0] * 6})
        for name, cost in costs.items()
    }
    return Measurement([], seconds, {}, {"auto": saves.OURS["inline"], "bytes": 2 << 20})


def test_lost_time_is_told_beside_that_of_no_save() -> None:
    table = {name: cells for name, *cells in saves.rows(measured(0.5))}
    assert table["no save"] == ["0.350 [0.100, 0.900]", "0.000", "0.000", "-", "-"]
    assert table["torch.save"] == ["1.350 [1.100, 1.900]", "1.000", "0.000", "-", "-"]
    assert table["ours, inline (auto)"] == ["0.850 [0.600, 1.400]", "0.500", "0.000", "2.000", "1 MiB/s"]


def test_lost_are_what_blocks_what_slows_and_what_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = saves.Training(1, 1)
    steps = iter(([1.0, 9.0, 1.0, 1.0], [3.0, 1.0, 1.5, 1.0]))  # before, and after
    monkeypatch.setattr(training, "_steps", lambda count: next(steps))
    clock = iter((0.0, 20.0, 20.5, 40.0, 42.0))  # start, save, its end, the last step's, all of it
    monkeypatch.setattr("lumina.bench.checkpoint.time.perf_counter", lambda: next(clock))
    parts = training.arm("any", lambda *_: lambda: 7.0, 8, tmp_path / "saves").build()()
    assert parts == {TOTAL: 42.0, saves.LOST: 5.0, saves.BLOCKED: 0.5, saves.REST: 2.0, saves.ON_DISK: 7.0}


@pytest.mark.parametrize(("ours", "verdicts"), [(0.5, ["met"] * 3), (1.2, ["NOT met", "met", "met"])])
def test_the_bar_is_less_than_each_peer_and_the_other_way(ours: float, verdicts: list[str]) -> None:
    assert [verdict for *_, verdict in saves.bars(measured(ours))] == verdicts


@pytest.mark.parametrize("millions", saves.SHAPES)
def test_the_states_have_the_size_that_they_are_called_by(millions: int) -> None:
    assert cost.count(saves.configure(millions, 1).model).total == pytest.approx(millions * 1e6, rel=0.05)


def test_every_arm_saves_and_the_report_keeps_the_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lumina.compat.usable_cores", lambda: 1)
    monkeypatch.setattr("lumina.bench.harness.MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr("lumina.bench.harness.COPY_BYTES", 1 << 16)
    command = ["bench", "checkpoint", "--millions", "1", "--rounds", "1", "--steps", "2", "--json"]
    folder, out = tmp_path / "saves", tmp_path / "reports"
    assert main([*command, "--folder", str(folder), "--out", str(out)]) == 0
    made = json.loads(capsys.readouterr().out)
    assert not folder.exists()
    for one in made.values():
        arms = one["arms"]
        assert set(arms) >= {saves.NONE, saves.SAVE, saves.SYNCED, saves.ASYNC, *saves.OURS.values()}
        assert one["about"]["bytes"] == pytest.approx(12e6, rel=0.05)
        assert all(arm["seconds"][TOTAL][0] > 0 for arm in arms.values())
    (page,) = out.glob("*.md")
    assert "costs less than torch.save" in page.read_text()


def test_a_folder_that_exists_is_not_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "checkpoint", "--folder", str(tmp_path)]) == 2
    assert "would be deleted" in capsys.readouterr().err
    assert main(["bench", "checkpoint", "--millions", "7", "--folder", str(tmp_path / "new")]) == 2
    assert "use one of: 1, 10, 100" in capsys.readouterr().err
