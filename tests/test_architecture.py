"""Who may import whom, read from the source; and what must work where torch cannot be imported (design: the house)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lumina

ROOT = Path(lumina.__file__).parent
LEAVES = {"errors", "events", "compat", "config", "progress", "standard", "visible"}
ALLOWED = {
    "errors": set(),
    "events": {"errors"},
    "compat": set(),
    "progress": set(),
    "standard": set(),
    "visible": set(),
    "config": {"errors"},
    "data": LEAVES,
    "model": LEAVES,
    "checkpoint": LEAVES | {"parallel"},
    "parallel": LEAVES,
    "planner": LEAVES | {"model"},  # of which the counts alone: a test below
    "run": LEAVES,
    "telemetry": {"events", "errors", "standard"},
    "inference": LEAVES | {"model", "data", "checkpoint", "run"},
    "interop": LEAVES | {"model", "data", "checkpoint", "run"},
    "training": LEAVES | {"model", "data", "checkpoint", "orchestrator", "parallel", "planner", "run", "lumina"},
    "orchestrator": LEAVES,
    "planning": LEAVES | {"data", "planner", "run", "training"},
    "byhand": LEAVES | {"orchestrator", "run"},
    "api": LEAVES | {"inference", "run", "telemetry", "training"},
    "bench": LEAVES
    | {"checkpoint", "data", "inference", "model", "parallel", "planner", "run", "telemetry", "training"},
    "verify": LEAVES
    | {"bench", "checkpoint", "data", "model", "orchestrator", "planner", "run", "telemetry", "training", "lumina"},
    "cli": LEAVES
    | {"api", "bench", "checkpoint", "data", "inference", "interop", "model", "orchestrator", "planner"}
    | {"byhand", "planning", "run", "telemetry", "training", "verify", "lumina"},
}
TORCHLESS = [
    "lumina",
    "lumina.byhand",
    "lumina.checkpoint.overview",
    "lumina.checkpoint.retention",
    "lumina.cli.app",
    "lumina.cli.data",
    "lumina.config.reference",
    "lumina.config.resolve",
    "lumina.data.difficulty",
    "lumina.data.look",
    "lumina.events",
    "lumina.model.cost",
    "lumina.orchestrator.actions",
    "lumina.orchestrator.ledger",
    "lumina.orchestrator.alarms",
    "lumina.orchestrator.confidence",
    "lumina.orchestrator.orchestrator",
    "lumina.orchestrator.protocol",
    "lumina.planner.calibration",
    "lumina.planner.fit",
    "lumina.planner.hardware",
    "lumina.planner.hyperparameters",
    "lumina.planner.keeping",
    "lumina.planner.memory",
    "lumina.planner.overtraining",
    "lumina.planner.plan",
    "lumina.planner.repeated",
    "lumina.planner.time",
    "lumina.planning",
    "lumina.run.inbox",
    "lumina.run.index",
    "lumina.run.lineage",
    "lumina.run.overview",
    "lumina.run.supervisor",
    "lumina.run.verdicts",
    "lumina.run.watchdog",
    "lumina.training.doctor",
    "lumina.telemetry.console",
    "lumina.training.memory",
    "lumina.training.room",
]


def imports(path: Path) -> set[str]:
    """The parts of lumina that a file imports; `lumina` itself for the package's own names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lumina":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lumina.")}
    return {"lumina" if name.startswith("__") else name for name in found}


def test_every_room_imports_only_what_it_may() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        room = relative.parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        wrong += [f"{relative} imports {name}" for name in imports(path) - ALLOWED[room] - {room}]
    assert not wrong


def test_the_planner_knows_of_models_what_they_cost() -> None:
    for path in (ROOT / "planner").glob("*.py"):
        modules = re.findall(r"^\s*from (lumina\.model\S*) import (.*)", path.read_text(encoding="utf-8"), re.M)
        assert all(module == "lumina.model.cost" or names == "cost" for module, names in modules), path


def test_every_package_has_a_docstring_and_no_imports() -> None:
    for path in ROOT.glob("*/**/__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body), path


@pytest.mark.parametrize("module", TORCHLESS)
def test_works_where_torch_cannot_be_imported(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_help_imports_no_torch() -> None:
    code = "import sys; from lumina.cli import main; main(['--help']); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "False"
    assert all(verb in done.stdout for verb in ("demo", "train", "resume", "generate"))
