"""What the loop does around a step."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import same_tensors, settings

from lumina.checkpoint import store
from lumina.cli import main
from lumina.config.resolve import resolve
from lumina.data.loader import Batch, Loader
from lumina.data.tokenizer import train_bpe
from lumina.errors import UserError
from lumina.run.exit_codes import MACHINE_FAILED
from lumina.run.folder import Run
from lumina.training import setup
from lumina.training.evaluate import Evaluation
from lumina.training.session import Session
from lumina.training.trainer import Trainer, resume


def losses(folder: Path, **keys: Any) -> list[float]:
    """The losses of the four steps of a tiny hybrid with these keys."""
    request = settings(folder) | {"train.steps": 4, "checkpoint.every": 0} | keys
    run = Trainer("tiny", root=folder / "runs", fresh=True, **request).fit()
    return [event["loss"] for event in run.events() if event["t"] == "step"]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.lr", 1e-4), ("train.optimizer", "adamw"), ("train.schedule", "cosine"), ("train.warmup", 2),
        ("train.decay", 0), ("train.weight_decay", 5.0), ("train.betas", [0.5, 0.6]), ("train.eps", 1e-2),
        ("train.clip", 1e-3), ("train.z_loss", 10.0), ("train.seed", 1), ("precision.mode", "bf16"),
        ("precision.mode", "fp16"), ("precision.mode", "bf16_pure"),
        ("model.rope_theta", 10.0), ("model.tied", False), ("model.mod.capacity", 0.5), ("model.mod.every", 1),
        ("model.mod.anneal", 2),
        ("model.mod.routing", "random"), ("model.mod.routing", "static"),
        ("model.moe.top_k", 3), ("model.moe.shared", 1), ("model.moe.bias_rate", 10.0),
        ("model.moe.score", "softmax"), ("model.moe.normalise", False), ("model.moe.temperature", 0.1),
        ("model.moe.balance", 10.0), ("model.moe.seq_balance", 10.0), ("model.moe.z_loss", 10.0),
        ("model.moe.capacity", 0.5), ("model.moe.dropout", 0.5), ("model.moe.dense_layers", 1),
        ("train.batch_tokens", 1024), ("train.lora.rank", 4),
    ],
)  # fmt: skip
def test_every_setting_changes_the_run(key: str, value: Any, usual: list[float], tmp_path: Path) -> None:
    assert losses(tmp_path, **{key: value}) != usual


@pytest.mark.parametrize(
    ("key", "values", "seen"),
    [
        ("orchestrator.mode", ("off", "advise"), (False, True)),
        ("orchestrator.snapshot_every", (0, 2), ([], [4, 6])),
        ("orchestrator.trial.budget", (0.0, 0.5), (0.0, 4.0)),
    ],
)
def test_every_setting_of_the_orchestrator_shows(
    key: str, values: tuple[Any, ...], seen: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    step = Session._step

    def stepping(session: Session) -> None:
        step(session)
        if session.state.progress.step == 7:
            points = [point.state["progress"].step for point in session.ways.points]
            watching = session.oversight.orchestrator
            left = watching.policy.left if watching else None
            shown = {"mode": session.course.invariants is not None, "snapshot_every": points, "budget": left}
            found.append(shown[key.rpartition(".")[2]])

    monkeypatch.setattr(Session, "_step", stepping)
    runs = [losses(tmp_path, **{"train.steps": 8, key: value}) for value in values]
    assert tuple(found) == seen
    assert runs[0] == runs[1]


def test_alpha_changes_a_run_with_adapters(tmp_path: Path) -> None:
    runs = [losses(tmp_path, **{"train.lora.rank": 4, "train.lora.alpha": alpha}) for alpha in (32, 64)]
    assert runs[0] != runs[1]


def test_the_seed_is_of_weights_and_of_data_order(tmp_path: Path) -> None:
    def parts(seed: int) -> setup.Parts:
        resolved = resolve("tiny", settings(tmp_path, train__seed=seed))
        corpus = setup.load_data(resolved.config)
        return setup.build(setup.settle_all(resolved, corpus)[0].config, corpus)

    first, second = parts(0), parts(1)
    assert not torch.equal(first.model.embed.weight, second.model.embed.weight)
    assert first.loader.ids(0).tolist() != second.loader.ids(0).tolist()


def test_data_goes_with_settings_in_either_form(tmp_path: Path) -> None:
    for given in (["train.steps=3"], {"train.steps": 3}):
        config = Trainer("tiny", given, data=["a.txt", "b, c.txt"]).resolved.config
        assert config.data.train == ("a.txt", "b, c.txt")
        assert config.train.steps == 3
    with pytest.raises(TypeError, match="not both"):
        Trainer("tiny", ["train.steps=3"], **{"train.lr": 1.0})


def test_another_tokenizer_under_the_same_name_is_another_request(tmp_path: Path) -> None:
    keys = settings(tmp_path, data__tokenizer=str(tmp_path / "tokenizer.json"))
    text = (tmp_path / "text.txt").read_text()
    runs = []
    for vocab in (260, 300):
        train_bpe([text], vocab).save(tmp_path)
        runs.append(Trainer("tiny", root=tmp_path / "runs", **keys).fit())
    assert runs[0] != runs[1]


def test_an_interrupt_before_training_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "write_meta", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Trainer("tiny", root=tmp_path / "runs", **settings(tmp_path)).fit()
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_with_relative_data_says_where_it_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["t"] == "step":
            raise RuntimeError("power cut")

    keys = settings(tmp_path) | {"data.train": "text.txt"}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError):
        Trainer("tiny", listeners=[stop], **keys).fit()
    (run,) = (tmp_path / "runs").iterdir()
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    with pytest.raises(UserError, match=f"started in {tmp_path}"):
        resume(Run(run))


def test_a_damaged_run_beside_is_not_in_the_way(tmp_path: Path) -> None:
    keys = settings(tmp_path)
    first = Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    first.meta.write_text("")
    assert Trainer("tiny", root=tmp_path / "runs", **keys).fit() != first


def test_router_biases_move_until_the_decay_begins_and_rest_then(tmp_path: Path) -> None:
    keys = settings(tmp_path, "moe") | {
        "train.steps": 8,
        "train.decay": 0.5,
        "checkpoint.every": 1,
        "checkpoint.keep_last": 10,
    }
    run = Trainer("tiny", root=tmp_path / "runs", **keys).fit()

    def bias(step: int) -> torch.Tensor:
        (file,) = (store.folder(run.checkpoints, step) / "model").glob("*.safetensors")
        return torch.stack([tensor for name, tensor in load_file(file).items() if name.endswith("bias_E")])

    assert not torch.equal(bias(3), bias(4))
    assert torch.equal(bias(4), bias(5))
    assert torch.equal(bias(4), bias(8))


def scripted(monkeypatch: pytest.MonkeyPatch, results: list[tuple[float, bool]]) -> None:
    """Evaluations with these losses; False marks one that is not comparable."""
    script = iter(results)

    def evaluate(*_: Any) -> Evaluation:
        loss, comparable = next(script)
        return Evaluation(loss, 1.0, 0.0, 1.0, 1, [], comparable)

    monkeypatch.setattr("lumina.training.oom.evaluate", evaluate)


def shape(run: Run) -> tuple[list[str], str, str]:
    folders = sorted(path.name for path in run.checkpoints.iterdir() if not path.is_symlink())
    return folders, *(os.readlink(run.checkpoints / name) for name in ("latest", "best"))  # type: ignore[return-value]


EVALUATED = {"train.steps": 10, "train.eval_every": 2, "checkpoint.every": 2, "checkpoint.keep_last": 1}
LOSSES = [(3.0, True), (1.0, True), (0.5, False), (math.nan, True), (2.0, True)]


def test_best_is_the_lowest_comparable_loss_and_keep_last_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, LOSSES)
    run = Trainer("tiny", root=tmp_path / "runs", **(settings(tmp_path) | EVALUATED)).fit()
    assert shape(run) == (["step-000004", "step-000010"], "step-000010", "step-000004")


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("checkpoint.keep_last", 1, [4, 10]),
        ("checkpoint.every", 0, [10]),
        ("checkpoint.keep_last", 3, [4, 6, 8, 10]),
        ("checkpoint.keep_best", 3, [2, 4, 10]),
        ("checkpoint.keep_every", 3, [4, 6, 10]),
    ],
)
def test_what_stays_on_the_disk_is_as_configured(
    key: str, value: int, kept: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, LOSSES)
    run = Trainer("tiny", root=tmp_path / "runs", **(settings(tmp_path) | EVALUATED | {key: value})).fit()
    assert sorted(map(store.step_of, store.checkpoints(run.checkpoints))) == kept


def test_a_crash_between_a_checkpoint_and_its_best_link_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, point = settings(tmp_path) | EVALUATED, store.point

    def crash(root: Path, name: str, step: int) -> None:
        if (name, step) == ("best", 4):
            raise RuntimeError("power cut")
        point(root, name, step)

    scripted(monkeypatch, LOSSES)
    trainer = Trainer("tiny", root=tmp_path / "runs", **keys)
    with monkeypatch.context() as patch:
        patch.setattr(store, "point", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            trainer.fit()
    scripted(monkeypatch, LOSSES[2:])
    run = Trainer("tiny", root=tmp_path / "runs", **keys).fit()
    assert shape(run) == (["step-000004", "step-000010"], "step-000010", "step-000004")


def test_when_every_checkpoint_is_damaged_nothing_begins_again_unasked(tmp_path: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == 3:
            raise RuntimeError("power cut")

    keys = settings(tmp_path)
    with pytest.raises(RuntimeError):
        Trainer("tiny", root=tmp_path / "runs", listeners=[stop], **keys).fit()
    (run,) = (Run(path) for path in (tmp_path / "runs").iterdir())
    state = store.folder(run.checkpoints, 2) / store.STATE
    state.write_text(state.read_text() + " ")
    with pytest.raises(UserError, match=r"every checkpoint is damaged(.|\n)*step-000002(.|\n)*--fresh"):
        resume(run)
    assert state.exists()


def test_an_error_of_the_machine_is_said_and_another_start_gets_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = settings(tmp_path, "dense")
    whole = Trainer("tiny", root=tmp_path / "whole", **keys).fit()
    batch = Loader.batch

    def stale(loader: Loader, i: int, *rest: Any) -> Batch:
        if i == 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/data/shard-0")
        return batch(loader, i, *rest)

    command = ["train", "tiny", *(f"{key}={value}" for key, value in keys.items()), "--root", str(tmp_path / "runs")]
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "batch", stale)
        assert main(command) == MACHINE_FAILED
    (run,) = (Run(path) for path in (tmp_path / "runs").iterdir())
    said = capsys.readouterr().err
    assert f"error: /data/shard-0: {os.strerror(errno.ESTALE)}" in said
    assert f"lumina resume {run.path}" in said
    assert "Traceback" not in said
    assert main(command) == 0
    assert same_tensors(run, whole)
