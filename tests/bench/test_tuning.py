"""The table of what fine-tuning teaches: means, intervals, and differences inside a seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lumina.bench.tuning import ARMS, Outcome, Plan, _write_data, rows, said
from lumina.data.records import KINDS

F1 = {"base": (0.1, 0.3), "finetune": (0.5, 0.7), "interleaved": (0.4, 0.8)}


def outcomes() -> list[Outcome]:
    return [Outcome(arm, seed, F1[arm][seed], 3.0, 1.5, []) for arm in ARMS for seed in (0, 1)]


def test_differences_are_of_the_same_seed() -> None:
    """Both seeds of finetune are 0.4 above base: the difference has no interval, whatever the seeds differ by."""
    table = {name: cells for name, *cells in rows(outcomes())}
    assert table["base"][0] == "0.200 ± 1.271"  # t of one degree of freedom, 12.706, times 0.1414 / sqrt(2)
    assert table["finetune - base"][0] == "+0.400 ± 0.000"
    assert table["interleaved - finetune"][0] == "+0.000 ± 1.271"
    assert table["base"][1:] == ["3.000 ± 0.000", "1.500 ± 0.000"]


def test_one_seed_has_no_interval() -> None:
    table = {name: cells for name, *cells in rows([o for o in outcomes() if o.seed == 0])}
    assert table["finetune"][0] == "0.500"
    assert "2 seeds" in said(Plan(seeds=2))


def test_a_file_is_on_one_side_of_both_kinds(tmp_path: Path) -> None:
    asked = _write_data(tmp_path)
    lines = {
        f"{kind}.{side}": (tmp_path / f"{kind}.{side}.jsonl").read_text().splitlines()
        for kind in KINDS
        for side in ("train", "heldout")
    }
    assert all(lines.values())
    assert len(asked) == len(lines["chat.heldout"])
    assert 0.01 < len(lines["text.heldout"]) / len(lines["text.train"]) < 0.12
    texts = {json.loads(line)["text"] for line in lines["text.train"]}
    questions = {json.loads(line)["messages"][0]["content"] for line in lines["chat.train"]}
    assert not texts & {json.loads(line)["text"] for line in lines["text.heldout"]}
    assert not questions & {record.messages[0].content for record in asked}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_in_the_table(arm: str) -> None:
    assert arm in [name for name, *_ in rows(outcomes())]
