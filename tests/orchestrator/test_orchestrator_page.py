"""What docs/orchestrator.md says of detectors, limits and incidents is what the code does, and its examples run."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from watched import Watch

import lumina
from lumina.cli import main
from lumina.orchestrator import diagnosis, ledger, orchestrator, policy, signals, windows
from lumina.orchestrator.actions import ACTIONS
from lumina.orchestrator.detectors import (
    attention,
    data,
    depth,
    divergence,
    experts,
    forecast,
    invariants,
    numerics,
    pace,
    spike,
)
from lumina.orchestrator.detectors.table import DETECTORS
from lumina.orchestrator.diagnosis import INVARIANTS
from lumina.orchestrator.robust import DELAY, WINDOW
from lumina.training.optim import Optimizer

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests" / "training"), str(ROOT / "benchmarks" / "orchestrator")]

from calibrate import recorded  # noqa: E402
from forks import request, require_equal, trained  # noqa: E402

PAGE = (ROOT / "docs" / "orchestrator.md").read_text(encoding="utf-8")
STEP = Optimizer.step
# The numbers that each row of the detectors' table has to name.
NUMBERS: dict[str, tuple[float, ...]] = {
    "invariant": (invariants.LASTS, invariants.SPAN),
    "looked": (),
    "off_plan": (policy.LOST,),
    "non_finite": (numerics.TIMES, numerics.AGAIN),
    "loader": (windows.CONTENTS, data.AGAIN, data.AGAIN_FEW, data.FEW),
    "divergence": (
        windows.SMOOTH, windows.SEVERE, windows.SEVERE_SIGMA, divergence.LASTS, divergence.PATIENCE,
        divergence.GUESSING,
    ),
    "attention": (attention.TAU, attention.JUMPS),
    "golden": (data.APART, data.SIGMAS, data.LEAST),
    "explosion": (spike.EXPLODES, spike.ALONE, spike.LASTS),
    "spike": (WINDOW, spike.ALONE, spike.TOGETHER),
    "pace": (windows.JUMPS, pace.LASTS),
    "drift": (forecast.Z, forecast.NATS, forecast.LOOKS),
    "plateau": (forecast.FLAT,),
    "starvation": (
        windows.LOAD_STEPS, windows.EXPECTED, windows.STARVED, experts.STARVES, experts.DEAD, experts.DIES,
        experts.LASTS, experts.FLOORS,
    ),
    "collapse": (
        windows.EVEN, windows.BALANCED, windows.FEW, windows.FULL, windows.BLOCK, experts.LASTS, experts.FALLS,
        experts.FLOORS,
    ),
    "over_balance": (windows.BLOCK, windows.BLOCKS, experts.FLAT),
    "router_gradient": (windows.LATEST, windows.LEAVES),
    "mod_capacity": (depth.MEAN, *depth.BAND),
    "mod_agreement": (depth.MEAN, depth.FALLS),
}  # fmt: skip


def table(heading: str) -> list[list[str]]:
    """The cells of a table of the page, by the first cell of its head."""
    lines = PAGE.split(f"| {heading} |")[1].split("\n\n")[0].splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def example(title: str) -> str:
    """The Python below a heading."""
    found = re.search(r"```python\n(.*?)```", PAGE.split(f"## {title}\n")[1], re.S)
    assert found
    assert len(found[1].splitlines()) <= 20
    return found[1]


def test_the_table_of_detectors_is_the_code() -> None:
    rows = table("detector")
    assert [row[0] for row in rows] == [one.name for one in DETECTORS] == list(NUMBERS)
    for (name, *cells, weight, silent), one in zip(rows, DETECTORS, strict=True):
        assert weight == ("hard" if one.hard else "tried" if name in policy.TRIED else "advised"), name
        wanted = "never" if one.hard else "warm-up, changes" if one.in_decay else "warm-up, changes, decay"
        assert silent == wanted, name
        there = {
            float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", " ".join(cells).replace(",000", "000"))
        }
        assert set(NUMBERS[name]) <= there, name


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_what_acts_and_its_limits_are_the_code() -> None:
    acts = section("What it does")
    assert all(f"`{name}`" in section("What it watches") for name in INVARIANTS)
    assert all(f"`{name}`" in acts for name in [*policy.HARD, *invariants.HARD])
    assert [(row[0], row[1]) for row in table("action")] == [(name, words) for name, (words, _) in ledger.WORDS.items()]
    for name, *_, undone in table("action"):
        assert undone == (ledger.WORDS[name][1] or undone)
    cooldown = policy.Policy("act", signals.Facts(260, 512, 0.95)).cooldown
    said = {
        "Detectors": (f"{signals.SETTLE} steps after", f"the {DELAY} before it"),
        "From finding to diagnosis": (
            f"signals of {diagnosis.SPAN}",
            f"{diagnosis.JUMP:g} times",
            f"{diagnosis.GROWS}",
        ),
        "What it does": (f"{cooldown} at 0.95", f"for {orchestrator.QUIET} steps", f"for {orchestrator.UNCALM} steps"),
    }
    assert [word for title, words in said.items() for word in words if word not in section(title)] == []
    assert ("two ways back from one place" in acts, policy.REWINDS) == (True, 2)


def shape(text: str) -> str:
    """Without its numbers, which are a machine's, and without the names of a run and of a file."""
    return re.sub(r"inbox/\S+", "inbox/FILE", re.sub(r"-?\d+(\.\d+)?(e[+-]\d+)?", "N", text))


