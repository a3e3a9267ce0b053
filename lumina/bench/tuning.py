"""Does fine-tuning teach to answer, and what does it cost? Base models, fine-tuned and interleaved, over several seeds.

Texts are the standard library's sources, conversations the questions and answers about it. Whole files (with their
near-duplicates) are held out of both, so that no model has read the function that it is asked about. All models of a
seed begin with the same base weights and take equally many steps more.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lumina.bench.answers import token_f1
from lumina.data.files import find_files
from lumina.data.formats import read_files
from lumina.data.records import KINDS, Kind, Problems, Record
from lumina.inference.conversation import Conversation
from lumina.inference.engine import load
from lumina.inference.sampler import Sampler
from lumina.progress import Tell, silent, tracked
from lumina.run.folder import Run
from lumina.training.trainer import Trainer

HELD_OUT = 20  # one of so many groups of families
ANSWER_TOKENS = 48
ARMS = ("base", "finetune", "interleaved")
HEADER = ("model", "token F1", "held-out answers, nats a token", "held-out text, bits per byte")
# Student's t, two-sided 95 %, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Plan:
    """How long, how fast and how often."""

    seeds: int = 3
    base_steps: int = 300
    tune_steps: int = 100
    lr: float = 2e-3
    base_ratio: float = 0.5
    questions: int = 100


@dataclass(frozen=True)
class Outcome:
    """One model: mean F1 of its answers to held-out questions, and its losses on held-out answers and text."""

    arm: str
    seed: int
    f1: float
    chat_loss: float
    text_bpb: float
    answers: list[dict[str, str]]


def measure(plan: Plan, folder: Path, settings: dict[str, Any], progress: Tell = silent) -> list[Outcome]:
    """Trains and asks all models; runs and data lie in `folder`."""
    asked = _write_data(folder)[: plan.questions]
    outcomes = []
    for seed in tracked(range(plan.seeds), "training and asking", plan.seeds, progress):
        runs = _train(plan, folder, seed, settings)
        outcomes += [_outcome(arm, seed, run, asked) for arm, run in runs.items()]
    return outcomes


def _train(plan: Plan, folder: Path, seed: int, settings: dict[str, Any]) -> dict[str, Run]:
    files = {f"{kind}.{side}": str(folder / f"{kind}.{side}.jsonl") for kind in KINDS for side in ("train", "heldout")}
    common = {"data.eval": [files["text.heldout"], files["chat.heldout"]], "train.seed": seed, **settings}
    text, chat = files["text.train"], files["chat.train"]
    base = _fit(folder, common | {"data.train": text, "train.steps": plan.base_steps})
    tuned = common | {"train.init_from": str(base.path), "train.steps": plan.tune_steps, "train.lr": plan.lr}
    both = {"data.train": [text, chat], "data.mode": "hybrid_interleaved", "data.base_ratio": plan.base_ratio}
    return {
        "base": base,
        "finetune": _fit(folder, tuned | {"data.train": chat, "data.mode": "finetune"}),
        "interleaved": _fit(folder, tuned | both),
    }


def _fit(folder: Path, keys: dict[str, Any]) -> Run:
    return Trainer("debug", root=folder / "runs", **keys).fit()


def _outcome(arm: str, seed: int, run: Run, asked: Sequence[Record]) -> Outcome:
    last = {event["data"]: event for event in run.events() if event["t"] == "eval"}
    model = replace(load(run), talks=True)  # the base model is asked in the same form
    answers = []
    for record in asked:
        question, reference = (message.content for message in record.messages)
        conversation = Conversation(model, Sampler(temperature=0), ANSWER_TOKENS, seed=0)
        answers.append(
            {"question": question, "reference": reference, "answer": conversation.answer(question, len).text}
        )
    f1 = statistics.mean(token_f1(answer["answer"], answer["reference"]) for answer in answers)
    return Outcome(arm, seed, f1, last["chat"]["loss"], last["text"]["bpb"], answers)


def _write_data(folder: Path) -> list[Record]:
    """Four files of JSON lines in `folder`; returns the held-out conversations, in the order of their hash."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = Problems()
    records = list(read_files(find_files(["sample", "sample_chat"], problems), problems))
    problems.raise_any()
    heldout: list[Record] = []
    for kind in KINDS:
        mine = [record for record in records if record.kind == kind and record.content]
        sides = {"train": [r for r in mine if not _held_out(r)], "heldout": [r for r in mine if _held_out(r)]}
        for side, some in sides.items():
            (folder / f"{kind}.{side}.jsonl").write_text(_lines(kind, some), encoding="utf-8")
        heldout = sides["heldout"]
    return sorted(heldout, key=lambda record: replace(record, family="").key)


def _held_out(record: Record) -> bool:
    return (record.key >> 48) % HELD_OUT == 0


def _lines(kind: Kind, records: Iterable[Record]) -> str:
    if kind == "text":
        return "".join(json.dumps({"text": record.text}) + "\n" for record in records)
    return "".join(json.dumps({"messages": [m._asdict() for m in record.messages]}) + "\n" for record in records)


def said(plan: Plan) -> str:
    """How it was measured, in a sentence."""
    return (
        f"Means over {plan.seeds} seeds, half of their 95 % interval (Student's t), differences paired by seed. "
        f"{plan.base_steps} steps on texts, then {plan.tune_steps} at a peak rate of {plan.lr:g}: on conversations "
        f"alone, or on {plan.base_ratio:.0%} texts. {plan.questions} held-out questions, answered greedily."
    )


def rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """One row an arm, for `HEADER`; then the differences, paired by seed."""
    arms = {arm: [o for o in outcomes if o.arm == arm] for arm in ARMS}
    found = [[arm, *(_interval([getattr(o, key) for o in own]) for key in KEYS)] for arm, own in arms.items()]
    for first, second in (("finetune", "base"), ("interleaved", "base"), ("interleaved", "finetune")):
        pairs = list(zip(arms[first], arms[second], strict=True))
        differences = [_interval([getattr(a, key) - getattr(b, key) for a, b in pairs], sign="+") for key in KEYS]
        found.append([f"{first} - {second}", *differences])
    return found


KEYS = ("f1", "chat_loss", "text_bpb")


def _interval(values: Sequence[float], sign: str = "") -> str:
    """`0.310 ± 0.020`: mean and half of the 95 % interval (Student's t)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:{sign}.3f}"
    half = T95.get(len(values) - 1, 2.0) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:{sign}.3f} ± {half:.3f}"


def as_json(plan: Plan, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {"plan": asdict(plan), "outcomes": [asdict(outcome) for outcome in outcomes]}
