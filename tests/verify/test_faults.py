"""What is wrong with the plan breaks no rule of a sound run, and an overlay on top mends it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lumina.config.overlay import Overlay
from lumina.training.session import Session
from lumina.training.trainer import stand
from lumina.verify.gauntlet.cases import CASES

sys.path.append(str(Path(__file__).parents[1] / "training"))

from forks import request

AT = 5  # step from which on it is wrong, of 10


def begun(folder: Path, name: str, kind: str, *overlays: Overlay, **keys: Any) -> Session:
    """A session that trained to its end with a fault in it."""
    folder.mkdir(exist_ok=True)
    session = stand("tiny", request(folder, kind, orchestrator__mode="advise", **keys), folder / "runs")
    case = CASES[name]
    assert case.plant
    case.plant(session, AT, 0, case.size)
    session.state.overlays = overlays
    session.train()
    return session


def rates(session: Session) -> list[float]:
    """By step, over what was planned without the fault."""
    plain = type(session.course).planned
    return [e["lr"] / plain(session.course, e["step"])["lr"] for e in session.run.events() if e["t"] == "step"]


def broken(session: Session) -> list[str]:
    return [text for event in session.run.events() for text in event.get("broken", ())]


@pytest.mark.parametrize("factor", [10.0, 0.02])
def test_a_wrong_rate_is_the_plan(factor: float, tmp_path: Path) -> None:
    session = begun(tmp_path, "lr high" if factor > 1 else "lr low", "dense")
    assert rates(session) == pytest.approx([1.0] * 4 + [factor] * 6)
    assert broken(session) == []


def test_an_overlay_mends_a_wrong_rate(tmp_path: Path) -> None:
    session = begun(tmp_path, "lr high", "dense", Overlay("mend", "lr.scale", 0.1, 8))
    assert rates(session) == pytest.approx([1.0] * 4 + [10.0] * 3 + [1.0] * 3)
    assert broken(session) == []


def test_a_wrong_balance_is_the_plan(tmp_path: Path) -> None:
    session = begun(tmp_path, "over-balance", "moe", Overlay("mend", "balance", 0.0, 8))
    assert [session.course.values(step)["balance"] for step in (4, 5, 7, 8)] == [0.0, 10.0, 10.0, 0.0]
    assert {moe.router.balance for moe in session.parts.model.moes} == {0.0}
    assert broken(session) == []


def test_routers_collapse_and_biases_rest_as_planned(tmp_path: Path) -> None:
    session = begun(tmp_path, "unbalanced", "moe")
    assert [session.course.values(step)["bias_rate"] for step in (4, 5)] == [1e-3, 0.0]
    router = session.parts.model.moes[0].router
    norms = router.weight.detach().norm(dim=1)
    assert norms[0] > 10 * norms[1:].max()
    assert router.fraction_E[0] > 0.45  # of the assignments, two a token
    assert broken(session) == []


def test_experts_that_are_dead_get_nothing_and_their_bias_is_told(tmp_path: Path) -> None:
    session = begun(tmp_path, "dead experts", "moe")
    for router in (moe.router for moe in session.parts.model.moes):
        assert sorted(router.fraction_E.tolist()) == [0.0, 0.0, 0.5, 0.5]
    assert {text.partition(": ")[0] for text in broken(session)} == {"router bias"}


def test_a_predictor_that_rests_is_told_and_one_that_was_asked_to_learn_is_not(tmp_path: Path) -> None:
    session = begun(tmp_path / "alone", "frozen predictor", "mod")
    assert {text.partition(": ")[0] for text in broken(session)} == {"predictor"}
    mended = begun(tmp_path / "mended", "frozen predictor", "mod", Overlay("mend", "predictor", 1.0, AT))
    assert broken(mended) == []
