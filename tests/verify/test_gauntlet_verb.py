"""`lumina gauntlet`, but for what it trains: what it writes, goes on with, takes from others, and refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lumina.cli import main
from lumina.errors import UserError
from lumina.verify import report
from lumina.verify.gauntlet import raw, running
from lumina.verify.gauntlet.arms import Arm, Result
from lumina.verify.gauntlet.cases import CASES, SOUND


def test_the_verb_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken: list[int] = []
    losses = {True: 2.0, False: 2.5}

    def take_all(wanted: Any, workers: int, tell: Any, known: Any) -> list[Result]:
        results = [Result(arm, losses[arm.case in SOUND or arm.mode == "act"] + arm.seed / 1e4) for arm in wanted]
        there = {result.arm for result in known}
        new = [result for result in results if result.arm not in there]
        taken.append(len(new))
        for result in new:
            tell(result)
        return results

    of, out = ["--case", "junk", "--kind", "dense"], ["--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "take_all", take_all)
        patch.setattr(report, "commit", lambda: "abc1234")
        assert main(["gauntlet", *of, "--mode", "off", "--seeds", "2", *out]) == 0
        assert "counts as" in capsys.readouterr().out
        (alone,) = tmp_path.glob("*-tuned-junk-dense-alone-2_seeds-abc1234.jsonl")
        assert main(["gauntlet", *of, "--seeds", "2", *out]) == 0
        assert "act: 2 of 2 runs that faults hurt rescued" in capsys.readouterr().out
        page, log = (written(tmp_path, f"dense-2_seeds-abc1234.{end}") for end in ("md", "jsonl"))
        assert "lumina gauntlet --case junk --kind dense --seeds 2" in page
        assert [json.loads(line)["t"] for line in log.splitlines()] == ["about"] + ["arm"] * 12
        assert main(["gauntlet", *of, "--seeds", "3", *out]) == 0
        assert taken == [10, 2, 3]  # of the same commit: what there is is not taken again
        assert main(["gauntlet", *of, "--mode", "act", "--mode", "halve", "--first", "1", *out]) == 0
        assert "Who watches" in written(tmp_path, "halve-from_1-abc1234.md")
        patch.setattr(report, "commit", lambda: "abc1234+")  # something was changed since: another file
        assert main(["gauntlet", *of, "--seeds", "2", *out]) == 0
        assert written(tmp_path, "dense-2_seeds-abc1234.jsonl") == log
        capsys.readouterr()
        assert main(["gauntlet", *of, "--seeds", "2", *out]) == 2  # nobody knows what it was changed to
        assert "holds results already" in capsys.readouterr().err
        patch.setattr(report, "commit", lambda: "def5678")
        calibrated = ["--seeds", "2", "--calibration", str(alone), *out]
        assert main(["gauntlet", *of, *calibrated]) == 0
        assert taken[-1] == 2
        assert f"10 of the 12 runs, which nobody watched, are those of `{alone}`" in written(tmp_path, "def5678.md")
        with next(tmp_path.glob("*-def5678.jsonl")).open("a") as torn:
            torn.write('{"t": "ar')
        assert len(report.earlier(next(tmp_path.glob("*-def5678.jsonl")))) == 2
        patch.setitem(CASES, "junk", replace(CASES["junk"], size=46))
        assert main(["gauntlet", *of, *calibrated]) == 2
        assert "junk is not what it was when this was taken" in capsys.readouterr().err
        assert main(["gauntlet", "--case", "lr burst", "--kind", "moe", *calibrated]) == 2
        assert "none of its runs is one of these" in capsys.readouterr().err
        losses[False] = 2.0  # nobody acts, and what heals by itself is as it was
        assert main(["gauntlet", "--subset", "ci", "--case", "one junk batch"]) == 0
        losses[True] = 2.4
        assert main(["gauntlet", "--subset", "ci", "--case", "one junk batch"]) == 1
        assert "! not as it has to be: one junk batch, dense, 7, act" in capsys.readouterr().err
    assert main(["gauntlet", "--case", "domains", "--kind", "dense"]) == 2
    assert "--case domains: none for these kinds" in capsys.readouterr().err
    assert main(["gauntlet", "--case", "junks"]) == 2
    assert "known: healthy, healthy long, healthy limited, lr high" in capsys.readouterr().err
    assert main(["gauntlet", "--subset", "all"]) == 2
    assert "known: tuned, held-out, ci, long" in capsys.readouterr().err
    assert main(["gauntlet", "--mode", "nobody"]) == 2
    assert "fixed clip" in capsys.readouterr().err


def written(folder: Path, end: str) -> str:
    (path,) = folder.glob(f"*{end}")
    return path.read_text()


def test_results_of_any_trainer_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The protocol: an object a line, with case, kind, seed, mode and loss."""
    losses = {("healthy", "off"): 2.0, ("junk", "off"): 2.6, ("junk", "theirs"): 2.0}
    rows = [
        {"case": case, "kind": "dense", "seed": seed, "mode": mode, "loss": loss + seed / 1e3}
        for (case, mode), loss in losses.items()
        for seed in range(3)
    ]
    path = tmp_path / "theirs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert main(["gauntlet", "--score", str(path)]) == 0
    assert "theirs: 3 of 3 runs that faults hurt rescued" in capsys.readouterr().out
    assert main(["gauntlet", "--score", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"][0]["mode"] == "theirs"
    path.write_text('{"case": "junk", "kind": "dense", "seed": 1, "mode": "theirs", "loss": null}')
    assert main(["gauntlet", "--score", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["loss"] == "inf"
    path.write_text("\n".join([*(json.dumps(row) for row in rows), "", '{"case": "ju']))  # a kill has torn it
    assert main(["gauntlet", "--score", str(path)]) == 0
    capsys.readouterr()
    assert main(["gauntlet", "--score", str(path), "--out", str(tmp_path / "told")]) == 0
    page = (tmp_path / "told" / "theirs.md").read_text()
    assert f"lumina gauntlet --score {path}" in page
    assert "| rescued | >= 90 % of at least 60 | 3 of 3 (44 to 100 %) | no |" in page
    assert "lumina 0" not in page  # nothing is said of where another trainer's runs were taken, and of what is ours
    assert "What was planted" not in page
    assert capsys.readouterr().out.endswith("theirs.md\n")
    ended = [row | {"stopped": "a person"} if row["mode"] == "theirs" else row for row in rows]
    path.write_text("\n".join(json.dumps(row) for row in ended))
    assert main(["gauntlet", "--score", str(path)]) == 0
    assert "theirs: 0 of 3 runs that faults hurt rescued" in capsys.readouterr().out
    path.write_text("\n".join(json.dumps(row) for row in rows))
    for more in (["--mode", "act"], ["--others"], ["--subset", "ci"], ["--seeds", "2"]):
        assert main(["gauntlet", "--score", str(path), *more]) == 2
        assert f"{more[0]}: --score takes whatever is in its files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"case": "mine"}, ":1: not a result of a gauntlet: mine: known are"),
        ({"loss": "much"}, ":1: not a result of a gauntlet: loss: "),
        ({"seed": None}, ":1: not a result of a gauntlet: seed: "),
        ({"taken": 700.0}, ":1: not a result of a gauntlet: taken: is compared with steps, which are missing"),
        ({"decisions": [{"step": 3, "kind": "rollback"}]}, ":1: not a result of a gauntlet: decisions.0.kind: "),
        ({"decisions": [{"kind": "act"}]}, ":1: not a result of a gauntlet: decisions.0.step: "),
        ([], ":1: not a result of a gauntlet: no JSON object"),
        ("{", ":1: not a result of a gauntlet: no JSON object"),
        (None, "cannot be read"),
    ],
)
def test_a_line_that_is_no_result_is_named(
    line: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "theirs.jsonl"
    if isinstance(line, dict):
        line = {"case": "junk", "kind": "dense", "seed": 1, "mode": "theirs", "loss": 1.0} | line
    if line is not None:
        path.write_text((line if isinstance(line, str) else json.dumps(line)) + "\n")
    assert main(["gauntlet", "--score", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_what_a_line_leaves_out_is_unknown_and_no_run_is_told_twice(tmp_path: Path) -> None:
    path, row = tmp_path / "theirs.jsonl", {"case": "junk", "kind": "dense", "seed": "1", "mode": "theirs"}
    more = {
        "loss": math.nan,
        "decisions": [{"step": 3, "kind": "advise"}],
        "trials": [{"winner": "half"}, {"kind": "refused"}],
    }
    path.write_text(json.dumps(row | more))
    (one,) = raw.read([path])
    assert (one.arm.seed, one.loss, one.told, one.won) == (1, math.inf, True, ["half"])
    path.write_text(json.dumps(row | {"loss": 1.0}) + "\n")
    assert not raw.read([path])[0].told
    with pytest.raises(UserError, match="junk, dense, 1, theirs is told a second time"):
        raw.read([path, path])
    other = tmp_path / "again.jsonl"
    other.write_text(json.dumps(row | {"loss": None, "stopped": "SIGTERM"}) + "\n")
    assert raw.read([other, path])[0].loss == 1.0


def test_runs_of_another_machine_are_held_against_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "commit", lambda: "abc1234")
    path, arm = tmp_path / "alone.jsonl", Arm("junk", "dense", 1, "off")
    report.Raw(path)(Result(arm, 2.0).plain())
    assert raw.frozen(path, [arm])[arm].loss == 2.0
    assert [one.arm for one in raw.earlier(tmp_path, [arm])] == [arm]
    with pytest.raises(UserError, match="none of its runs is one of these"):
        raw.frozen(path, [replace(arm, suite="held-out")])
    (tmp_path / "foreign.jsonl").write_text('[1]\n"no"\n')
    (tmp_path / "torn.jsonl").write_text("{\n")
    there = report.about() | {"commit": "abc1234", "machine": "a laptop", "torch": "9"}
    monkeypatch.setattr(report, "about", lambda: there)
    assert raw.earlier(tmp_path, [arm]) == []
    with pytest.raises(UserError, match="here it is a laptop, 9, and no run would be the same to the bit"):
        raw.frozen(path, [arm])
    with pytest.raises(UserError, match="holds results already, and not of a commit that could be gone on with here"):
        raw.logged(path)
