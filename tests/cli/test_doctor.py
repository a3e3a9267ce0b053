"""`lumina doctor`: what is true of this machine, and what is wrong, with what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lumina
from lumina.cli import main
from lumina.training import doctor


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_tells_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == []
    assert told["versions"]["torch"] == torch.__version__
    assert told["versions"]["lumina"] == lumina.__version__
    assert told["devices"]["cpu"]["cores_usable"] >= 1
    assert told["memory"]["usable"] <= told["memory"]["total"]
    assert set(told["choices"]) == {"parallel.device", "precision.mode", "model.moe.kernel", "train.compile"}
    assert told["extras"]["dev"]["missing"] == []
    assert Path("runs").exists() is False  # looking makes nothing


def test_the_block_for_a_report_names_nobody(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("LUMINA_CACHE")
    assert main(["doctor", "--md"]) in (0, 2)
    said = capsys.readouterr().out
    assert said.startswith("```\n")
    assert said.endswith("```\n")
    assert "somebody" not in said
    assert "~/.cache/lumina" in said


def test_a_missing_torch_is_the_first_thing_said(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom lumina.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout.startswith("! torch")
    assert done.stdout.count("fix: install it") == 1
    assert "memory" in done.stdout  # the rest is told all the same


def test_a_folder_that_cannot_be_written_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LUMINA_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["doctor"]) == 2
    said = capsys.readouterr().out
    assert "(token cache) cannot be written" in said
    assert "set LUMINA_CACHE" in said


def test_little_disk_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "LITTLE_DISK", 2**60)
    assert main(["doctor"]) == 2
    assert "MiB of disk are free" in capsys.readouterr().out


def test_a_home_is_replaced_where_it_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for home, cache, shown in (
        ("/", "/data/cache", "/data/cache"),
        ("/data/al", "/data/alice/cache", "/data/alice/cache"),
        ("/data/al", "/data/al/cache", "~/cache"),
        ("/root", "/data/root/cache", "/data/root/cache"),
    ):
        monkeypatch.setenv("HOME", home)
        monkeypatch.setenv("LUMINA_CACHE", cache)
        main(["doctor", "--md"])
        assert f"token cache: {shown}," in capsys.readouterr().out


def test_a_gpu_that_does_not_answer_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(index: int) -> None:
        raise RuntimeError("device busy")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", busy)
    assert main(["doctor"]) == 2
    said = capsys.readouterr().out
    assert said.startswith("! the GPU cannot be used: device busy\n  fix: ")
    assert "cores usable" in said


def test_what_is_not_known_is_not_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def not_installed(name: str) -> list[str]:
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", not_installed)
    monkeypatch.setattr(doctor, "version", lambda package: "2.13.0")  # metadata without the build
    report = doctor.examine(tmp_path)
    assert report["extras"] == {}
    assert report["versions"]["torch"] == torch.__version__
