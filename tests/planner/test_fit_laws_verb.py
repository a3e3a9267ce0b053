"""`lumina fit-laws`: what it prints, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_law_points import make_run

from lumina.cli import main
from lumina.config.resolve import resolve
from lumina.model.cost import count
from lumina.planner.laws import LAWS, law
from lumina.planner.length import optimal_length

TRUE = LAWS["besiroglu"]


@pytest.fixture(autouse=True)
def _own_law_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMINA_CACHE", str(tmp_path / "cache"))


def points(folder: Path) -> Path:
    rows = [(1e6 * 4**i, 5e6 * 4 ** (i + j)) for i in range(3) for j in range(3)]
    path = folder / "points.csv"
    path.write_text("params,tokens,loss\n" + "".join(f"{n},{d},{TRUE.loss(n, d):.4f}\n" for n, d in rows))
    return path


def test_a_file_becomes_the_law_that_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit-laws", str(points(tmp_path)), "--counts", "total", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    mine = law()
    for key in ("E", "A", "B", "alpha", "beta"):
        (low, high), (lowest, highest) = told[key]["80%"], told[key]["95%"]
        assert lowest < low < told[key]["value"] < high < highest
        assert told[key]["value"] == getattr(mine, key)
    assert told["alpha"]["value"] == pytest.approx(TRUE.alpha, rel=0.05)
    assert (mine.name, mine.counts, mine.source) == ("own", "total", "points of points.csv")
    assert (told["draws"], len(mine.draws)) == (1000, 1000)
    assert told["span"] == {"params": [1e6, 1.6e7], "tokens": [5e6, 1.28e9]}
    assert [bool(row["outside"]) for row in told["optimum"]] == [True, True, True]
    assert told["saved"] == str(tmp_path / "cache" / "law.json")

    assert main(["fit-laws", "--forget", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"forgotten": True, "law": "besiroglu"}
    assert law() is TRUE
    assert main(["fit-laws", "--forget"]) == 0
    assert "there was no law of yours; plans use besiroglu" in capsys.readouterr().out


def test_runs_become_a_law_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, width in enumerate((64, 128, 256)):
        n = count(resolve("tiny", {"model.width": width, "model.kind": "dense"}).config.model).active_mean
        for j in range(3):
            d = int(10 * 4**j * n)
            keys = {"model.width": width, "model.kind": "dense"}
            make_run(tmp_path / f"runs/{i}{j}", d, TRUE.loss(n, d), unique=10**9, **keys)  # type: ignore[arg-type]
    make_run(tmp_path / "runs/left", end="stopped", **{"model.kind": "dense"})
    make_run(tmp_path / "runs/more", 10**10, TRUE.loss(n, 1e10), unique=10**9, **keys)  # type: ignore[arg-type]
    assert main(["fit-laws", *map(str, sorted((tmp_path / "runs").iterdir())), "--bootstrap", "100"]) == 0
    said = capsys.readouterr().out
    assert "10 runs of lumina: model.kind dense, model.seq_len 64, model.vocab 260" in said
    assert "N: active parameters" in said
    assert "10 points of 3 sizes" in said
    assert "80 and 95 % of 100 draws" in said
    assert "extrapolated" in said
    assert f"left out {tmp_path / 'runs/left'}: not finished" in said
    assert f"! {tmp_path / 'runs/more'}: read its text 10.0 times" in said
    assert law().alpha == pytest.approx(TRUE.alpha, rel=0.02)
    warned = "! the law own was fitted to runs of "
    assert main(["plan", "tiny", "model.kind=dense", "--gpus", "H200"]) == 0
    assert warned not in capsys.readouterr().out
    other = ["plan", "tiny", "model.kind=moe", "model.vocab=320", "--gpus", "H200"]
    assert main(other) == 0
    differing = "model.kind dense, not moe; model.vocab 260, not 320; model.moe none, not 2 of 4 experts: its losses"
    assert f"{warned}{differing}" in capsys.readouterr().out
    assert main([*other, "--law", "besiroglu"]) == 0
    assert warned not in capsys.readouterr().out
    assert (
        "; the law own was fitted to runs of model.kind dense, not moe"
        in optimal_length(resolve("tiny", {"model.kind": "moe", "train.tokens": "chinchilla"}).config, 10**6)[
            "train.steps"
        ][1]
    )

    assert main(["fit-laws", str(points(tmp_path)), "--bootstrap", "100"]) == 0
    assert "instead of the one before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "fitted to folders of runs, or to one CSV file"),
        (["points.csv", "points.csv"], "fitted to folders of runs, or to one CSV file"),
        (["points.csv", "runs"], "fitted to folders of runs, or to one CSV file"),
        (["points.csv", "--forget"], "--forget takes no runs and no file"),
        (["runs"], "none of these is a finished run"),
        (["runs", "--counts", "total"], "of runs the active parameters count"),
        (["nowhere"], "nowhere: no such folder"),
    ],
)
def test_what_is_refused_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    points(tmp_path)
    (tmp_path / "runs").mkdir()
    assert main(["fit-laws", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert law() is TRUE


def test_points_without_a_law_keep_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = points(tmp_path)
    path.write_text(
        "\n".join(f"{line.rsplit(',', 1)[0]},3.0" if "." in line else line for line in path.read_text().split("\n"))
    )
    assert main(["fit-laws", str(path), "--bootstrap", "100"]) == 2
    told = capsys.readouterr().err
    assert "the points follow no law" in told
    assert "Traceback" not in told
    assert law() is TRUE


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert main(["fit-laws", str(points(tmp_path)), "--bootstrap", "100"]) == 2
    assert "set LUMINA_CACHE" in capsys.readouterr().err
