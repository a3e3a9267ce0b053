"""Alarms of speed and memory: words, once, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from lumina.orchestrator import alarms
from lumina.orchestrator.alarms import WINDOW, Alarms


class Heard:
    def __init__(self) -> None:
        self.said: list[tuple[int, str]] = []
        self.alarms = Alarms(1000.0, self._emit)
        self.step = 0

    def _emit(self, type: str, **fields: Any) -> None:
        assert type == "incident"
        self.said.append((fields["step"], fields["kind"]))

    def run(self, windows: int, tok_s: float = 100.0, mem: float = 500.0) -> None:
        for _ in range(windows * WINDOW):
            self.step += 1
            self.alarms({"t": "step", "step": self.step, "tok_s": tok_s, "mem": mem})


def test_a_run_that_slows_for_good_is_told_once() -> None:
    heard = Heard()
    heard.run(3)
    heard.run(1, tok_s=85.0)  # 1.18 times
    heard.run(3, tok_s=70.0)
    assert heard.said == [(500, "slow")]
    heard.run(1)
    heard.run(1, tok_s=70.0)
    assert heard.said == [(500, "slow"), (900, "slow")]


def test_a_few_slow_steps_are_none() -> None:
    heard = Heard()
    heard.run(2)
    for _ in range(40):
        heard.step += 1
        heard.alarms({"t": "step", "step": heard.step, "tok_s": 5.0, "mem": 1.0})
    heard.run(1)
    assert heard.said == []


def test_memory_that_is_full_or_grows_is_told() -> None:
    heard = Heard()
    for mem in (100.0, 200.0, 300.0, 400.0, 400.0, 960.0):
        heard.run(1, mem=mem)
    assert heard.said == [(400, "memory grows"), (600, "memory full")]


def test_another_attempt_and_another_phase_are_learned_anew() -> None:
    heard = Heard()
    heard.run(2)
    heard.alarms({"t": "phase", "step": heard.step})
    heard.run(2, tok_s=10.0)
    assert heard.said == []


def test_nothing_that_decides_knows_of_them() -> None:
    """Wall-clock signals may alarm, never change state."""
    folder = Path(alarms.__file__).parent
    for path in [*folder.glob("*.py"), *folder.glob("detectors/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not names & {"lumina.orchestrator.alarms", "time", "datetime", "random"}, path
