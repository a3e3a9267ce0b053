"""Points from files, and from finished runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import settings

from lumina.config.resolve import resolve, write
from lumina.errors import UserError
from lumina.events import EventWriter
from lumina.model.cost import count
from lumina.planner.points import Point, points_of, read_points
from lumina.training.trainer import Trainer


def make_run(
    folder: Path, tokens: int = 1000, loss: float = 3.0, *, data: str = "d1", tokenizer: str = "{}",
    end: str = "done", comparable: bool = True, unique: int = 10_000, decay: int = 4, **keys: object,
) -> Path:  # fmt: skip
    """A finished run as far as a law looks at it."""
    (folder / "tokenizer").mkdir(parents=True)
    write(resolve("tiny", keys), folder / "config.yaml")
    (folder / "meta.json").write_text(json.dumps({"data": data}))
    (folder / "tokenizer" / "tokenizer.json").write_text(tokenizer)
    with EventWriter(folder / "events.jsonl", 0) as events:
        phases = [{"decay": decay}]
        events.emit("run", step=0, steps=10, data={"tokens": {"train": unique}}, phases=phases, parent_step=None)
        events.emit("step", step=10, loss=9.9)
        said = {"tokens": tokens, "comparable": comparable}
        events.emit("eval", step=5, split="heldout", loss=8.8, **said)
        events.emit("eval", step=10, split="heldout", loss=loss, **said)
        events.emit("eval", step=10, split="heldout chat", loss=7.7, **said)
        events.emit("end", step=10, reason=end)
    return folder


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_read_whatever_its_order(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("\ufeffLoss, tokens ,params\n3.5,2e7,1000000\n\n 3.25 , 4e7 , 1e6\n", encoding="utf-8")
    assert read_points(path) == [Point(1e6, 2e7, 3.5), Point(1e6, 4e7, 3.25)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "first line has nothing"),
        ("params,tokens\n1,2\n", "first line has params, tokens"),
        ("params,tokens,loss,lr\n1,2,3,4\n", "first line has params, tokens, loss, lr"),
        ("params,tokens,loss\n1,2\n", "points.csv:2: needs 3 numbers"),
        ("params,tokens,loss\n1,2,3\n4,x,6\n", "points.csv:3: tokens='x' is not a number"),
        ("params,tokens,loss\n1,2,nan\n", "points.csv:2: loss=nan is not finite and positive"),
        ("params,tokens,loss\n1,-2,3\n", "points.csv:2: tokens=-2 is not finite and positive"),
        ("params,tokens,loss\n1,2,3\n4,5,6\n1,2,3.0\n", "points.csv:4: the same as line 2"),
        ("params,tokens,loss\n" + "1,2,0\n" * 12, "… and 2 more"),
        ("\0\xff", "points.csv"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "points.csv"
    path.write_bytes(text.encode("latin-1" if "\xff" in text else "utf-8"))
    with pytest.raises(UserError) as refused:
        read_points(path)
    assert says in refused.value.message
    assert refused.value.fix


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_points(tmp_path)


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_trained_is_a_point(tmp_path: Path) -> None:
    keys = settings(tmp_path) | {"train.steps": 2, "train.eval_every": 1, "model.kind": "dense"}
    run = Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    found = points_of([run.path])
    last = [event for event in run.events() if event["t"] == "eval"][-1]
    (begun,) = (event for event in run.events() if event["t"] == "run")
    assert found.points == [Point(begun["active_mean"], last["tokens"], last["loss"])]
    assert last["step"] == 2
    assert not found.left_out
    assert found.traits["model.kind"] == "dense"
    assert {"tokenizer", "data", "model.vocab", "train.optimizer"} < found.traits.keys()


def test_it_is_the_last_loss_and_what_a_token_meets(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 1234, 3.21, **{"model.kind": "mod"})
    model = resolve("tiny", ["model.kind=mod"]).config.model
    assert points_of([run]).points == [Point(count(model).active_mean, 1234, 3.21)]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"end": "stopped"}, "not finished"),
        ({"comparable": False}, "its last evaluation is marked as not comparable"),
        ({"loss": float("nan")}, "its loss is nan"),
        ({"train.lora.rank": 4, "train.init_from": "runs/b"}, "not trained from nothing"),
    ],
)
def test_what_is_no_point_is_left_out_and_said(tmp_path: Path, keys: dict[str, object], says: str) -> None:
    good, bad = make_run(tmp_path / "good"), make_run(tmp_path / "bad", **keys)  # type: ignore[arg-type]
    (tmp_path / "notes").mkdir()
    found = points_of([bad, good, tmp_path / "notes", tmp_path / "." / "good"])
    assert len(found.points) == 1
    assert says in found.left_out[0]
    assert [line.split(": ")[1] for line in found.left_out[1:]] == ["not a run", "named twice"]


def test_a_run_that_went_back_is_not_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    with EventWriter(run / "events.jsonl", 1) as events:
        events.emit("run", step=5, parent_step=5, reason="rollback", steps=10)
    assert points_of([run]).left_out == [f"{run}: not finished"]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"data": "d2"}, "data: d1 in a; d2 in b"),
        ({"tokenizer": '{"x": 1}'}, "tokenizer: "),
        ({"model.seq_len": 32}, "model.seq_len: 64 in a; 32 in b"),
        ({"model.kind": "dense"}, "model.kind: hybrid in a; dense in b"),
        ({"train.optimizer": "adamw"}, "train.optimizer: muon in a; adamw in b"),
        ({"model.moe.experts": 8}, "model.moe: 2 of 4 experts in a; 2 of 8 experts in b"),
    ],
)
def test_runs_that_differ_in_more_are_refused_and_it_is_said_where(
    tmp_path: Path, keys: dict[str, object], named: str
) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **keys)]  # type: ignore[arg-type]
    with pytest.raises(UserError) as refused:
        points_of(runs)
    assert "differ in more than parameters and tokens" in refused.value.message
    assert named in refused.value.message


def test_runs_of_other_sizes_and_lengths_agree(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", 2000, **{"model.width": 128, "train.lr": 1e-3})]
    assert len(points_of(runs).points) == 2


def test_doubtful_runs_are_named(tmp_path: Path) -> None:
    often = make_run(tmp_path / "often", 50_000)
    flat = make_run(tmp_path / "flat", decay=0)
    first, second = points_of([often, flat]).warnings
    assert "often: read its text 5.0 times" in first
    assert "flat: its learning rate never decayed" in second


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda run: (run / "meta.json").write_text("{"), "its meta.json is damaged"),
        (lambda run: (run / "meta.json").write_text("{}"), "its meta.json is damaged"),
        (lambda run: (run / "config.yaml").write_text("model: ["), "config.yaml"),
    ],
)
def test_a_damaged_run_is_named(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    run = make_run(tmp_path / "a")
    damage(run)
    with pytest.raises(UserError, match=says):
        points_of([run])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone: no such folder"):
        points_of([tmp_path / "gone"])
