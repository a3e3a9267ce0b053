"""Decisions go out as events and come back as an incident report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from watched import replay, seen, watched

from lumina.events import EventWriter, parse
from lumina.orchestrator.diagnosis import diagnose
from lumina.orchestrator.finding import Finding
from lumina.orchestrator.ledger import decision, entries, outcome, told
from lumina.orchestrator.policy import Choice, Open
from lumina.orchestrator.protocol import Decision

BLOCK = {"id": "data.skip@251:250+51", "key": "data.skip", "value": [250, 51], "begin": 251, "end": None}


def made() -> Decision:
    signals = watched(300)
    signals.observe(seen(301, loss=math.nan, grad_norm=math.nan, skipped=True))
    values = {"loss": math.nan, "smoothed": 3.52, "threshold": 0.3, "shape": (1, 2)}
    finding = Finding("divergence", 301, 290, "for 62 steps the loss is 1.5 nats above its best", True, values)
    why = diagnose(finding, replay(301, 3.5, 3.4, math.nan), signals)
    one = decision(finding, why, Choice("rewind_skip", True, "back to step 250", 250), signals)
    one.evidence["step"] = 301
    return one


def written(path: Path) -> list[dict[str, object]]:
    """A log as a run writes it: the way back is told by the `run` event of the next attempt."""
    log = path / "events.jsonl"
    with EventWriter(log, 0) as events:
        events.emit("step", step=300, loss=2.0)
        events.emit("decision", step=120, kind="advise", rule="spike", action="watch", evidence={}, reason="Wait.")
        events.emit("decision", step=200, **Decision("hand", "lr.scale=0.5", {}, "as I like", ["x"]).fields())
        events.attempt = 1
        events.emit("run", step=250, reason="rollback", parent_step=250, why=made().fields(), overlays=[BLOCK])
        events.emit("run", step=250, reason="resume", parent_step=250, why=None)
        events.emit("decision", step=401, **outcome(Open("divergence", "rewind_skip", 301, 401), 401))
    return [event for line in log.read_bytes().splitlines() if (event := parse(line)) is not None]


def test_a_log_gives_back_every_decision_also_of_attempts_that_were_undone(tmp_path: Path) -> None:
    spike, hand, back = entries(written(tmp_path))
    assert (spike.kind, spike.undo, spike.undone, spike.cause) == ("advise", [], "", "")
    assert (hand.rule, hand.action, hand.links) == ("hand", "lr.scale=0.5", ["x"])
    assert (back.step, back.attempt, back.kind, back.action) == (301, 1, "act", "rewind_skip")
    assert (hand.undo, back.undo, back.state) == ([], ["data.skip@251:250+51"], "in force")
    assert back.evidence["finding"]["since"] == 290
    assert back.evidence["diagnosis"]["replay"]["same"] is True
    assert len(back.evidence["window"]["loss"]) == 24
    assert back.evidence["window"]["loss"][-1] is None  # it was not finite
    assert "has held" in back.outcome
    json.dumps(back.fields())


def test_what_several_events_tell_of_one_decision_is_one_entry() -> None:
    short = {"kind": "act", "rule": "non_finite", "action": "skip_step", "evidence": {"loss": 1.0}}
    long = short | {"kind": "advise", "evidence": {"diagnosis": {"cause": "hardware"}}, "reason": "Because."}
    told = ((5, short), (5, long), (6, short), (7, short), (9, short))
    one, two = entries({"t": "decision", "attempt": 0, "step": step} | event for step, event in told)
    assert (one.kind, one.cause, one.evidence["loss"], one.reason) == ("act", "hardware", 1.0, "Because.")
    assert (one.step, one.last, two.step, two.last) == (5, 7, 9, 0)  # step after step is one entry, too


def test_what_was_laid_over_the_plan_is_undone_by_its_name_until_it_is() -> None:
    one = {"id": "qk_clip=100@6", "key": "qk_clip", "value": 100, "begin": 6, "end": 6}
    two = {"id": "clip=0.5@8", "key": "clip", "value": 0.5, "begin": 8, "end": None}
    by_hand = {"t": "decision", "attempt": 0, "rule": "hand", "kind": "act"}
    log = [
        by_hand | {"step": 5, "action": "qk_clip", "overlays": [one]},
        by_hand | {"step": 7, "action": "clip=0.5", "overlays": [one, two]},
    ]
    assert [(entry.undo, entry.state) for entry in entries(log)] == [
        (["qk_clip=100@6"], "done once"),
        (["clip=0.5@8"], "in force"),
    ]
    undo = by_hand | {"action": "undo=clip", "evidence": {}}
    log.append({"t": "run", "attempt": 1, "step": 7, "parent_step": 7, "why": undo, "overlays": [one]})
    assert [(entry.undo, entry.state) for entry in entries(log)] == [
        (["qk_clip=100@6"], "done once"),
        ([], "undone"),
        ([], ""),
    ]


def test_two_ways_back_from_one_step_are_two_decisions_and_each_has_what_undoes_it() -> None:
    """The plan is put back in the attempt that ends, and the way back is told by the one that begins."""
    why = {"kind": "act", "rule": "invariant", "action": "rewind_replay", "evidence": {"step": 7}}
    blocks = [BLOCK, {**BLOCK, "id": "data.skip@301:301+2", "begin": 301}]
    skip = {"kind": "act", "rule": "invariant", "action": "rewind_skip", "evidence": {"step": 7}}
    log = [
        event
        for n in range(2)
        for event in (
            {"t": "decision", "attempt": n, "step": 8, **why},
            {"t": "run", "attempt": n + 1, "step": 6, "why": why, "overlays": []},
        )
    ]
    log.append({"t": "run", "attempt": 3, "step": 6, "why": skip, "overlays": blocks})
    found = entries(log)
    assert [(one.attempt, one.action) for one in found] == [(1, why["action"]), (2, why["action"]), (3, skip["action"])]
    assert found[2].undo == [block["id"] for block in blocks]
    log.append(
        {"t": "run", "attempt": 4, "step": 6, "why": {"rule": "hand", "action": "undo=x"}, "overlays": blocks[1:]}
    )
    assert entries(log)[2].undo == ["data.skip@301:301+2"]  # the rest is still to be undone


@pytest.mark.parametrize(
    ("rule", "action", "undone"),
    [
        ("non_finite", "skip_step", "nothing: the guard let the step move nothing"),
        ("divergence", "rewind_replay", "nothing: the same batches are read again"),
        ("divergence", "stop", "lumina resume RUN"),
        ("hand", "rewind=4", "nothing: the same batches are read again"),
        ("hand", "undo=lr.scale", "ask for it again"),
        ("hand", "lift=lr.scale", "lay it down again"),
        ("hand", "stop", "lumina resume RUN"),
    ],
)
def test_what_undoes_each_kind_of_decision_is_said(rule: str, action: str, undone: str) -> None:
    (entry,) = entries([{"t": "decision", "step": 5, "rule": rule, "action": action, "kind": "act"}])
    assert entry.undone == undone
    assert told(entry).splitlines()[-1] == f"  undo      {undone}"


def test_events_that_are_none_of_ours_are_passed_over() -> None:
    odd = [{"t": "decision"}, {"t": "run", "why": "x"}, {"t": "decision", "rule": "x"}, {"t": "end", "action": "x"}]
    assert entries(odd) == []


def test_it_reads_like_an_incident_report(tmp_path: Path) -> None:
    text = told(entries(written(tmp_path))[-1])
    first, *rest = text.splitlines()
    assert first == "step 301, attempt 1: divergence -> go back and leave the batches out (done)"
    for word in ("began     step 290", "cause     ", "why       Step 301: for 62 steps",
                 "step 301 came to 3.5, the same to the bit",
                 "loss      ", "Back to step 250.", "outcome   ",
                 "is now    in force", "undo      data.skip@251:250+51",
                 "smoothed 3.52, threshold 0.3"):  # fmt: skip
        assert any(word in line for line in rest), word
    assert all(line.startswith("  ") for line in rest)


def test_every_entry_can_be_told(tmp_path: Path) -> None:
    spike, hand, _ = map(told, entries(written(tmp_path)))
    assert spike == "step 120, attempt 0: spike -> watch (advised)\n  why       Wait."
    assert hand.splitlines()[0] == "step 200, attempt 0: hand -> lr.scale=0.5 (by hand)"
