"""Forecasts of real runs: they change nothing, go on where they were, and nothing that befalls them befalls the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import history, same_tensors, settings

from lumina.config.resolve import read
from lumina.errors import UserError
from lumina.planner import calibration, keeping, laws
from lumina.planner.actual import compare
from lumina.run.folder import Run
from lumina.training import forecasting
from lumina.training.trainer import Trainer

STEPS = 48
SMALL: dict[str, Any] = {
    "model.width": 16, "model.layers": 1, "model.heads": 2, "model.kv_heads": 1, "model.head_dim": 8, "model.ffn": 32,
    "model.seq_len": 32, "train.batch_tokens": 64, "train.steps": STEPS, "train.eval_every": 12,
    "telemetry.log_every": 4, "checkpoint.every": 0, "orchestrator.probe_every": 0, "train.decay": 0.3,
}  # fmt: skip


def keys(folder: Path, **more: Any) -> dict[str, Any]:
    return settings(folder, "dense") | SMALL | {key.replace("__", "."): value for key, value in more.items()}


def forecasts(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k != "attempt"} for e in run.events() if e["t"] == "forecast"]


@pytest.fixture(autouse=True)
def _no_earlier_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests' runs taught is no concern of these."""
    monkeypatch.setattr(calibration, "path", lambda: tmp_path / "planner.json")


def test_a_run_is_told_its_end_on_the_way_and_held_against_it(tmp_path: Path) -> None:
    run = Trainer("tiny", root=tmp_path, **keys(tmp_path)).fit()
    told = forecasts(run)
    assert [event["step"] for event in told] == list(range(4, STEPS, 4))
    assert told[0]["early"]
    made = [event for event in told if event["refused"] is None]
    assert len(made) >= 6
    assert all(event["heldout"]["low"] < event["heldout"]["mid"] < event["heldout"]["high"] for event in made)
    assert made[0]["decay_now"]["saved"] == 34 - made[0]["step"]
    assert made[-1]["decay_now"] is None
    assert 0 < made[-1]["optimum"]["share"] < 1
    plan = json.loads((run.path / "plan.json").read_text())
    assert (plan["steps"], plan["tokens"], plan["missing"]) == (STEPS, STEPS * 64, {})
    assert plan["memory_before"] > 2**25
    found = compare(run.path)
    items = {item.name: item for item in found.items}
    assert all(item.forecast is not None and item.actual is not None for item in found.items)
    assert items["total"].actual > items["training"].actual > 0  # type: ignore[operator]
    assert len(found.trail) == len(made)
    (entry,) = calibration.load().entries
    assert entry.figures["step"] == pytest.approx(items["step"].actual)


def test_a_resumed_run_says_what_the_uninterrupted_one_says(tmp_path: Path) -> None:
    """Where it was killed and took steps again, though `plan.json` is lost and another run has taught since."""
    request = keys(tmp_path, checkpoint__every=14)
    whole = Trainer("tiny", root=tmp_path / "whole", **request).fit()
    calibration.path().unlink()

    def crash(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == 30:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        Trainer("tiny", root=tmp_path / "killed", listeners=[crash], **request).fit()
    (path,) = (tmp_path / "killed").glob("tiny-*")
    (path / "plan.json").unlink()
    keeping.keep(whole.path)
    killed = Trainer("tiny", root=tmp_path / "killed", **request).fit()
    assert Run(path) == killed
    assert forecasts(killed) == forecasts(whole)
    assert history(killed) == history(whole)


def test_nothing_that_befalls_a_forecast_befalls_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Trainer("tiny", root=tmp_path / "sound", **keys(tmp_path)).fit()

    def fault(*_: object) -> dict[str, Any]:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(forecasting, "outlook", fault)
    run = Trainer("tiny", root=tmp_path / "faulty", **keys(tmp_path)).fit()
    (told,) = forecasts(run)
    assert "ZeroDivisionError" in told["refused"]
    assert run.finished
    assert history(run) == history(sound)
    assert same_tensors(run, sound)


def test_what_cannot_be_kept_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UserError("planner.json: cannot be written")

    monkeypatch.setattr(calibration, "record", refuse)
    monkeypatch.setattr(forecasting, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    run = Trainer("tiny", root=tmp_path, **keys(tmp_path, train__steps=4)).fit()
    assert run.finished
    told = [event["error"] for event in run.events() if event["t"] == "incident"]
    assert ["plan.json" in told[0], "cannot be written" in told[1]] == [True, True]
    assert not (run.path / "plan.json").exists()


def test_what_is_laid_over_the_plan_is_known(tmp_path: Path) -> None:
    """Another learning rate makes another run of it: the points begin anew, and nothing is forecast until then."""
    from lumina.orchestrator.protocol import Decision
    from lumina.training import controls, session

    original = session.Session._step

    def acting(self: session.Session) -> None:
        original(self)
        if self.state.progress.step == 24 and self.state.attempt == 0:
            controls.SessionControls(self).overlay(Decision("test", "lr.scale=0.5"), "lr.scale", 0.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Session, "_step", acting)
        run = Trainer("tiny", root=tmp_path, **keys(tmp_path, checkpoint__every=12)).fit()
    refused = {event["step"]: event["refused"] for event in forecasts(run)}
    assert refused[20] is None
    assert "lr.scale=0.5" in refused[28]
    assert refused[44] is None


# -- train.tokens=chinchilla -----------------------------------------------------------------------------------------


def test_a_length_by_the_law_is_settled_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lumina.model.cost import count
    from lumina.telemetry.console import Console

    few = SMALL | {"model.width": 8, "model.heads": 1, "train.batch_tokens": 2**14, "train.eval_every": 0}
    request = {key: value for key, value in (settings(tmp_path, "dense") | few).items() if key != "train.steps"}
    run = Trainer("tiny", root=tmp_path, listeners=[Console()], **request, **{"train.tokens": "chinchilla"}).fit()
    resolved = read(run.config)
    law = laws.LAWS[laws.DEFAULT]
    wanted = law.tokens_for(laws.params_of(count(resolved.config.model), law))
    assert resolved.config.train.steps == round(wanted / 2**14)
    assert resolved.config.train.tokens is None
    origin = resolved.origins["train.steps"]
    assert origin.startswith("resolved: train.tokens=chinchilla: ")
    assert "besiroglu" in origin
    begun = next(event for event in run.events() if event["t"] == "run")
    unique = begun["data"]["tokens"]["train"]
    assert begun["epochs"]["epochs"] == pytest.approx(resolved.config.train.steps * 2**14 / unique, abs=1e-3)
    said = capsys.readouterr().out
    assert origin.removeprefix("resolved: ") in said
    assert "epochs" in said
