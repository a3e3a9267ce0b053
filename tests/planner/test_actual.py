"""After a run: what was forecast against what its folder tells, whatever became of it on the way."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_loss_forecast import STEPS, curve

from lumina.config.resolve import resolve, settle, write
from lumina.errors import UserError
from lumina.planner import calibration, keeping, outset
from lumina.planner.actual import compare
from lumina.planner.calibration import Entry, Store
from lumina.planner.deviation import SHARES
from lumina.planner.findings import findings, prior_of, reference_of, sort_of
from lumina.planner.forecast import Aim
from lumina.planner.hardware import CPU, Device, Fleet
from lumina.planner.laws import LAWS
from lumina.planner.prior import EXPONENTS, SHIPPED
from lumina.planner.schedule import Part, Schedule

RESOLVED = settle(
    resolve("tiny", {"model.kind": "dense", "train.steps": 100}),
    {"train.micro_batch": (8, "test"), "checkpoint.write": ("inline", "test"), "precision.eval": ("fp32", "test")},
)
PHASES = [{"begin": 0, "end": 100, "data": "text", "lr": 3e-3, "warmup": 10, "decay": 40}]
MACHINE = {"device_name": "A CPU", "cores": 2}
FLEET = Fleet(Device("A CPU, 2 cores", 2**33, 1e10, 1e10, 1e10, {"fp32": 5e10}, CPU, "test", is_cpu=True))
TOKENS = {"train": 10_000, "heldout": 2_000}
MIB = 2**20


def begun(attempt: int = 0, parent: int | None = None, at: float = 1000.0, **more: Any) -> dict[str, Any]:
    told = {
        "device": "cpu",
        "machine": MACHINE,
        "processes": 1,
        "steps": 100,
        "batch_tokens": 512,
        "phases": PHASES,
        "data": {"tokens": TOKENS},
    }
    reason = "start" if parent is None else "resume"
    return {"t": "run", "attempt": attempt, "step": parent or 0, "parent_step": parent, "reason": reason, "at": at,
            "began": at - 3, **told, **more}  # fmt: skip


def stepped(number: int, attempt: int = 0, wall: float | None = None, mem: int = 100 * MIB) -> dict[str, Any]:
    schedule = Schedule.of("wsd", PHASES)
    lr = 3e-3 * float(schedule.rates(np.array([float(number)]))[0])
    return {"t": "step", "attempt": attempt, "step": number, "loss": 2 + 3 / number**0.3, "lr": lr, "mem": mem,
            "wall": number * 0.1 if wall is None else wall}  # fmt: skip


def evaluated(number: int, loss: float, attempt: int = 0) -> dict[str, Any]:
    return {"t": "eval", "attempt": attempt, "step": number, "split": "heldout", "comparable": True, "loss": loss,
            "seconds": 0.5}  # fmt: skip


def foretold(number: int, low: float, high: float, attempt: int = 0) -> dict[str, Any]:
    loss = {"low": low, "mid": (low + high) / 2, "high": high}
    return {"t": "forecast", "attempt": attempt, "step": number, "share": number / 100, "refused": None, "early": False,
            "train": loss, "heldout": loss, "deviation": None, "decay_now": None, "optimum": None}  # fmt: skip


def folder(path: Path, events: list[dict[str, Any]], plan: bool = True) -> Path:
    path.mkdir(exist_ok=True)
    write(RESOLVED, path / "config.yaml")
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if plan:
        told = outset.outset(RESOLVED.config, begun(), FLEET, Store(), LAWS["besiroglu"], before=60 * MIB)
        (path / "plan.json").write_text(json.dumps(told))
    return path


def whole() -> list[dict[str, Any]]:
    """A run that never stopped: 10 s of steps, 2 evaluations, 20 s from its process's start to its end."""
    steps = [stepped(n) for n in range(1, 101)]
    return [begun(), *steps[:50], evaluated(50, 3.2), foretold(50, 2.9, 3.1), *steps[50:], foretold(80, 2.7, 2.9),
            evaluated(100, 3.0), {"t": "end", "attempt": 0, "step": 100, "reason": "done", "at": 1017.0}]  # fmt: skip


def test_what_is_forecast_when_a_run_begins() -> None:
    told = outset.outset(RESOLVED.config, begun(), FLEET, Store(), LAWS["besiroglu"])
    assert (told["steps"], told["tokens"], told["epochs"]) == (100, 51_200, 5.12)
    assert told["step_seconds"]["low"] < told["step_seconds"]["mid"] < told["step_seconds"]["high"]
    assert told["seconds"]["mid"] > 100 * told["step_seconds"]["mid"]
    assert told["memory"]["total"] == sum(told["memory"]["parts"].values()) > 0
    assert told["loss"]["low"] < told["loss"]["mid"] < told["loss"]["high"]
    assert told["missing"] == {}
    assert outset.prior(json.loads(json.dumps(told))) == SHIPPED
    other = Fleet(Device("slow", 2**33, 1e10, 1e10, 1e10, {"bf16": 1e10}, CPU, "test", is_cpu=True))
    lacking = outset.outset(RESOLVED.config, begun(), other, Store(), LAWS["besiroglu"])
    assert lacking["step_seconds"] is None
    assert "fp32" in lacking["missing"]["times"]


