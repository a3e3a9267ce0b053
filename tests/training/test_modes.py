"""The four ways to train, and what a run may begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import settings, write_chats

from lumina.checkpoint import store
from lumina.errors import UserError
from lumina.run.folder import Run
from lumina.training.trainer import Trainer, resume


def keys(folder: Path, mode: str, **changes: Any) -> dict[str, Any]:
    """A tiny dense run in this mode; the mode decides which of texts and conversations it reads."""
    given = settings(folder, "dense", data__mode=mode, train__steps=6, checkpoint__every=0)
    text, chat = given["data.train"], str(write_chats(folder))
    given["data.train"] = {"base": [text], "finetune": [chat]}.get(mode, [text, chat])
    return given | changes


def fit(folder: Path, mode: str, **changes: Any) -> Run:
    return Trainer("tiny", root=folder / "runs", **keys(folder, mode, **changes)).fit()


def of(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["t"] == kind]


def weights(run: Run) -> dict[str, torch.Tensor]:
    newest = store.newest(run.checkpoints)[0]
    assert newest is not None
    return {k: v for file in (newest.path / "model").glob("*.safetensors") for k, v in load_file(file).items()}


def test_each_mode_evaluates_what_it_holds_out(tmp_path: Path) -> None:
    seen = {mode: of(fit(tmp_path, mode), "eval") for mode in ("base", "finetune", "hybrid_interleaved")}
    assert {mode: {event["data"] for event in events} for mode, events in seen.items()} == {
        "base": {"text"},
        "finetune": {"chat"},
        "hybrid_interleaved": {"text", "chat"},
    }
    for events in seen.values():  # one of them decides which checkpoint is best
        assert [event["split"] for event in events].count("heldout") == 1
    both = {event["data"]: event["split"] for event in seen["hybrid_interleaved"]}
    assert both == {"text": "heldout", "chat": "heldout chat"}


def test_a_fine_tuned_run_can_watch_what_it_forgets(tmp_path: Path) -> None:
    base = keys(tmp_path, "base")["data.train"]
    (tmp_path / "asked.jsonl").write_text('{"prompt": "What is 1 and 1?", "completion": "It is 2."}\n')
    run = fit(tmp_path, "finetune", **{"data.eval": [*base, str(tmp_path / "asked.jsonl")]})
    assert {event["data"]: event["split"] for event in of(run, "eval")} == {"chat": "heldout", "text": "heldout text"}


def test_sequential_is_two_planned_phases_each_with_its_own_warm_up(tmp_path: Path) -> None:
    run = fit(tmp_path, "hybrid_sequential", **{"data.base_ratio": 0.5, "train.steps": 8, "train.warmup": 2})
    assert [(e["step"], e["data"], e["steps"], e["phase"], e["of"]) for e in of(run, "phase")] == [
        (1, "text", 4, 1, 2),
        (5, "chat", 4, 2, 2),
    ]
    rates = [event["lr"] for event in of(run, "step")]
    assert rates[:4] == rates[4:]
    assert rates[0] == pytest.approx(rates[1] / 2)


def test_phases_of_ones_own(tmp_path: Path) -> None:
    phases = [{"at": 0, "data": "text"}, {"at": 2, "data": "both", "lr": 1e-4, "warmup": 0}, {"at": 4, "data": "chat"}]
    run = fit(tmp_path, "hybrid_interleaved", **{"train.phases": phases})
    assert [(event["step"], event["data"]) for event in of(run, "phase")] == [(1, "text"), (3, "both"), (5, "chat")]
    assert of(run, "step")[2]["lr"] == pytest.approx(1e-4)


def test_a_run_begins_with_the_weights_of_another(tmp_path: Path) -> None:
    base = fit(tmp_path, "base", **{"model.width": 40, "train.seed": 3})
    lr = {"train.lr": 1e-12, "train.steps": 1}
    tuned = fit(tmp_path, "finetune", **{"train.init_from": str(base.path), **lr})
    before, after = weights(base), weights(tuned)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert (tuned.tokenizer / "tokenizer.json").read_bytes() == (base.tokenizer / "tokenizer.json").read_bytes()
    assert f"init_from: {store.folder(base.checkpoints, 6)}" in tuned.config.read_text()
    assert "width: 40" in tuned.config.read_text()


def test_the_checkpoint_may_be_named_and_a_newer_one_is_another_request(tmp_path: Path) -> None:
    base = fit(tmp_path, "base", **{"checkpoint.every": 2, "checkpoint.keep_last": 3})
    early = fit(tmp_path, "finetune", **{"train.init_from": str(store.folder(base.checkpoints, 2))})
    late = fit(tmp_path, "finetune", **{"train.init_from": str(base.path)})
    assert of(early, "step")[0]["loss"] != of(late, "step")[0]["loss"]
    again = Trainer("tiny", root=tmp_path / "runs", **keys(tmp_path, "finetune", **{"train.init_from": str(base.path)}))
    assert again.fit() == late
    assert again.already_finished


def test_a_run_that_stopped_before_its_first_checkpoint_begins_with_them_again(tmp_path: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == 2:
            raise RuntimeError("power cut")

    base = fit(tmp_path, "base")
    request = keys(tmp_path, "finetune", **{"train.init_from": str(base.path)})
    whole = Trainer("tiny", root=tmp_path / "whole", **request).fit()
    with pytest.raises(RuntimeError):
        Trainer("tiny", root=tmp_path / "cut", listeners=[stop], **request).fit()
    (cut,) = (Run(path) for path in (tmp_path / "cut").iterdir())
    resume(cut)
    assert [event["loss"] for event in of(cut, "step")] == [event["loss"] for event in of(whole, "step")]


def test_adapters_begin_with_a_run_and_leave_its_weights(tmp_path: Path) -> None:
    base = fit(tmp_path, "base")
    tuned = fit(tmp_path, "finetune", **{"train.init_from": str(base.path), "train.lora.rank": 2})
    before, after = weights(base), weights(tuned)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(".b" in name and after[name].any() for name in after.keys() - before.keys())
    with pytest.raises(UserError, match="holds adapters") as caught:
        fit(tmp_path, "finetune", **{"train.init_from": str(tuned.path), "train.steps": 7})
    assert "lumina lora merge" in caught.value.fix


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.init_from": "no-such-run"}, "no-such-run: no such run"),
        ({"train.init_from": "BASE", "model.width": 48}, "saved from another model"),
        ({"train.init_from": "BASE", "data.tokenizer": "OTHER"}, "another tokenizer than that of train.init_from"),
    ],
)
def test_what_it_cannot_begin_with(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = fit(tmp_path, "base")
    other = fit(tmp_path, "base", **{"model.vocab": 280})
    names = {"BASE": str(base.path), "OTHER": str(other.tokenizer)}
    runs = len(list((tmp_path / "runs").iterdir()))
    with pytest.raises(UserError, match=said):
        fit(tmp_path, "finetune", **{key: names.get(value, value) for key, value in changes.items()})
    assert len(list((tmp_path / "runs").iterdir())) == runs


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.base_ratio", 0.2), ("data.train_on", "all"), ("data.mode", "hybrid_sequential"),
     ("train.phases", [{"at": 0, "data": "chat"}])],
)  # fmt: skip
def test_every_setting_of_the_data_changes_the_run(key: str, value: Any, tmp_path: Path) -> None:
    usual = fit(tmp_path, "hybrid_interleaved")
    changed = fit(tmp_path, "hybrid_interleaved", **{key: value})
    assert [event["loss"] for event in of(usual, "step")] != [event["loss"] for event in of(changed, "step")]


def test_weights_of_sources_change_the_run(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("".join(f"quite another text, {i * i}\n" for i in range(900)))
    first = keys(tmp_path, "base")["data.train"][0]
    other = tmp_path / "other.txt"
    runs = [
        fit(tmp_path, "base", **{"data.train": [f"{first}:{weight}", f"{other}:{1 - weight:.1f}"]})
        for weight in (0.9, 0.1)
    ]
    assert [e["loss"] for e in of(runs[0], "step")] != [e["loss"] for e in of(runs[1], "step")]
    assert [source["weight"] for source in of(runs[0], "run")[0]["data"]["sources"]] == [0.9, 0.1]
