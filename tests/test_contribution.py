"""The contribution workflow: forms and workflow parse, ask for what is needed, and name only what there is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
TEMPLATE = (GITHUB / "PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")
FORMS = sorted(path for path in GITHUB.glob("ISSUE_TEMPLATE/*.yml") if path.stem != "config")
REQUIRED = {  # what a report is worth nothing without
    "bug": {"happened", "command", "machine", "config", "log"},
    "feature": {"need", "today", "proof"},
    "performance": {"measured", "command", "table", "machine", "config", "commits"},
}
ASKED = [  # what a pull request has to show, in words of the template
    "Description", "Closes #", "Type", "Summary", "Architecture", "New dependencies", "Tests and hardware",
    "lumina doctor --md", "throughput", "memory", "seconds per epoch", "held-out loss", "Benchmark configuration",
    "Training stability", "Effect on the orchestrator", "Logs and plots", "Code\n- [ ]", "Documentation\n- [ ]",
    "Tests\n- [ ]", "Compatibility\n- [ ]", "MoE and MoD\n- [ ]", "Checkpoint recovery\n- [ ]", "Chinchilla",
    "Migration guide", "For the reviewer",
]  # fmt: skip


def load(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # `on` stays a word


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_is_one_and_asks_for_what_is_needed(path: Path) -> None:
    form = load(path)
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
    for field in fields:
        assert ("options" in field["attributes"]) == (field["type"] in ("dropdown", "checkboxes"))
    needed = {field["id"] for field in fields if field.get("validations", {}).get("required") == "true"}
    assert REQUIRED[path.stem] <= needed
    machine = [field for field in fields if field["id"] == "machine"]
    assert all("lumina doctor --md" in field["attributes"]["description"] for field in machine)


def test_a_bug_report_asks_for_the_run() -> None:
    text = (GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")
    assert all(name in text for name in ("config.yaml", "log.txt", "events.jsonl"))
    assert {path.stem for path in FORMS} == REQUIRED.keys()
    assert load(GITHUB / "ISSUE_TEMPLATE" / "config.yml") == {"blank_issues_enabled": "false"}


@pytest.mark.parametrize("asked", ASKED)
def test_a_pull_request_asks(asked: str) -> None:
    assert asked in TEMPLATE


def test_every_test_that_the_template_names_exists() -> None:
    named = re.findall(r"tests/[\w/]+(?:\.py)?", TEMPLATE)
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_workflow_covers_every_python_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    prefix = "Programming Language :: Python :: 3."
    pythons = {c.rpartition(" ")[2] for c in project["classifiers"] if c.startswith(prefix)}
    workflow = load(GITHUB / "workflows" / "ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] == "true"
    (job,) = workflow["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert set(matrix["python"]) == pythons
    assert matrix["os"] == ["ubuntu-latest"]
    assert [(extra["os"], extra["python"] in pythons) for extra in matrix["include"]] == [("macos-latest", True)]
    assert f">={min(pythons, key=lambda version: int(version[2:]))}" == project["requires-python"]
    steps = job["steps"]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_no_address_of_an_index_is_written_down() -> None:
    """Neither the workflow nor the hooks fetch from an address or a version of their own."""
    for path in (GITHUB / "workflows" / "ci.yml", ROOT / ".pre-commit-config.yaml"):
        assert "://" not in path.read_text(encoding="utf-8")


def test_hooks_run_what_make_check_runs() -> None:
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    checks = re.findall(r"^\t\$\(BIN\)/((?:ruff|mypy).*?)(?: \.)?$", (ROOT / "Makefile").read_text(), re.M)
    hooks = [hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in repository["hooks"]]
    assert hooks == checks


def test_make_mends_an_environment_that_was_left_half_made(tmp_path: Path) -> None:
    """Without Debian's python3-venv a first `make` leaves `.venv` with a python and no pip."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >> called\n')
    python.chmod(0o755)
    subprocess.run(["make", "demo", f"PYTHON={python}", "VENV=.venv"], cwd=tmp_path, capture_output=True, check=False)
    assert (tmp_path / "called").read_text().splitlines()[1:] == ["-m venv .venv"]


def test_the_readme_leads_to_the_documents() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "docs/first_run.md",
                 "docs/troubleshooting.md", "examples/"):  # fmt: skip
        assert f"]({name})" in readme
    assert len(readme.splitlines()) <= 200
