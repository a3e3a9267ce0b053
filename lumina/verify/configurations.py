"""What is varied when resuming is verified, and the settings of one configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumina.config.resolve import resolve
from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.verify.covering import Constraints, Row, broken, cover

STEPS, EVERY = 24, 4  # of a run, and between its checkpoints: an attempt is a second or two on `tiny`
DAMAGED = 3 * EVERY  # the checkpoint that the disk gives back with other bytes whenever it is written; not evaluated

# A factor that is a key takes its levels as values; the others are turned into keys by `settings`.
FACTORS = {
    "model.kind": ("dense", "moe", "mod", "hybrid"),
    "train.optimizer": ("muon", "adamw"),
    "precision.mode": ("fp32", "bf16", "fp16", "bf16_pure"),
    "micro-batches": ("x1", "x2", "x4"),
    "checkpoint.write": ("inline", "background"),
    "data.mode": ("base", "finetune", "hybrid_sequential", "hybrid_interleaved"),
}
READS: dict[str, tuple[str, ...]] = {"base": ("text",), "finetune": ("chat",)}  # the other modes read both


def array(preset: str) -> dict[str, Row]:
    """The configurations by name: every pair of levels occurs in one of them."""
    return {name_of(row): row for row in cover(FACTORS, constraints(preset))}


def named(preset: str, name: str) -> Row:
    """The configuration of this name, in the array or not. Raises `UserError` if there is none."""
    levels = name.split("-")
    row = dict(zip(FACTORS, levels, strict=False))
    known = len(levels) == len(FACTORS) and all(level in FACTORS[factor] for factor, level in row.items())
    if not known:
        choices = "-".join(f"({'|'.join(levels)})" for levels in FACTORS.values())
        raise UserError(f"--configuration {name}: no such configuration", fix=f"it is of the form {choices}")
    if problems := broken(row, constraints(preset)):
        raise UserError(f"--configuration {name}: {problems[0]}", fix="choose another one")
    return row


def name_of(row: Row) -> str:
    """`hybrid-muon-fp32-x2-base`"""
    return "-".join(row.values())


def constraints(preset: str) -> Constraints:
    """What cannot be combined with this preset."""
    config = resolve(preset).config
    sequences = config.train.batch_tokens // config.model.seq_len

    def divides(row: Row) -> bool:
        return sequences % _micro_batches(row) == 0

    rules: dict[str, Callable[[Row], bool]] = {
        f"micro-batches have to divide the {sequences} sequences of a batch": divides
    }
    return rules


def settings(preset: str, row: Row, data: Path) -> dict[str, Any]:
    """The keys of a run: short, with everything that is told and saved in it; it reads what `write_data` wrote."""
    keys: dict[str, Any] = {factor: level for factor, level in row.items() if "." in factor}
    files = {"text": str(data / "text.txt"), "chat": str(data / "chats.jsonl")}
    config: Config = resolve(preset).config
    sequences = config.train.batch_tokens // config.model.seq_len
    return keys | {
        "data.train": [files[kind] for kind in READS.get(row["data.mode"], ("text", "chat"))],
        "data.eval": [],
        "train.micro_batch": sequences // _micro_batches(row),
        "train.steps": STEPS,
        "train.eval_every": 2 * EVERY,
        "train.compile": "off",
        "orchestrator.mode": "advise",  # what does not go on as it was has to show, and not to be mended
        "orchestrator.probe_every": 6,
        "telemetry.log_every": 5,
        "checkpoint.every": EVERY,
        "parallel.threads": 1,
    }


def write_data(folder: Path) -> None:
    """A text of 600 counted lines and 200 conversations about sums: something to learn in some steps."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (f"line {i}: {'abc' * (i % 5)} and {i % 7} more words, {i * i % 11}\n" for i in range(600))
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for i in range(200):
            a, b = i % 10, i % 7
            said = [("user", f"What is {a} and {b}, number {i}?"), ("assistant", f"It is {a + b}.")]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}) + "\n")


def _micro_batches(row: Row) -> int:
    return int(row["micro-batches"].removeprefix("x"))
