"""Faults are really faults, what rescues a run rescues it to the bit, and whoever else watches does what it says."""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lumina.cli import main
from lumina.config.resolve import resolve
from lumina.errors import UserError
from lumina.orchestrator.finding import Finding
from lumina.orchestrator.signals import Signals
from lumina.planner import calibration, outset
from lumina.training.controls import SessionControls
from lumina.training.session import Session
from lumina.verify.gauntlet import arms, policies, running
from lumina.verify.gauntlet.arms import Arm, Result, begin, lead, take, watcher
from lumina.verify.gauntlet.cases import (
    CASES,
    FAULTS,
    HEALTHY,
    KINDS,
    SOUND,
    SUITES,
    TRAPS,
    TUNED,
)
from lumina.verify.gauntlet.policies import POLICIES

SHORT = arms.KEYS | {
    "train.steps": 140, "train.batch_tokens": 256, "model.layers": 2, "checkpoint.every": 70,
    "orchestrator.snapshot_every": 25, "orchestrator.probe_every": 20,
}  # fmt: skip
AT = 60  # where the fault begins; the healthy run comes to 25

Take = Callable[..., Result]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    monkeypatch.setattr(arms, "KEYS", SHORT | {"data.train": [str(text)]})
    monkeypatch.setitem(SUITES, TUNED.name, replace(TUNED, first=AT, within=1))
    monkeypatch.setitem(CASES, "junk", replace(CASES["junk"], size=45))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same words in ever another order, so that nothing repeats and little is held out."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("text") / "words.txt"
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(60)]
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(600)))
    return path


@pytest.fixture(scope="module")
def known() -> dict[Any, Any]:
    """Healthy runs, and what became of arms, that several tests ask for."""
    return {}


@pytest.fixture
def taken(known: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Take:
    """Takes an arm, once."""

    def of(case: str, kind: str = "dense", mode: str = "act") -> Result:
        arm = Arm(case, kind, 3, mode)
        if arm not in known:
            if arm.root not in known:
                known[arm.root] = lead(arm.root, tmp_path_factory.mktemp("healthy"))
            known[arm] = take(arm, known[arm.root])
        result: Result = known[arm]
        return result

    return of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nan gradient", "dense"),
        ("inf weight", "moe"),
        ("lr burst", "dense"),
        ("stuck loader", "mod"),
        ("wrong eps", "dense"),
        ("wrong decay", "moe"),
    ],
)
def test_what_is_taken_back_and_taken_again_is_the_healthy_run_to_the_bit(name: str, kind: str, taken: Take) -> None:
    """But for the gradient that is NaN: its step is left out, which every later loss shows."""
    found, sound = taken(name, kind), taken(HEALTHY.name, kind, "off")
    assert (found.loss == sound.loss) == (name != "nan gradient")
    assert abs(found.loss - sound.loss) < 0.05
    assert found.cause in CASES[name].causes
    assert found.delay is not None
    assert found.delay <= 2
    assert [one["action"] for one in found.acted] == ([] if name == "nan gradient" else ["rewind_replay"])
    assert found.extra > 0  # at least to look at the step again


def test_an_arm_is_the_run_that_was_never_forked(taken: Take) -> None:
    """To the bit, whoever watches: what the fork knows of before is what the run would know."""
    whole = Arm("cosine", "dense", 3, "off").root
    assert whole.steps == 0
    alone, forked = take(Arm(HEALTHY.name, "dense", 3, "off")), taken(HEALTHY.name, mode="off")
    assert Arm(HEALTHY.name, "dense", 3, "off").root.steps == 25
    assert alone.loss == forked.loss == taken(HEALTHY.name, mode="act").loss
    assert alone.digest == forked.digest
    assert (alone.taken, forked.taken) == (140, 115)
    assert forked.extra == 0
    for case, kind in (("junk", "dense"), ("shifted targets", "moe"), ("wrong decay", "mod")):
        whole = take(Arm(case, kind, 3, "act"))
        assert whole.same(taken(case, kind))
        assert whole.decisions == taken(case, kind).decisions


def test_a_broken_run_teaches_no_plan(taken: Take, known: dict[Any, Any], tmp_path: Path) -> None:
    """Forecasts of later runs would expect what it came to, and so would the detectors that judge them."""
    before = calibration.load().entries
    take(Arm("junk", "dense", 3, "off"), healthy(taken, known))
    assert calibration.load().entries == before
    session = begin(Arm(HEALTHY.name, "dense", 3, "off"), healthy(taken, known), tmp_path)
    assert outset.read(session.run.path)
    assert not outset.reference(outset.read(session.run.path))


