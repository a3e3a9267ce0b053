"""`lumina lora`: a run with adapters becomes PEFT's files, or a finished run without them that every verb takes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support import settings

from lumina.cli import main
from lumina.config.resolve import read
from lumina.inference import engine
from lumina.run import index
from lumina.run.folder import Run
from lumina.training.endings import Stopped
from lumina.training.trainer import Trainer, resume

ADAPTED = {"train.lora.rank": 4, "train.lr": 0.03, "train.warmup": 0}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out if code == 0 else err)


@pytest.mark.parametrize(("kind", "mode"), [("dense", "fp32"), ("hybrid", "bf16_pure")])
def test_a_merged_run_writes_what_the_run_did(
    kind: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = settings(tmp_path, kind) | ADAPTED | {"precision.mode": mode}
    run = Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    capsys.readouterr()
    code, told = said(capsys, "lora", "merge", run.path.name, "--root", str(tmp_path / "runs"))
    assert code == 0
    merged = Run.open(Path(told["merged"]))
    assert merged.path.name == f"{run.path.name}-merged"
    assert told["step"] == 6
    assert merged.finished
    assert resume(merged) == merged
    config = read(merged.config).config
    assert config.train.lora.rank == 0
    assert config.model == read(run.config).config.model

    ours, theirs = (engine.load(one).transformer for one in (run, merged))
    ids = torch.arange(40).view(1, -1)
    tolerance = 1e-5 if mode == "fp32" else 5e-2
    torch.testing.assert_close(theirs.logits(ids), ours.logits(ids), rtol=tolerance, atol=tolerance)
    assert [*theirs.tensors()] == [*ours.base_tensors()]
    assert (merged.checkpoints / "latest").resolve() == (merged.checkpoints / "step-000006").resolve()
    assert main(["generate", str(merged.path), "-p", "line", "--max-tokens", "3"]) == 0
    capsys.readouterr()

    code, rows = said(capsys, "runs", "--root", str(tmp_path / "runs"))
    row = {row["name"]: row for row in rows}
    assert row[merged.path.name]["state"] == "finished"
    assert row[merged.path.name]["loss"] == row[run.path.name]["loss"]
    again = Trainer("tiny", root=tmp_path / "runs", **keys)
    assert again.fit() == run  # the merged run does not answer the request

    code, told = said(capsys, "lora", "merge", str(run.path))
    assert code == 2
    assert "exists already" in told["error"]["message"]
    code, told = said(capsys, "lora", "merge", str(merged.path))
    assert code == 2
    assert "no adapters" in told["error"]["message"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [run.path.name, merged.path.name]


def test_an_unfinished_run_is_merged_as_far_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    keys = settings(tmp_path, "dense") | ADAPTED
    with pytest.raises(Stopped) as stopped:
        Trainer("tiny", root=tmp_path / "runs", listeners=[stop], **keys).fit()
    run = stopped.value.run
    code, told = said(capsys, "lora", "merge", str(run.path))
    assert code == 0
    merged = Run.open(Path(told["merged"]))
    assert told["step"] == stopped.value.step
    assert merged.finished
    assert [event["reason"] for event in merged.events() if event["t"] == "end"] == ["done"]
    assert max(event.get("step", 0) for event in merged.events()) == told["step"]
    assert not run.finished
    assert resume(run).finished
    assert index.find(tmp_path / "runs", run.path.name) == run


def test_adapters_are_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Trainer("tiny", root=tmp_path / "runs", **settings(tmp_path, "dense") | ADAPTED).fit()
    capsys.readouterr()
    out = tmp_path / "deep" / "adapter"
    code, told = said(capsys, "lora", "export", run.path.name, "--out", str(out), "--root", str(tmp_path / "runs"))
    assert code == 0
    assert told == {"run": str(run.path), "step": 6, "out": str(out)}
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert main(["lora", "export", str(run.path), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["lora", "export", str(run.path), "--out", str(tmp_path / "other")]) == 0
    assert "at step 6" in capsys.readouterr().out