def test_a_finished_run_against_its_forecast(tmp_path: Path) -> None:
    found = compare(folder(tmp_path / "run", whole()))
    items = {item.name: item for item in found.items}
    assert (found.finished, found.step, found.steps, found.attempts, found.missing) == (True, 100, 100, 1, ())
    assert items["memory"].actual == 40 * MIB  # without what the process held before the model
    assert items["memory"].forecast is not None
    assert items["memory"].ratio == pytest.approx(40 * MIB / items["memory"].forecast.mid)
    assert items["step"].actual == pytest.approx(0.1)
    assert items["training"].actual == pytest.approx(10)
    assert items["total"].actual == pytest.approx(20)
    assert (items["loss"].actual, items["loss"].inside) == (3.0, False)
    assert found.final == 3.0
    assert [(told.share, told.inside) for told in found.trail] == [(0.5, True), (0.8, False)]
    assert json.loads(json.dumps(found.as_json()))["items"]["total"]["actual"] == pytest.approx(20)
    said = "\n".join(found.lines())
    assert all(part in said for part in ("40.0 MiB", "100 ms", "10 s", "20 s", "2.900 to 3.100", "in it", "outside"))


def test_a_run_without_a_plan_says_what_it_lacks(tmp_path: Path) -> None:
    """Older runs have no plan.json, no forecasts on the way, and no clock in their logs."""
    old = [{k: v for k, v in e.items() if k not in ("at", "began")} for e in whole() if e["t"] != "forecast"]
    found = compare(folder(tmp_path / "run", old, plan=False))
    items = {item.name: item for item in found.items}
    assert all(item.forecast is None for item in found.items)
    assert items["memory"].actual == 100 * MIB
    assert "the whole process" in items["memory"].note
    assert items["total"].actual == pytest.approx(11)  # steps and evaluations
    assert len(found.missing) == 2
    assert (found.trail, found.final) == ((), pytest.approx(2 + 3 / 95.5**0.3, abs=0.01))
    assert found.lines()


def test_a_run_that_was_killed_and_went_on_counts_all_of_its_time(tmp_path: Path) -> None:
    """Killed behind step 60, resumed from 40: 20 steps of the first attempt are undone, but were paid for."""
    first = [begun(), *(stepped(n, mem=300 * MIB) for n in range(1, 61)), foretold(50, 0.0, 1.0)]
    again = [*(stepped(n, 1) for n in range(41, 71)), evaluated(50, 3.2, 1), foretold(60, 2, 3, 1)]
    second = [begun(1, 40, at=2000.0), *again]
    found = compare(folder(tmp_path / "run", first + second))
    items = {item.name: item for item in found.items}
    assert (found.finished, found.step, found.attempts, found.final) == (False, 70, 2, None)
    assert [told.step for told in found.trail] == [60]  # that of step 50 was made of losses that do not count
    assert [told.inside for told in found.trail] == [None]
    assert items["memory"].actual == 240 * MIB  # the most of any attempt
    assert items["training"].actual == pytest.approx(7)
    assert found.undone_seconds == pytest.approx(2)
    assert items["total"].actual == pytest.approx(3 + 6 + 3 + 3 + 0.5)
    assert "2 of the processes" in items["total"].note
    assert items["loss"].actual == 3.2
    assert "so far" in items["loss"].note


def test_a_run_that_went_back_by_itself_is_one_process(tmp_path: Path) -> None:
    back = begun(1, 40, at=1006.0, began=997.0) | {"reason": "rollback"}
    log = [begun(), *(stepped(n) for n in range(1, 61)), back, *(stepped(n, 1) for n in range(41, 101))]
    end = {"t": "end", "attempt": 1, "step": 100, "reason": "done", "at": 1020.0}
    found = compare(folder(tmp_path / "run", [*log, evaluated(100, 3.0, 1), end]))
    items = {item.name: item for item in found.items}
    assert items["total"].actual == pytest.approx(23)
    assert found.undone_seconds == pytest.approx(2)


def test_an_event_that_lacks_what_it_should_say_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an event lacks"):
        compare(folder(tmp_path / "run", [begun(), {"t": "step", "attempt": 0, "step": 1}]))


def test_the_oldest_run_in_the_repository_is_read() -> None:
    """Before phases, plans and the stalls of saves were told."""
    demo = Path(__file__).parents[2] / "benchmarks" / "demo" / "2026-11-25"
    found = compare(demo)
    assert found.finished
    assert {item.name: item.forecast for item in found.items} == dict.fromkeys(
        ("memory", "step", "training", "total", "loss")
    )
    assert all(item.actual is not None for item in found.items)
    assert found.lines()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 99}'])
