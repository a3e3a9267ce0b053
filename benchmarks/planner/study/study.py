"""The scaling study on the embedded corpus: one WSD run a size, with three cooldowns that branch off it.

    python benchmarks/planner/study/study.py train dense|moe FOLDER     # the runs, an hour of a core a kind
    python benchmarks/planner/study/study.py points FOLDER...           # runs.json, points-<kind>.csv
    python benchmarks/planner/study/study.py predict                    # prediction.json: the larger runs
    python benchmarks/planner/study/study.py larger dense|moe FOLDER    # trains what was predicted; larger-<kind>.json

A cooldown leaves the run behind a step, goes down linearly to 0 in a quarter of the steps so far (a fifth of its
length, as the decay of the run itself), and is evaluated on all held-out text; the run goes on as if it never had.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lumina.config.resolve import read, resolve
from lumina.model import cost
from lumina.planner.fit import fit
from lumina.planner.laws import Law
from lumina.planner.points import COLUMNS, read_points
from lumina.run.folder import Run
from lumina.training.controls import SessionControls
from lumina.training.session import Session
from lumina.training.trainer import Trainer

HERE = Path(__file__).parent
BATCH = 1024  # tokens
STEPS = 3520  # 3.6M tokens, of a text of 9M
SHARES = (1 / 8, 1 / 4, 1 / 2)  # of the tokens of a whole run, that its cooldowns have seen at their end
DECAY = 0.2
WIDTHS = {48: 1, 64: 2, 96: 2, 144: 3}  # and key-value heads
LARGER = (208, 1, 4400)  # width, key-value heads, steps
ALSO_NOW = 64  # up to this width, also an arm whose decay is as long as the run's, for "start the decay now"


def settings(kind: str, width: int, kv_heads: int, steps: int) -> dict[str, Any]:
    keys = {
        "model.kind": kind,
        "model.width": width,
        "model.heads": width // 16,
        "model.kv_heads": kv_heads,
        "model.seq_len": 128,
        "train.batch_tokens": BATCH,
        "train.steps": steps,
        "train.optimizer": "adamw",
        "train.lr": rate(width),
        "train.warmup": 0.03,
        "train.decay": DECAY,
        "train.eval_every": 880,
        "checkpoint.every": 880,
        "orchestrator.probe_every": 0,
    }
    return keys | ({"model.ffn": 2 * width} if kind == "dense" else {"model.moe.ffn": width})


def rate(width: int) -> float:
    """The learning rate of a width: see the README beside this for the sweep that it is from."""
    return 0.384 / width


def branches(steps: int) -> dict[int, int]:
    """The step that each cooldown leaves, and how many steps it takes; the first of them is the arm's own."""
    ends = [round(share * steps) for share in SHARES]
    return {round(end * (1 - DECAY)): end - round(end * (1 - DECAY)) for end in ends}


def train(kind: str, folder: Path) -> None:
    for width, kv_heads in WIDTHS.items():
        run(kind, width, kv_heads, folder)


def run(kind: str, width: int, kv_heads: int, folder: Path) -> Run:
    cooldowns, planned = branches(STEPS), round(DECAY * STEPS)
    step, found = Session._step, list[dict[str, Any]]()

    def stepping(session: Session) -> None:
        step(session)
        here = session.state.progress.step
        if here not in cooldowns:
            return
        with SessionControls(session).fork(0.0) as fork:
            arms = {"cooldown": cooldowns[here]}
            if width <= ALSO_NOW:
                arms["now"] = planned
            for name, steps in arms.items():
                outcome = fork.run(f"{name}-{here}", [], 1, steps - 1)
                found.append({"name": name, "step": here, "steps": here + steps, "loss": outcome.heldout})

    trainer = Trainer("tiny", root=folder, **settings(kind, width, kv_heads, STEPS))
    Session._step = stepping  # type: ignore[method-assign]
    try:
        done = trainer.fit()
    finally:
        Session._step = step  # type: ignore[method-assign]
    if not trainer.already_finished:
        (done.path / "cooldowns.json").write_text(json.dumps(found))
    return done


def points(folders: Sequence[Path]) -> None:
    """Every end of a run or of a cooldown, and every forecast of what the decay would cost if it began now."""
    rows = [
        _row(Run(path)) for folder in folders for path in sorted(folder.iterdir()) if (path / "cooldowns.json").exists()
    ]
    (HERE / "runs.json").write_text(json.dumps(rows, indent=1) + "\n")
    for kind in {row["kind"] for row in rows}:
        with (HERE / f"points-{kind}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for row in rows:
                if row["kind"] == kind:
                    writer.writerows((row["params"], tokens, loss) for tokens, loss in row["ends"])


def _row(run: Run) -> dict[str, Any]:
    config, events = read(run.config).config, run.events()
    cooled = json.loads((run.path / "cooldowns.json").read_text())
    final = [event for event in events if event["t"] == "eval"][-1]
    ends = [[one["steps"] * BATCH, one["loss"]] for one in cooled if one["name"] == "cooldown"]
    told = [event for event in events if event["t"] == "forecast"]
    return {
        "kind": config.model.kind,
        "width": config.model.width,
        "params": cost.count(config.model).active_mean,
        "lr": config.train.lr,
        "ends": [*ends, [final["tokens"], final["loss"]]],
        "now": [one | {"later": one["loss"] - final["loss"]} for one in cooled if one["name"] == "now"],
        "forecasts": [{key: event[key] for key in ("step", "heldout", "decay_now") if key in event} for event in told],
    }


def predict() -> None:
    """The held-out loss of the larger run of each kind that was studied, as its law has it."""
    found = {}
    for path in sorted(HERE.glob("points-*.csv")):
        kind = path.stem.removeprefix("points-")
        law = fit(read_points(path), 1000, 0, path.name, "active")
        found[kind] = _predicted(law, *_larger(kind))
    (HERE / "prediction.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def _predicted(law: Law, params: float, tokens: float) -> dict[str, Any]:
    low, mid, high = law.interval(lambda law: law.loss(params, tokens))
    return {"params": params, "tokens": tokens, "loss": mid, "80%": [low, high], "law": law.note}


def _larger(kind: str) -> tuple[float, float]:
    width, kv_heads, steps = LARGER
    config = resolve("tiny", settings(kind, width, kv_heads, steps)).config
    return cost.count(config.model).active_mean, steps * BATCH


def larger(kind: str, folder: Path) -> None:
    width, kv_heads, steps = LARGER
    run = Trainer("tiny", root=folder, **settings(kind, width, kv_heads, steps)).fit()
    final = [event for event in run.events() if event["t"] == "eval"][-1]
    told = {key: final[key] for key in ("tokens", "loss", "bpb", "heldout_tokens")} | {"params": _larger(kind)[0]}
    (HERE / f"larger-{kind}.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["train", kind, folder]:
            train(kind, Path(folder))
        case ["points", *folders]:
            points([Path(folder) for folder in folders])
        case ["predict"]:
            predict()
        case ["larger", kind, folder]:
            larger(kind, Path(folder))
        case _:
            sys.exit(__doc__)
