"""What this machine is and can do for training, and what is wrong with it. Works where torch does not."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import psutil

import lumina
from lumina.planner.hardware import cpu_name
from lumina.training.host import commit
from lumina.training.memory import usable

PACKAGES = ("torch", "numpy", "pydantic", "PyYAML", "typer", "rich", "tokenizers", "safetensors", "psutil")
DISTRIBUTION = "lumina-ai"
GAINS = {"hf": "the tests that compare our models with transformers' classes", "dev": "tests, linters, type checker"}
LITTLE_DISK = 2**30
INSTALL = "install it: pip install -c constraints.txt -e ."

Report = dict[str, Any]


def examine(root: Path) -> Report:
    """Versions, system, memory, devices, choices, folders, extras; `problems` are `[what, what to do]`."""
    problems: list[list[str]] = []
    report: Report = {
        "versions": {"lumina": lumina.__version__, "commit": commit(), "python": platform.python_version()},
        "system": {"platform": platform.platform(), "cpu": cpu_name(), "cores": os.cpu_count()},
        "memory": {"total": psutil.virtual_memory().total, "available": psutil.virtual_memory().available},
        "extras": _extras(),
    }
    report["memory"]["usable"] = usable("cpu")
    report["versions"] |= {package: _version(package) for package in PACKAGES}
    lacking = [name for name in PACKAGES if name != "torch" and report["versions"][name] is None]
    for package in lacking:  # `_devices` says of torch why it cannot be imported
        problems.append([f"{package} is not installed", INSTALL])
    report["devices"], report["choices"] = _devices(problems)
    if torch := sys.modules.get("torch"):  # its own word names the build, which its metadata may leave out
        report["versions"]["torch"] = str(torch.__version__)
    report["folders"] = [_folder(what, path, problems) for what, path in (("runs", root), ("token cache", _cache()))]
    report["problems"] = problems
    return report


def usable_here(report: Report) -> bool:
    """Whether training can start."""
    return not report["problems"]


def _devices(problems: list[list[str]]) -> tuple[dict[str, Any], dict[str, str]]:
    """What torch sees, and what `auto` would choose here, with the reason."""
    from lumina import compat

    try:
        import torch  # noqa: F401 - what the questions below are put to
    except Exception as error:  # a broken installation fails in many ways; this is where one learns of it
        problems.append([f"torch cannot be imported: {error!r}", INSTALL])
        return {}, {}
    devices = {"cpu": {"cores_usable": compat.usable_cores(), "features": _cpu_features()}}
    try:
        return devices | _gpus(), _choices()
    except (RuntimeError, AssertionError) as error:  # a GPU that is seen and does not answer
        fix = "look at the driver (nvidia-smi), or hide the GPU: CUDA_VISIBLE_DEVICES= lumina …"
        problems.append([f"the GPU cannot be used: {error}", fix])
        return devices, {}


def _cpu_features() -> list[str]:
    import torch

    features = {
        "AVX2": "_is_avx2_supported", "AVX512": "_is_avx512_supported",
        "AVX512-BF16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported",
    }  # fmt: skip
    return [name for name, probe in features.items() if getattr(torch.cpu, probe, lambda: False)()]


def _gpus() -> dict[str, Any]:
    import torch

    from lumina import compat

    devices: dict[str, Any] = {}
    if torch.cuda.is_available():
        devices["cuda"] = [
            {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory}
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
    if torch.backends.mps.is_available():
        devices["mps"] = {"bf16": compat.mps_has_bf16()}
    return devices


def _choices() -> dict[str, str]:
    """What `auto` would choose, with the reason."""
    from lumina import compat
    from lumina.training import machine
    from lumina.training.precision import DTYPES

    device, why = machine.choose_device("auto")
    mode, mode_why = machine.choose_precision(device)
    grouped = compat.grouped_mm_works(device, DTYPES[mode])
    missing = compat.compiler_missing(device)
    return {
        "parallel.device": f"{device} ({why})",
        "precision.mode": f"{mode} ({mode_why})",
        "model.moe.kernel": "grouped" if grouped else "loop (no grouped matmul here)",
        "train.compile": f"not possible: {missing} is missing" if missing else "possible",
    }


def _folder(what: str, path: Path, problems: list[list[str]]) -> Report:
    """Where something is written, and whether it can be."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free, writable = shutil.disk_usage(existing).free, os.access(existing, os.W_OK) and existing.is_dir()
    if not writable:
        where = "use --root" if what == "runs" else "set LUMINA_CACHE"
        problems.append([f"{path} ({what}) cannot be written", f"make {existing} writable, or {where}"])
    elif free < LITTLE_DISK:
        problems.append([f"{path} ({what}): {free / 2**20:.0f} MiB of disk are free", "free space on it"])
    return {"what": what, "path": str(path), "writable": writable, "free": free}


def _cache() -> Path:
    return Path(os.environ.get("LUMINA_CACHE") or "~/.cache/lumina").expanduser()


def _extras() -> dict[str, dict[str, Any]]:
    """Each optional part, whether all of it is here, and what it is for; none if lumina itself is not installed."""
    wanted: dict[str, list[str]] = {name: [] for name in GAINS}
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return {}
    for line in lines:
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)", line)
        if name and extra and extra[1] in wanted and name[0] != DISTRIBUTION:
            wanted[extra[1]].append(name[0])
    return {
        extra: {"missing": [name for name in names if _version(name) is None], "gives": GAINS[extra]}
        for extra, names in wanted.items()
    }


def _version(package: str) -> str | None:
    if package == "torch" and importlib.util.find_spec("torch") is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return None
