"""Faults are really faults, what rescues a run rescues it to the bit, and scores say what happened."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lumina.cli import main
from lumina.orchestrator.signals import Signals
from lumina.verify import gauntlet, report, scoring
from lumina.verify.faults import CASES, FAULTS, HEALTHY, KINDS, SOUND, TRAPS, Case, _junk
from lumina.verify.gauntlet import Arm, Result

SHORT = gauntlet.KEYS | {
    "train.steps": 140, "train.batch_tokens": 256, "model.layers": 2, "checkpoint.every": 70,
    "orchestrator.snapshot_every": 25, "orchestrator.probe_every": 20,
}  # fmt: skip
EXACT = ("nan gradient", "inf weight", "lr burst", "stuck loader")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    monkeypatch.setattr(gauntlet, "KEYS", SHORT | {"data.train": [str(text)]})
    monkeypatch.setattr(gauntlet, "FIRST", 60)
    monkeypatch.setattr(gauntlet, "WITHIN", 1)
    monkeypatch.setitem(CASES, "junk", Case("junk", "", _junk(45), frozenset({"data"})))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same words in ever another order, so that nothing repeats and little is held out."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("text") / "words.txt"
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(60)]
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(600)))
    return path


@pytest.fixture(scope="module")
def known() -> dict[str, Result]:
    """The healthy run of each kind."""
    return {}


def healthy(known: dict[str, Result], kind: str) -> Result:
    if kind not in known:
        known[kind] = gauntlet.train(Arm(HEALTHY.name, kind, 3, "off"))
    return known[kind]


@pytest.mark.parametrize("name", EXACT)
def test_what_is_taken_back_and_taken_again_is_the_healthy_run_to_the_bit(name: str, known: dict[str, Result]) -> None:
    """But for the gradient that is NaN: its step is left out, which every later loss shows."""
    kind = {"inf weight": "moe", "stuck loader": "mod"}.get(name, "dense")
    found = gauntlet.train(Arm(name, kind, 3, "act"))
    sound = healthy(known, kind)
    assert (found.loss == sound.loss) == (name != "nan gradient")
    assert abs(found.loss - sound.loss) < 0.05
    assert found.cause in CASES[name].causes
    assert found.delay is not None
    assert found.delay <= 2
    assert [one["action"] for one in found.acted] == ([] if name == "nan gradient" else ["rewind_replay"])


def test_bad_batches_are_left_out_as_far_as_they_go(known: dict[str, Result]) -> None:
    found, alone = (gauntlet.train(Arm("junk", "dense", 3, mode)) for mode in ("act", "off"))
    sound = healthy(known, "dense").loss
    assert alone.loss > sound + 0.2
    assert abs(found.loss - sound) < 0.05
    assert (found.cause, [one["action"] for one in found.acted]) == ("data", ["rewind_skip"])
    assert alone.decisions == []


@pytest.mark.parametrize("name", ["small lr burst", "moments lost", "large gradient"])
def test_what_heals_by_itself_is_left_alone(name: str, known: dict[str, Result]) -> None:
    found = gauntlet.train(Arm(name, "dense", 3, "act"))
    assert found.acted == []
    assert found.loss != healthy(known, "dense").loss  # something was done to it


def test_a_run_that_is_stopped_is_not_rescued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauntlet, "KEYS", gauntlet.KEYS | {"orchestrator.snapshot_every": 0, "checkpoint.every": 0})
    found = gauntlet.train(Arm("inf weight", "dense", 3, "act"))
    assert (found.stopped, found.loss) == ("looked", math.inf)
    assert [one["action"] for one in found.acted] == ["stop"]


def made(case: str, seed: int, loss: float, mode: str = "act", *actions: str, **more: Any) -> Result:
    arm = Arm(case, "dense", seed, mode)
    said = {"step": arm.step + 3, "kind": "act", "rule": "r", "cause": "data"}
    decisions = [said | {"action": action} for action in actions]
    return Result(arm, loss, decisions=decisions, **more)


def test_faults_are_scored_above_the_healthy_run_of_the_same_seed_if_they_hurt() -> None:
    results = [made(HEALTHY.name, seed, 2.0 + 0.1 * seed, "off") for seed in (1, 2, 3)]
    results += [made("junk", seed, loss, "off") for seed, loss in ((1, 2.7), (2, 2.3), (3, math.nan))]
    results += [made("junk", 1, 2.29, "act", "rewind_skip"), made("junk", 2, 2.41), made("junk", 3, math.inf)]
    (junk,) = gauntlet.scores(results)
    assert gauntlet.sigmas(results) == {(HEALTHY.name, "dense"): pytest.approx(0.1)}
    assert junk.excess == [pytest.approx(1.9), pytest.approx(2.1), math.inf]
    assert (junk.good, junk.right, junk.delays) == ([True, False, False], 1, [3])
    assert (junk.hurt, junk.avoided) == ([True, False, False], [pytest.approx(1 - 1.9 / 6)])
    page = scoring.page(results, "lumina gauntlet")
    assert "1.9 2.1 inf" in page
    assert "act: 1 of 3 runs with faults within 2 sigma of the healthy one (6 to 79 %)" in page
    assert "act: 1 of 1 that hurt alone rescued" in page
    assert json.loads(json.dumps(scoring.as_json(results)))["scores"][0]["hurt"] == [True, False, False]


def test_a_trap_is_left_alone_if_nothing_was_done_to_the_bit() -> None:
    results = [made("cosine", seed, 2.2, "off") for seed in (1, 2, 3, 4)]
    results += [made("cosine", 1, 2.2), made("cosine", 2, 2.2, "act", "rewind_replay", "skip_step")]
    results += [made("cosine", 3, 2.2000001), made("cosine", 4, 2.2, failed="ValueError: planted")]
    (cosine,) = gauntlet.scores(results)
    assert (cosine.good, cosine.acted) == ([True, False, False, False], ["rewind_replay"])
    assert "- cosine, dense, seed 4, act: ValueError: planted" in scoring.page(results, "")


def test_an_orchestrator_that_died_leaves_nothing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Signals, "observe", fail)
    found = gauntlet.train(Arm("cosine", "dense", 3, "act"))
    assert found.failed == "ZeroDivisionError: planted"
    assert found.acted == []


def test_a_run_that_crashes_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauntlet, "PRESET", "nothing")
    assert gauntlet.train(Arm("cosine", "dense", 3, "act")).stopped.startswith("crashed: UserError: ")


def test_what_was_said_before_the_fault_is_not_about_it() -> None:
    early = {"step": 10, "kind": "act", "rule": "r", "action": "rewind_replay", "cause": "router"}
    late = early | {"step": 62, "cause": "data"}
    found = Result(Arm("junk", "dense", 3, "act"), 2.0, decisions=[early, late])
    assert (found.arm.step, found.cause, found.delay) == (60, "data", 2)


def test_wilsons_interval() -> None:
    assert scoring.wilson(9, 10) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))
    assert scoring.wilson(60, 60)[1] == pytest.approx(1.0)


def test_arms_have_healthy_runs_of_the_same_seeds_and_each_case_alone() -> None:
    arms = gauntlet.arms([*FAULTS, *TRAPS], KINDS, [7], ["act"])
    sound = [arm for arm in arms if (arm.case, arm.mode, arm.kind) == (HEALTHY.name, "off", "moe")]
    assert len(sound) == gauntlet.HEALTHY_RUNS
    assert 7 in {arm.seed for arm in sound}
    assert {arm.kind for arm in arms if arm.case == "domains"} == {"moe"}
    assert {replace(arm, mode="off") for arm in arms} <= set(arms)
    assert {arm.case for arm in gauntlet.arms([CASES["cosine"]], ["moe"], [7])} == {"cosine"}


def test_a_longer_case_is_held_against_healthy_runs_as_long() -> None:
    arms = gauntlet.arms([CASES["dead experts"], CASES["junk"]], KINDS, [7], ["act"])
    sound = {(arm.case, arm.kind) for arm in arms if arm.case in SOUND}
    assert sound == {("healthy limited", "moe"), *((HEALTHY.name, kind) for kind in KINDS)}
    late, soon = (next(arm.step for arm in arms if arm.case == case) for case in ("dead experts", "junk"))
    assert late - soon == CASES["dead experts"].first - gauntlet.FIRST
    for case in FAULTS:
        assert case.keys == SOUND[case.against].keys
        assert set(case.kinds) <= set(SOUND[case.against].kinds)
    results = [made("healthy limited", seed, 2.0 + 0.1 * seed, "off") for seed in (1, 2, 3)]
    results += [made(HEALTHY.name, seed, 1.0, "off") for seed in (1, 2, 3)]
    results += [made("dead experts", 1, 2.6, "off"), made("dead experts", 1, 2.3)]
    (dead,) = gauntlet.scores(results)
    assert (dead.alone, dead.excess) == ([pytest.approx(5.0)], [pytest.approx(2.0)])
    page = scoring.page(results, "")
    assert "healthy limited dense 0.1000 (3 runs)" in page
    assert "from one of steps 300 to 379 on, `train.steps=1900`, `model.moe.capacity=1.0`. A right diagnosis" in page


def test_the_verb_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str], known: Any) -> None:
    taken: list[int] = []

    def train_all(arms: Any, workers: int, tell: Any, known: Any) -> list[Result]:
        results = [made(arm.case, arm.seed, 2.0 + arm.seed / 1e4, arm.mode) for arm in arms]
        new = [result for result in results if result not in known]
        taken.append(len(new))
        for result in new:
            tell(result)
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gauntlet, "train_all", train_all)
        patch.setattr(report, "commit", lambda: "abc1234")
        assert main(["gauntlet", "--case", "junk", "--kind", "dense", "--seeds", "2", "--out", str(tmp_path)]) == 0
        assert "act: 2 of 2 runs with faults within 2 sigma" in capsys.readouterr().out
        page, raw = (next(tmp_path.glob(f"*-gauntlet.{end}")).read_text() for end in ("md", "jsonl"))
        assert "lumina gauntlet --case 'junk' --kind dense --seeds 2 --first 80" in page
        assert [json.loads(line)["t"] for line in raw.splitlines()] == ["about"] + ["arm"] * 12
        assert main(["gauntlet", "--case", "junk", "--kind", "dense", "--seeds", "3", "--out", str(tmp_path)]) == 0
        assert taken == [12, 3]  # of the same commit: what there is is not taken again
    assert main(["gauntlet", "--case", "domains", "--kind", "dense"]) == 2
    assert "it is for moe" in capsys.readouterr().err
    assert main(["gauntlet", "--case", "junks"]) == 2
    assert "known: healthy, healthy long, healthy limited, nan gradient" in capsys.readouterr().err
