"""A run that trained adapters: its model with them, and the run that it is once they are folded into the weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from lumina.checkpoint import store
from lumina.checkpoint.catalogue import RUN, abandoned
from lumina.config.resolve import Resolved, read, settle, write
from lumina.errors import UserError
from lumina.events import EventWriter, as_line
from lumina.model.lora import merge
from lumina.model.transformer import Transformer
from lumina.run.folder import Run
from lumina.run.lineage import lineage


@dataclass(frozen=True)
class Adapted:
    """The model of a run's newest complete checkpoint, in the dtype it was saved in, and the run's configuration."""

    transformer: Transformer
    checkpoint: store.Checkpoint
    resolved: Resolved


def load(run: Run) -> Adapted:
    """Loads the adapted model of a run. Raises `UserError` if it has no adapters, or no complete checkpoint yet."""
    resolved = read(run.config)
    config = resolved.config
    if not config.train.lora.rank:
        raise UserError(
            f"{run.path}: this run has no adapters, it trained the whole model",
            fix="name a run that was started with train.lora.rank above 0",
        )
    out = abandoned(run.checkpoints, lineage(run).counts)
    found, skipped = store.newest(run.checkpoints, without=out, own=run.id)
    if found is None:
        raise UserError(
            f"{run.path}: no complete checkpoint" + "".join(f"\n  {path.name}: {why}" for path, why in skipped),
            fix=f"let it train until it saves one: lumina resume {run.path}",
        )
    transformer = Transformer(config.model, lora=config.train.lora)
    transformer.cast(torch.bfloat16 if config.precision.mode == "bf16_pure" else torch.float32)
    store.load(found, transformer.tensors())
    return Adapted(transformer, found, resolved)


def merge_run(run: Run) -> tuple[Run, int]:
    """Writes `<run>-merged` beside a run: finished, without adapters, with one checkpoint. Returns it and its step.

    Raises `UserError` if that folder exists, or as `load` does.
    """
    target = run.path.resolve()
    target = target.with_name(f"{target.name}-merged")
    require_new(target)
    adapted = load(run)
    run.require_tokenizer()
    merge(adapted.transformer)
    aside = store.temporary(target)
    try:
        _write(run, adapted, Run(aside))
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Run(target), adapted.checkpoint.step


def require_new(path: Path) -> None:
    """Raises `UserError` if there is something at `path`."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path}: exists already", fix="move it away, or delete it")


def _write(run: Run, adapted: Adapted, merged: Run) -> None:
    """Everything that makes a folder a finished run. It answers no request: training it again is another run."""
    step = adapted.checkpoint.step
    merged.path.mkdir(parents=True)
    write(settle(adapted.resolved, {"train.lora.rank": (0, f"adapters merged, from {run.path.name}")}), merged.config)
    shutil.copytree(run.tokenizer, merged.tokenizer)
    facts = {key: value for key, value in run.read_meta().items() if key not in ("created", "id", "request")}
    merged.write_meta(facts | {"merged_from": run.path.name})
    store.save(merged.checkpoints, step, adapted.transformer.tensors(), {}, adapted.checkpoint.state | {RUN: merged.id})
    _write_events(run, step, merged)


def _write_events(run: Run, step: int, merged: Run) -> None:
    """The history that led to this checkpoint, and that it ends there."""
    history = [event for event in run.events() if event["t"] != "end" and event.get("step", 0) <= step]
    merged.event_log.write_text("".join(f"{as_line(event)}\n" for event in history), encoding="utf-8")
    with EventWriter(merged.event_log, max((event["attempt"] for event in history), default=0)) as events:
        events.emit("end", step=step, reason="done")
