"""The benchmark of watching compares what it says, and its check of harm finds harm."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import KINDS, write_text

from lumina.bench import harness, orchestrator
from lumina.orchestrator.orchestrator import Orchestrator
from lumina.training.controls import SessionControls


def test_each_kind_has_both_arms_and_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(orchestrator.AT_ONCE, "tiny", 1)
    arms = orchestrator.suite("tiny", KINDS, {"data.train": str(write_text(tmp_path))})
    assert [arm.name for arm in arms] == [f"{kind} {mode}" for kind in KINDS for mode in ("bare", "act")]
    measured = harness.measure(arms[:2], rounds=2, warm=0)
    parts = measured.seconds["dense act"]
    total = [
        s + a / 100 + b / 100 for s, a, b in zip(*(parts[p] for p in ("step", "look", "restore point")), strict=True)
    ]
    assert parts["total"] == pytest.approx(total)
    ((kind, *_, bar, verdict),) = orchestrator.rows(measured, "tiny")
    assert (kind, bar) == ("dense", "<= 1.03")
    assert verdict in ("met", "missed")


def test_harm_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"data.train": str(write_text(tmp_path))}
    assert orchestrator.harm("dense", 3, keys) == ""
    between = Orchestrator.between

    def meddle(self: Orchestrator, controls: SessionControls) -> None:
        between(self, controls)
        controls.course.parts.model.norm.weight.data[0] += 1e-3

    monkeypatch.setattr(Orchestrator, "between", meddle)
    assert "norm.weight" in orchestrator.harm("dense", 3, keys)


def test_one_that_ended_costs_nothing_and_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Orchestrator, "between", fail)
    keys = {"data.train": str(write_text(tmp_path))}
    with pytest.raises(RuntimeError, match="the orchestrator ended at step 3"):
        orchestrator.harm("dense", 3, keys)
