"""What this machine is, and the choices that follow from it: made once, saved with the run, reused on resume."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from lumina import __version__
from lumina.checkpoint.writer import Way
from lumina.compat import compiler_missing, cpu_has_fast_bf16, grouped_mm_works, mps_has_bf16, usable_cores
from lumina.config.schema.base import nearest_divisor
from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.parallel.world import ALONE, World
from lumina.planner import choices as rules
from lumina.planner.hardware import cpu_name
from lumina.planner.memory import MICRO_TOKENS, RESTORE_POINTS
from lumina.training import memory
from lumina.training.precision import DTYPES

MATMUL_SIZE = {"cpu": 1024, "mps": 4096, "cuda": 8192}  # large enough that waiting for the device does not count
# Our choice: a copy is spread over a hundred steps, of which it then takes a thousandth (benchmarks/orchestrator).
SNAPSHOT_STEPS = 100
MATMUL_SECONDS = 0.25
COMPILE_SECONDS, COMPILE_SAVES = 35.0, 0.17  # docs/log.md; measured on a CPU
Choices = dict[str, tuple[Any, str]]


def choose_device(wanted: str) -> tuple[str, str]:
    """The device to use and why; `UserError` if the wanted one is not here."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        best = next(device for device, here in found.items() if here)
        return best, "the fastest device found here"
    if not found[wanted]:
        here = ", ".join(device for device, there in found.items() if there)
        raise UserError(
            f"parallel.device={wanted}: this machine (or this build of PyTorch {torch.__version__}) has no {wanted}",
            fix=f"use parallel.device=auto, or one of: {here}",
        )
    return wanted, "as configured"


def require_gpus(device: str, world: World) -> None:
    """Raises `UserError` if the processes of this machine do not have a GPU each."""
    if device == "cuda" and world.local_size > (gpus := torch.cuda.device_count()):
        raise UserError(
            f"{world.local_size} processes on this machine, which has {gpus} GPU{'s' * (gpus > 1)}",
            fix=f"start {gpus} of them, with torchrun --nproc-per-node {gpus}, or use parallel.device=cpu",
        )


def choose_precision(device: str) -> tuple[str, str]:
    """The fastest format that trains safely here, and why."""
    if device == "cuda":
        if torch.cuda.get_device_capability() >= (8, 0):
            return "bf16", "compute capability 8.0 or more"
        return "fp16", "this GPU has fp16 units, and no bf16 units"
    if device == "cpu" and cpu_has_fast_bf16():
        return "bf16", "this CPU has AVX512-BF16 or AMX"
    if device == "mps" and mps_has_bf16():
        return "bf16", "this GPU multiplies bf16"
    return "fp32", f"no fast bf16 on this {device}"


