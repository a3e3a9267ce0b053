"""Runs that hold a trial: a detector that hears something once, arms as short as can be, and a verdict of one's choice.

What the verdict is made of is measured as always: only what is concluded from it may be given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forks import request

from lumina.orchestrator import trial
from lumina.orchestrator.finding import Detector, Finding
from lumina.orchestrator.signals import Signals
from lumina.orchestrator.trial import Judged, judge
from lumina.orchestrator.trying import Trial

HEARD, STEPS = 14, 60  # what is heard of step 14 is tried behind step 15
MEMORY = 10  # steps, of the optimizer: as long as an arm, for none may be shorter
PROBE = 3  # steps: shorter than a trial's own


def heard(signals: Signals) -> Finding | None:
    """The loss stands still, says it; it does not."""
    if signals.step != HEARD:
        return None
    return Finding("plateau", HEARD, HEARD, "planted", False, {"lr": 1.0})


def keys(folder: Path, kind: str = "hybrid", **more: Any) -> dict[str, Any]:
    """A run of which trials take as much as they want."""
    usual = {"train__steps": STEPS, "train__betas": [0.9, 1 - 5 / MEMORY], "orchestrator__mode": "act"}
    usual |= {"orchestrator__trial__budget": 10, "checkpoint__every": 9, "train__decay": 0.1}
    return request(folder, kind, **(usual | more))


def plant(monkeypatch: pytest.MonkeyPatch, winner: str = "", loses: bool | None = False) -> None:
    """From now on runs hear it; the candidate of this name wins, or none. `loses`: not over twice the steps; None: it
    is measured."""
    found = Detector("plateau", heard)
    monkeypatch.setattr("lumina.orchestrator.orchestrator.DETECTORS", (found,))
    monkeypatch.setattr(trial, "SHORTEST", 3)
    monkeypatch.setattr(trial, "LONGEST", MEMORY)
    monkeypatch.setattr(trial, "PROBE", PROBE / MEMORY)

    def decided(name: str, control: Sequence[float], ends: Sequence[float], candidates: int) -> Judged:
        return replace(judge(name, control, ends, candidates), won=name == winner)

    monkeypatch.setattr("lumina.orchestrator.trying.judge", decided)
    monkeypatch.setattr("lumina.orchestrator.trying.winner", lambda judged: next((j for j in judged if j.won), None))
    if loses is not None:
        monkeypatch.setattr(Trial, "goes_on", lambda self, fork: -9.0 if loses else 9.0)


def told(events: Sequence[dict[str, Any]], type: str, **fields: Any) -> list[dict[str, Any]]:
    """The events of a type with these fields."""
    return [e for e in events if e["t"] == type and all(e.get(key) == value for key, value in fields.items())]