def test_the_incident_is_one_that_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = [100.0, 100.0]

    def once(optimizer: Optimizer, lr: float, skip: Tensor) -> None:
        STEP(optimizer, lr * (faults.pop() if faults and optimizer.steps_taken >= 6 else 1), skip)

    monkeypatch.setattr(Optimizer, "step", once)
    keys = request(tmp_path, "dense", orchestrator__mode="act", orchestrator__snapshot_every=2)
    ask = {9: lambda controls: lumina.open_run(controls.session.run).act("lr.scale", 0.5)}
    run = trained(tmp_path / "runs", keys, monkeypatch, ask)
    capsys.readouterr()
    assert main(["decisions", str(run.path)]) == 0
    said = capsys.readouterr().out.replace(str(run.path), "RUN")
    (told,) = re.findall(r"```text\n(.*?)```", PAGE, re.S)
    assert shape(told) == shape(said), said


def test_the_detector_of_the_page_hears_what_it_is_for_on_recorded_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    code: dict[str, Any] = {}
    exec(example("A detector of your own"), code)
    detector = code["DETECTOR"]
    curves = recorded()
    for curve in [next(one for one in curves if one.name.startswith(kind)) for kind in ("dense", "moe", "mod")]:
        sound, faulty = signals.Signals(curve.facts), signals.Signals(curve.facts)
        heard = []
        for seen in curve.steps:
            sound.observe(seen)
            assert detector(sound) is None, curve.name
            if seen.step < curve.at + 10:
                dead = seen.step >= curve.at
                faulty.observe(replace(seen, grad_norm=seen.grad_norm / 100) if dead else seen)
                heard += [seen.step] if detector(faulty) else []
        assert heard[0] == curve.at + code["LASTS"] - 1
    monkeypatch.setattr(orchestrator, "DETECTORS", (*DETECTORS, detector))
    watch = Watch(points=(50,))
    watch.run(1, 300)
    watch.run(301, 305, grad_norm=0.01)
    (said,) = watch.decisions()
    assert (said["rule"], said["evidence"]["finding"]["since"], watch.door.did) == ("vanishing", 301, [])


def test_the_action_of_the_page_acts_and_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code: dict[str, Any] = {}
    exec(example("An action of your own"), code)
    keys = request(tmp_path, "dense", train__warmup=2, train__decay=2)
    plain = trained(tmp_path / "plain", keys, monkeypatch)

    def undo(controls: Any) -> None:
        (entry,) = lumina.open_run(controls.session.run).entries()
        assert entry.action == "gentle=0.5 for 3 steps"
        rates = {e["step"]: e["lr"] for e in controls.session.run.events() if e["t"] == "step"}
        assert [rates[step] / rates[4] for step in range(4, 9)] == [1.0, 0.5, 0.5, 0.5, 1.0]
        lumina.open_run(controls.session.run).undo(entry.undo[0])

    at = {4: lambda controls: code["act"](controls, controls.session.config), 9: undo}
    try:
        require_equal(plain, trained(tmp_path / "acted", keys, monkeypatch, at))
    finally:
        ACTIONS.pop("gentle", None)