def test_bad_batches_are_left_out_as_far_as_they_go(taken: Take) -> None:
    found, alone, sound = taken("junk"), taken("junk", mode="off"), taken(HEALTHY.name, mode="off").loss
    assert alone.loss > sound + 0.2
    assert abs(found.loss - sound) < 0.05
    assert (found.cause, [one["action"] for one in found.acted]) == ("data", ["rewind_skip"])
    assert alone.decisions == []


def test_targets_that_are_shifted_for_good_are_handed_over_with_the_cause(taken: Take) -> None:
    found = taken("shifted targets")
    assert (found.stopped, found.last_cause, found.loss) == ("looked", "data", math.inf)
    assert [one["action"] for one in found.acted][-1] == "stop"
    assert taken("shifted targets", mode="off").loss > taken(HEALTHY.name, mode="off").loss + 0.1


@pytest.mark.parametrize("name", ["small lr burst", "moments lost", "large gradient"])
def test_what_heals_by_itself_is_left_alone(name: str, taken: Take) -> None:
    found = taken(name)
    assert found.acted == []
    assert found.loss != taken(HEALTHY.name, mode="off").loss  # something was done to it


def test_what_is_undone_by_hand_is_the_healthy_run_to_the_bit(taken: Take) -> None:
    found = taken("undone", mode="advise")
    assert next(one["action"] for one in found.decisions if one["rule"] == "hand") == "lr.scale=0.5"
    assert found.loss == taken(HEALTHY.name, mode="off").loss
    assert (found.acted, found.taken) == ([], 115 + 40)
    assert found.same(taken(HEALTHY.name, mode="off"))


def test_a_run_that_is_stopped_is_not_rescued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "KEYS", arms.KEYS | {"orchestrator.snapshot_every": 0, "checkpoint.every": 0})
    found = take(Arm("inf weight", "dense", 3, "act"))
    assert (found.stopped, found.loss) == ("looked", math.inf)
    assert [one["action"] for one in found.acted] == ["stop"]


def test_nothing_is_forked_from_a_run_that_was_acted_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Session, "train", acting(Session.train))
    with pytest.raises(UserError, match="was acted on"):
        lead(Arm("junk", "dense", 3, "act").root._replace(steps=50), tmp_path)


def acting(train: Any) -> Any:
    def training(session: Session, back: Any = None) -> None:
        CASES["lr burst"].plant(session, 30, 0, 100.0)  # type: ignore[misc]
        train(session, back)

    return training


def test_an_orchestrator_that_died_leaves_nothing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Signals, "observe", fail)
    found = take(Arm("cosine", "dense", 3, "act"))
    assert found.failed == "ZeroDivisionError: planted"
    assert found.acted == []


def test_a_run_that_crashes_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "PRESET", "nothing")
    assert take(Arm("cosine", "dense", 3, "act")).crashed.startswith("UserError: ")


def test_what_was_said_before_the_fault_is_not_about_it() -> None:
    early = {"step": 10, "kind": "act", "rule": "r", "action": "rewind_replay", "cause": "router"}
    late = early | {"step": 62, "cause": "data"}
    found = Result(Arm("junk", "dense", 3, "act"), 2.0, decisions=[early, late])
    assert (found.arm.step, found.cause, found.delay) == (60, "data", 2)


# -- other policies ----------------------------------------------------------------------------------------------------


def test_a_fixed_clip_clips_at_less(taken: Take, known: dict[Any, Any], tmp_path: Path) -> None:
    session = begin(Arm(HEALTHY.name, "dense", 3, "fixed clip"), healthy(taken, known), tmp_path)
    assert session.course.values(70)["clip"] == 0.1
    assert taken(HEALTHY.name, mode="fixed clip").loss != taken(HEALTHY.name, mode="off").loss


def test_zclip_clips_what_is_far_above_the_usual_norm(taken: Take, known: dict[Any, Any], tmp_path: Path) -> None:
    """And nothing else: norms as before are left alone."""
    session = begin(Arm("large gradient", "dense", 3, "zclip"), healthy(taken, known), tmp_path)
    session.train()
    norms = {event["step"]: event["grad_norm"] for event in session.run.events() if event["t"] == "step"}
    usual = sorted(norms[step] for step in range(30, 50))[-1]
    assert norms[AT] < 2 * usual  # a thousand times without