def test_a_damaged_plan_is_none(content: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "run", whole())
    (path / "plan.json").write_text(content)
    assert outset.read(path) is None
    assert outset.prior(None) == SHIPPED
    assert outset.prior({"prior": {"exponents": 3}}) == SHIPPED
    assert "no plan.json" in compare(path).missing[0]


def test_a_folder_that_never_began(tmp_path: Path) -> None:
    found = compare(folder(tmp_path / "run", []))
    assert "has not begun" in found.missing[0]
    assert [item.actual for item in found.items] == [None] * 5


# -- what the next run learns of it ------------------------------------------------------------------------------------


def test_a_finished_run_is_kept_for_plans_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMINA_CACHE", str(tmp_path / "cache"))
    keeping.keep(folder(tmp_path / "run", whole()))
    (entry,) = calibration.load().entries
    figures = dict(entry.figures)
    assert (entry.device, entry.kind, entry.processes) == ("A CPU, 2 cores", "dense", 1)
    assert figures["step"] == pytest.approx(0.1)
    assert figures["step_low"] <= figures["step"] <= figures["step_high"]
    assert figures["evaluation"] == pytest.approx(0.5)
    assert figures["memory_ratio"] > 0
    assert "loss_residual" in figures
    assert sum(figures[f"exponent_{i}"] for i in range(len(EXPONENTS))) == pytest.approx(1)
    store = calibration.load()
    told = outset.outset(RESOLVED.config, begun(), FLEET, store, LAWS["besiroglu"])
    assert told["step_seconds"]["measured"]  # the next run of this shape knows its step time
    assert told["step_seconds"]["mid"] == pytest.approx(0.1)
    assert told["reference"]["losses"][-1] == 1  # and is held against the curve of this one
    assert outset.reference(told) is not None
    assert told["prior"]["runs"] == SHIPPED.runs + 1


def test_what_a_curve_teaches() -> None:
    """The form's own gain of 0.2 nats at a loss of 3.3."""
    aim = Aim(Schedule("wsd", (Part(0, STEPS, 1e-3, 50, 300),)))
    found = findings(curve(), aim, tokens_per_param=20.0)
    assert found["gain"] == pytest.approx(0.2 / 3.3 / 0.3**0.5, rel=0.25)
    assert sum(found[f"exponent_{i}"] * EXPONENTS[i] for i in range(len(EXPONENTS))) == pytest.approx(0.3, abs=0.12)
    assert abs(found["drift"]) < 0.02
    assert (found["decay_share"], found["tokens_per_param"]) == (0.3, 20.0)
    assert len([name for name in found if name.startswith("curve_")]) == len(SHARES)
    assert findings(curve(900), aim, 20.0) == {}  # not finished


def test_own_runs_move_the_prior_as_one_of_those_that_it_was_measured_on() -> None:
    mine = {f"exponent_{i}": float(i == 4) for i in range(len(EXPONENTS))} | {"gain": 0.2}
    weigh = 10.0
    shipped = SHIPPED.__class__(**{**asdict(SHIPPED), "runs": int(weigh), "gain": 0.05, "gain_spread": 0.01})
    one, many = prior_of([mine], shipped), prior_of([mine] * 90, shipped)
    assert prior_of([{"step": 1.0}], shipped) == shipped
    assert one.gain == pytest.approx((weigh * 0.05 + 0.2) / 11)
    assert many.gain == pytest.approx((weigh * 0.05 + 90 * 0.2) / 100)
    assert one.gain_spread > shipped.gain_spread
    assert many.exponents[4] > one.exponents[4] > shipped.exponents[4] / sum(shipped.exponents)


def test_a_reference_is_a_run_of_the_same_sort() -> None:
    aim = Aim(Schedule("wsd", (Part(0, 100, 1e-3, 10, 40),)))
    known = sort_of(aim, 20.0) | {f"curve_{i}": 1.0 for i in range(len(SHARES))}
    assert reference_of([("old", known), ("new", known)], sort_of(aim, 22.0)) is not None
    assert reference_of([("old", known), ("new", known)], sort_of(aim, 22.0)).name == "new"  # type: ignore[union-attr]
    assert reference_of([("old", known)], sort_of(aim, 40.0)) is None
    assert reference_of([("old", known)], sort_of(Aim(Schedule("cosine", aim.schedule.parts)), 20.0)) is None
    assert reference_of([("old", known)], sort_of(Aim(Schedule("wsd", (Part(0, 100, 1e-3, 10, 20),))), 20.0)) is None
    assert reference_of([("old", {"step": 1.0})], sort_of(aim, 20.0)) is None
    assert Entry("d", 1, "dense", "fp32", "s", known).figures["cosine"] == 0.0