def choose(config: Config, world: World = ALONE) -> Choices:
    """The choices that this machine and its processes decide, as {key: (value, why)}, for `config.resolve.settle`."""
    choices: Choices = {}
    device: str = config.parallel.device
    mode: str = config.precision.mode
    chosen, why = choose_device(device)
    if device == "auto":
        device, choices["parallel.device"] = chosen, (chosen, why)
    require_gpus(device, world)
    if mode == "auto":
        mode, why = choose_precision(device)
        choices["precision.mode"] = mode, why
    elif device == "mps" and mode.startswith("bf16") and not mps_has_bf16():
        raise UserError(f"precision.mode={mode}: this GPU does not multiply bf16", fix="use precision.mode=fp32")
    if config.precision.eval == "auto":
        choices["precision.eval"] = mode.removesuffix("_pure"), "as in training"
    if config.parallel.threads == "auto":
        among = f", shared by {world.local_size} processes" if world.local_size > 1 else ""
        choices["parallel.threads"] = threads(world), f"cores this process may use{among}"
    if config.model.moe and config.model.moe.kernel == "auto":
        works = grouped_mm_works(device, DTYPES[mode])
        kernel = ("grouped", "grouped matmul works here") if works else ("loop", "no grouped matmul here")
        choices["model.moe.kernel"] = kernel
    if config.train.micro_batch == "auto":
        limit = max(1, MICRO_TOKENS // config.model.seq_len)
        why = f"at most {MICRO_TOKENS} tokens at once"
        choices["train.micro_batch"] = micro_batch(config, world, limit), why
    if config.checkpoint.write == "auto":
        used = choices.get("parallel.threads", (config.parallel.threads, ""))[0]
        room = memory.room_for_copy(config, world.size, world.local_size)
        choices["checkpoint.write"] = choose_writing(device, int(used), room, world)
    if config.orchestrator.snapshot_every == "auto":
        choices["orchestrator.snapshot_every"] = choose_snapshots(config, world)
    if tokens := config.train.known_tokens:
        steps = max(1, round(tokens / config.train.batch_tokens))
        choices["train.steps"] = (steps, f"train.tokens={tokens} / train.batch_tokens")
    return choices


def choose_snapshots(config: Config, world: World) -> tuple[int, str]:
    """Steps between restore points in memory: none where it has no room for two, beside the copies that a save
    and a replay take."""
    if config.orchestrator.mode == "off":
        return 0, "nobody would go back to them"
    if not memory.room_for_copy(config, world.size, world.local_size, copies=RESTORE_POINTS + 2):
        return 0, f"{RESTORE_POINTS} copies of the state do not fit into memory"
    return SNAPSHOT_STEPS, "memory has room for them"


def require_micro_batch(config: Config, world: World) -> None:
    """Raises `UserError` if the user's own micro-batch does not divide a process's part of the batch."""
    if config.train.micro_batch != "auto" and micro_batch(config, world, own := int(config.train.micro_batch)) != own:
        part = config.train.batch_tokens // config.model.seq_len // world.size
        raise UserError(
            f"train.micro_batch={own} does not divide a process's part of the batch: {part} sequences",
            fix=f"use {nearest_divisor(own, part)}, or leave it out",
        )


def threads(world: World) -> int:
    """CPU threads of each process, for those of one machine share its cores."""
    return max(1, usable_cores() // world.local_size)


def choose_writing(device: str, threads: int, room: bool, world: World = ALONE) -> tuple[Way, str]:
    """How a checkpoint costs training the least, by rule of thumb, and why; `checkpoint.every=auto` measures it.

    `room`: whether memory holds a copy of the state.
    """
    if not room:
        return "inline", "a copy of the state does not fit into memory"
    if device != "cpu":
        return "background", "the device trains while the host writes"
    if threads * world.local_size < usable_cores():
        return "background", "training leaves cores free that can write"
    return "inline", "training uses all cores: writing with all of them is over soonest"


def either_way(config: Config, world: World) -> bool:
    """Whether neither way to save is out of the question: a GPU need not wait, a copy may not fit into memory."""
    return config.parallel.device == "cpu" and memory.room_for_copy(config, world.size, world.local_size)


def micro_batch(config: Config, world: World, limit: int) -> int:
    """As `planner.choices.micro_batch`, for the processes there are."""
    return rules.micro_batch(config, world.size, limit)


def choose_compile(config: Config, steps: int, flops_per_token: float, rate: float) -> tuple[str, str]:
    """Whether torch.compile pays: it costs `COMPILE_SECONDS`, and saves `COMPILE_SAVES` of a step's time.

    `rate` is the matmul rate of all processes together, in FLOP/s: the run takes at least its FLOPs at that rate.
    """
    if missing := compiler_missing(config.parallel.device):
        return "off", f"there is no {missing.removeprefix('a ')} here"
    seconds = steps * config.train.batch_tokens * flops_per_token / rate
    pays = COMPILE_SECONDS / COMPILE_SAVES
    if seconds >= pays:
        return "on", f"at least {seconds:.0f}s of arithmetic; compiling pays from {pays:.0f}s on"
    return "off", f"{seconds:.0f}s of arithmetic at the matmul rate; compiling pays from {pays:.0f}s on"


def require_compiler(config: Config) -> None:
    """Raises `UserError` if the run is to be compiled and this machine cannot."""
    if config.train.compile == "on" and (missing := compiler_missing(config.parallel.device)):
        raise UserError(f"train.compile=on: torch.compile needs {missing}", fix="install it, or use train.compile=auto")


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matmul: what MFU is measured against. The best of many, for a busy machine only slows."""
    size = MATMUL_SIZE[device]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + MATMUL_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def check_settled(config: Config, run: str, world: World) -> None:
    """Raises `UserError` if the configuration of a `run` leaves a choice open, or needs what is not here."""
    path = f"{run}/config.yaml"
    settled = {
        "parallel.device": config.parallel.device,
        "parallel.threads": config.parallel.threads,
        "train.micro_batch": config.train.micro_batch,
        "train.steps": config.train.steps,
    }
    if open_keys := [key for key, value in settled.items() if value in ("auto", None)]:
        fix = "restore the file; a run keeps what was chosen when it began"
        raise UserError(f"{path}: it does not say {', '.join(open_keys)}", fix)
    device, _ = choose_device("auto")
    here = [f"parallel.device={device}"]
    if config.precision.mode != "fp32":
        here.append(f"precision.mode={choose_precision(device)[0]}")
    try:
        choose_device(config.parallel.device)
        here = ["train.compile=off"]
        require_compiler(config)
    except UserError as error:
        command = shlex.join(["lumina", "resume", run, *here])
        fix = f"resume it where there is one, or here, where the numbers differ: {command}"
        raise UserError(f"{path}: {error.message}", fix) from None
    require_gpus(config.parallel.device, world)


def facts(device: str) -> dict[str, Any]:
    """Names and versions for `meta.json`."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return {
        "lumina": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "device_name": name,
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def work_began() -> float:
    """Seconds since 1970 at which the work on a run began: with the process, if that is a command of ours; now, if it
    is somebody else's."""
    ours = Path(sys.argv[0]).name == "lumina" or sys.argv[0].endswith(os.path.join("lumina", "__main__.py"))
    return round(psutil.Process().create_time() if ours else time.time(), 3)


def memory_used(device: str) -> int:
    """Bytes: the process's resident memory on a CPU, the allocator's peak on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    resident: int = psutil.Process().memory_info().rss
    return resident