def test_skip_step_leaves_out_what_is_far_beyond(
    taken: Take, known: dict[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "FEWEST", 32)
    session = begin(Arm("large gradient", "dense", 3, "skip-step"), healthy(taken, known), tmp_path)
    steps, inner = dict[int, float](), session.parts.optimizer.muon.step
    number = [25]

    def stepping(lr: float, decay: float, skip: Any) -> None:
        number[0] += 1
        steps[number[0]] = float(skip)
        inner(lr, decay, skip)

    session.parts.optimizer.muon.step = stepping  # type: ignore[method-assign]
    session.train()
    assert steps[AT] == 1.0
    assert sum(steps.values()) < 5  # and few others


def test_a_policy_that_wraps_the_step_still_does_behind_a_burst(
    taken: Take, known: dict[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "FEWEST", 32)
    session = begin(Arm("lr burst", "dense", 3, "skip-step"), healthy(taken, known), tmp_path)
    wrapped = session.parts.optimizer.step
    session.train()
    assert session.parts.optimizer.step is wrapped


@pytest.mark.parametrize(("mode", "action"), [("halve", "lr.scale=0.5"), ("rewind", "rewind_skip")])
def test_a_reflex_does_one_thing(mode: str, action: str, taken: Take) -> None:
    found = taken("junk", mode=mode)
    assert found.acted[0]["action"] == action
    assert not found.failed
    assert not found.stopped


def test_a_reflex_that_rests_after_a_spike_hears_what_is_hard(
    taken: Take, known: dict[Any, Any], tmp_path: Path
) -> None:
    session = begin(Arm("junk", "dense", 3, "rewind"), healthy(taken, known), tmp_path)
    reflex, heard = session.oversight.orchestrator, list[str]()
    assert isinstance(reflex, policies.Reflex)
    reflex.react = lambda _, finding, controls: heard.append(finding.rule)
    for step, rule, hard in (
        (10, "spike", False),
        (12, "spike", False),
        (13, "divergence", True),
        (14, "loader", True),
    ):
        reflex._handle(Finding(rule, step, step, "", hard), SessionControls(session))
    assert heard == ["spike", "divergence"]


def test_chance_draws_the_same_again(taken: Take, known: dict[Any, Any]) -> None:
    first = taken("junk", mode="random")
    again = take(Arm("junk", "dense", 3, "random"), healthy(taken, known))
    assert (first.loss, first.decisions) == (again.loss, again.decisions)


def test_a_policy_of_ones_own(taken: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of a session, given by its name, in a module that lies here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "gentle.py").write_text("def gentle(")
    found = taken(HEALTHY.name, mode=f"{__name__}:resting")
    assert found.loss > taken(HEALTHY.name, mode="off").loss
    for name, said in (
        ("nobody", "there is no such policy"),
        ("nowhere:mine", "cannot be imported: ModuleNotFoundError"),
        ("math:mine", "cannot be imported: AttributeError"),
        ("math:pi", "is float, which is no policy"),
        ("gentle:gentle", "cannot be imported: SyntaxError"),
    ):
        with pytest.raises(UserError, match=said):
            watcher(name)


def resting(session: Session, seed: int) -> None:
    """Takes no step any more."""
    session.parts.optimizer.step = lambda lr, skip: None  # type: ignore[method-assign]


def healthy(taken: Take, known: dict[Any, Any]) -> Path:
    """The run that dense arms are forked from."""
    taken(HEALTHY.name, mode="off")
    path: Path = known[Arm(HEALTHY.name, "dense", 3, "off").root]
    return path


# -- which arms --------------------------------------------------------------------------------------------------------


def test_arms_have_healthy_runs_of_the_same_seeds_and_each_case_alone() -> None:
    found = running.arms(TUNED, [*FAULTS, *TRAPS], KINDS, [7], ["act"])
    sound = [arm for arm in found if (arm.case, arm.mode, arm.kind) == (HEALTHY.name, "off", "moe")]
    assert len(sound) == running.HEALTHY_RUNS
    assert 7 in {arm.seed for arm in sound}
    assert {arm.kind for arm in found if arm.case == "domains"} == {"moe"}
    for arm in found:
        case = CASES[arm.case]
        alone = case.against if case.sound else case.name  # nobody has to take the healthy run twice
        assert replace(arm, mode="off", case=alone) in found
    assert {arm.case for arm in running.arms(TUNED, [CASES["cosine"]], ["moe"], [7])} == {"cosine"}
    others = running.others(found, [7, 8, 9])
    assert {arm.mode for arm in others} == set(POLICIES)
    assert {arm.kind for arm in others} == {"dense"}
    shown = (case for case in (*FAULTS, *TRAPS) if "dense" in case.kinds and not case.sound)
    assert {arm.case for arm in others} == {case.name for case in shown}


def test_cases_of_one_kind_seed_and_setting_share_a_healthy_run() -> None:
    found = running.arms(TUNED, list(FAULTS), KINDS, [7])
    soon = {arm.root for arm in found if arm.seed == 7 and arm.kind == "moe" and not CASES[arm.case].late}
    late = {arm.root for arm in found if arm.seed == 7 and arm.kind == "moe" and CASES[arm.case].against != "healthy"}
    assert {root.settings for root in soon} >= {"healthy"}
    assert len({root for root in soon if root.settings == "healthy"}) == 1
    assert {root.settings for root in late} == {"healthy long", "healthy limited"}
    for case in FAULTS:
        assert case.keys == SOUND[case.against].keys
        assert set(case.kinds) <= set(SOUND[case.against].kinds)
        assert case.forked
    assert not CASES["domains"].forked


def test_sets_differ_in_seeds_steps_sizes_model_and_text(tmp_path: Path) -> None:
    tuned, held = TUNED, SUITES["held-out"]
    assert not set(tuned.seeds) & set(held.seeds)
    case = CASES["lr high"]
    assert (tuned.size(case), held.size(case)) == (10, 6)
    steps = [{suite.begins(case, seed) for seed in range(100)} for suite in (tuned, held)]
    assert not steps[0] & steps[1]
    wanted = arms.keys(held, case, "dense", 500, tmp_path)
    assert (wanted["model.width"], wanted["train.steps"]) == (96, 1900)
    assert Path(wanted["data.train"][0]).stat().st_size > 400_000
    ci = running.arms(SUITES["ci"], list(CASES.values()), KINDS, [7])
    assert {(arm.case, arm.kind) for arm in ci if arm.case not in SOUND} == set(SUITES["ci"].cases)
    assert len(ci) < 20  # none for sigma alone
    long = running.arms(SUITES["long"], list(CASES.values()), ["dense"], [1])
    assert [(arm.case, arm.mode) for arm in long] == [("lr high", "act"), ("healthy", "act")]
    assert long[0].root.steps == 10_000
    assert arms.keys(SUITES["long"], CASES["lr high"], "dense", 1, tmp_path)["train.steps"] == 40_000


@pytest.mark.parametrize("suite", SUITES)
def test_every_run_of_every_set_can_be_configured(suite: str, tmp_path: Path) -> None:
    """Keys of another kind would be an error, hours later."""
    for case in CASES.values():
        for kind in case.kinds:
            wanted = arms.keys(SUITES[suite], case, kind, 1, tmp_path)
            assert resolve(arms.PRESET, wanted).config.model.kind == kind


def test_all_are_taken_behind_the_run_they_are_forked_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "lead", leading)
    monkeypatch.setattr(running, "take", taking)
    monkeypatch.setattr(running, "ProcessPoolExecutor", threads)
    wanted = [Arm(case, "dense", seed, "act") for case in ("junk", "lr high", "cosine") for seed in (1, 2, 9)]
    told: list[Result] = []
    results = running.take_all(wanted, 2, told.append, [Result(wanted[0], 7.0)])
    assert [result.arm for result in results] == wanted
    assert (results[0].loss, len(told)) == (7.0, len(wanted) - 1)
    assert [results[index].crashed for index in (2, 5)] == ["seed 9: planted", "RuntimeError: planted"]
    assert [results[index].steps for index in (1, 3, 6)] == [25, 250, 0]


def leading(root: Any, folder: Path) -> Path:
    if root.seed == 9 and root.steps:
        raise UserError("seed 9: planted", "") if root.settings == HEALTHY.name else RuntimeError("planted")
    return Path(str(root.steps))


def taking(arm: Arm, sound: Path) -> Result:
    return Result(arm, 1.0, steps=int(str(sound)))


def threads(workers: int, mp_context: Any) -> Any:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(workers)


def test_a_run_is_broken_and_rescued_in_front_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rescue", "--case", "inf weight", "--kind", "dense", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    titles = [line for line in out.splitlines() if re.match(r"\d\. ", line)]
    assert [title[0] for title in titles] == list("12345")
    assert "3. From step 60 on: one weight becomes infinite. Nobody watches." in titles
    assert out.index("go back and replay (done)") > out.index("5. What it says of it.")
    ends = dict(re.findall(r"(healthy|watched) (\d\.\d+)", out.splitlines()[-2]))
    assert ends["healthy"] == ends["watched"]
    (run,) = tmp_path.glob("tiny-*")
    assert f"lumina decisions {run}" in out.splitlines()[-1]
    assert main(["rescue", "--case", "lr high"]) == 2
    assert "no fault of a short run" in capsys.readouterr().err
    assert main(["rescue", "--kind", "hybrid"]) == 2
    assert "known: dense, moe, mod" in capsys.readouterr().err
