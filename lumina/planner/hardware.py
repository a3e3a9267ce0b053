"""Machines: what a device can do at best, and what of it published trainers reach.

Peaks are dense, without the factor of 2 that data sheets print for structured sparsity, and of the units that a
precision really uses here: fp32 is not TF32. MFU is model FLOP utilisation: counted FLOPs over that peak.
"""

from __future__ import annotations

import csv
import difflib
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from lumina.compat import usable_cores
from lumina.errors import UserError

GB = 10**9
Range = tuple[float, float]
CGROUP = Path("/sys/fs/cgroup")  # of a container, as it sees itself
MOST = 2**20  # devices
# Of a CPU with such units, one thread (this project, AMD EPYC with AVX512-BF16): 141 to 197 GFLOP/s over 81 to 103.
BF16_OVER_FP32 = 1.9

# What trainers reach of an H100's bf16 peak. Dense: torchtitan's Llama 8B on 8 GPUs 33 %, Marin's 2.7B 56 %, between
# them llm-foundry's 53 runs (8c8dd48) of 760M to 70B at up to 4,096 tokens, 35 to 46 %, those that recompute all
# activations 36 to 44 %: what it takes is in these ranges. MoE: Marin's 256 fine experts 16 %, Mixtral 8x22B in
# Megatron 49 % (2504.14960), between them nanochat's 8 experts 35 %.
HOPPER: Mapping[str, Range] = {"dense": (0.33, 0.56), "moe": (0.16, 0.49)}
# llm-foundry's 41 runs of 125M to 70B on A100s of 80 GB, sequences up to 8,192; nobody published a MoE there: in
# H100's proportion.
AMPERE: Mapping[str, Range] = {"dense": (0.39, 0.64), "moe": (0.19, 0.56)}
# No published training of language models: from the lowest of the two above to the highest.
OTHER: Mapping[str, Range] = {"dense": (0.33, 0.64), "moe": (0.16, 0.56)}
# On a CPU against the measured matmul: shape P reached 45 to 69 and 28 to 64 % (benchmarks/sparse, 2026-11-25, bf16 to
# fp32), here a few points wider for other shapes.
CPU: Mapping[str, Range] = {"dense": (0.40, 0.72), "moe": (0.28, 0.66)}
# Depth routing has no published MFU. Of its ideal, the dense step by FLOPs, it reached 90 to 99 % at shape P
# (benchmarks/sparse), so its range begins a tenth lower than that of the same network without it.
OF_IDEAL = 0.9
WITHOUT_DEPTH = {"dense": "dense", "mod": "dense", "moe": "moe", "hybrid": "moe"}

# Of one machine's rate an added GPU keeps, by how many there are. llm-foundry's 1B to 30B on H100s: MFU on 16 to 64
# over that on 8 is 0.98 to 1.15 (the larger total memory holds larger micro-batches), on 512 over 8 it is 0.88 to 1.06.
NODE = 8  # GPUs of one machine; the MFU ranges above are of so many
EFFICIENCY: tuple[tuple[int, Range], ...] = ((NODE, (1.0, 1.0)), (64, (0.98, 1.0)), (512, (0.88, 1.0)))
BEYOND = (0.75, 1.0)  # not in that table: assumed
# Assumed of a GPU that somebody describes: PCIe 4 with 16 lanes, and of a machine, as of a card in none of NVIDIA's,
# 100 Gbit/s.
LINK, NETWORK = 32.0, 12.5  # GB/s


@dataclass(frozen=True)
class Device:
    """One accelerator, or a machine's CPU: bytes of memory, bytes/s to it and to its neighbours, FLOP/s by precision.

    `memory` of a GPU is what its driver reports. `peak` lacks the precisions that it has no units for. `source` names
    where the figures are from.
    """

    name: str
    memory: int
    bandwidth: float
    link: float  # to the other devices of a machine, one direction
    network: float  # of a machine of `NODE` to the others, one direction
    peak: Mapping[str, float]
    reached: Mapping[str, Range]
    source: str
    is_cpu: bool = False

    def mfu(self, kind: str) -> Range:
        """The range of utilisation that a kind of model reaches: `dense`, `moe`, `mod` or `hybrid`."""
        low, high = self.reached[WITHOUT_DEPTH[kind]]
        return (low * OF_IDEAL if kind in ("mod", "hybrid") else low), high

    def rate(self, precision: str) -> float:
        """FLOP/s at most in a `precision.mode`. Raises `UserError` if there are no units for it."""
        name = precision.removesuffix("_pure")
        if name not in self.peak:
            have = ", ".join(f"precision.mode={other}" for other in self.peak)
            raise UserError(f"{self.name} has no {name} units that are known", fix=f"use {have}")
        return self.peak[name]

    @property
    def precision(self) -> str:
        """What `precision.mode=auto` chooses there: as `training.machine` does, by what it has units for."""
        for name in ("bf16",) if self.is_cpu else ("bf16", "fp16"):
            if name in self.peak:
                return name
        return "fp32"


def _gpu(
    name: str, mib: int, gb_s: float, link: float, network: float, bf16: float, fp32: float, source: str,
    reached: Mapping[str, Range] = OTHER, fp16: float = 0.0,
) -> Device:  # fmt: skip
    """Memory in MiB, as the driver reports it; rates in GB/s and TFLOP/s, as data sheets have them; `bf16` may be 0."""
    peak = {"bf16": bf16, "fp16": fp16 or bf16, "fp32": fp32}
    units = {precision: 1e12 * rate for precision, rate in peak.items() if rate}
    return Device(name, mib << 20, gb_s * GB, link * GB, network * GB, units, reached, f"NVIDIA, {source}")


# Memory is what nvidia-smi prints, which is not the data sheet's figure in any unit: H100, A100, L40S, L4 and T4 in
# modal-client's pull request 2797; issues of gpu-admin-tools (4: H100 NVL), TensorRT-LLM (10278: B200), DCGM (232:
# A10G), k8s-vgpu-scheduler (7: V100-16GB), RLinf (255: 4090), club-3090 (1229: 5090, 390: 3090); insightface's
# arcface_paddle (V100-32GB); printed logs (H200).
# Links: half of NVLink's figure, which counts both directions; 32 and 16 of PCIe 4 and 3 with 16 lanes, 64 of PCIe 5.
# Networks: 8 cards of 400 Gbit/s in a DGX H100, H200 or B200; 1,600 Gbit/s of llm-foundry's A100s, as in a DGX A100;
# 4 of 100 in a DGX-1; of AWS's G6e (L40S) 400, of G5, G6 and G4 (A10G, L4, T4) 100 Gbit/s in all; else assumed.
_TABLE = (
    _gpu("B200", 183359, 8000, 900, 400, 2250, 75, "Blackwell data sheet, HGX B200 / 8"),
    _gpu("H200", 143771, 4800, 450, 400, 989.5, 67, "H200 data sheet", HOPPER),
    _gpu("H100-SXM", 81559, 3350, 450, 400, 989.5, 67, "H100 data sheet", HOPPER),
    _gpu("H100-NVL", 95830, 3900, 300, NETWORK, 835.5, 60, "H100 NVL data sheet", HOPPER),
    _gpu("H100-PCIe", 81559, 2000, 64, NETWORK, 756.5, 51, "H100 data sheet, first edition", HOPPER),
    _gpu("A100-80GB", 81920, 2039, 300, 200, 312, 19.5, "A100 data sheet, SXM", AMPERE),
    _gpu("A100-40GB", 40960, 1555, 300, 200, 312, 19.5, "A100 data sheet, SXM", AMPERE),
    _gpu("L40S", 46068, 864, 32, 50, 362, 91.6, "L40S data sheet"),
    _gpu("A10G", 23028, 600, 32, 12.5, 70, 31.5, "A10G as in AWS G5: 70 TFLOP/s of tensor cores, the A10 has 125"),
    _gpu("L4", 23034, 300, 32, 12.5, 121, 30.3, "L4 data sheet"),
    _gpu("T4", 15360, 320, 16, 12.5, 0, 8.1, "T4 data sheet", fp16=65),
    _gpu("V100-32GB", 32510, 900, 150, 50, 0, 15.7, "V100 data sheet, SXM2", fp16=125),
    _gpu("V100-16GB", 16160, 900, 150, 50, 0, 15.7, "V100 data sheet, SXM2", fp16=125),
    _gpu("RTX-5090", 32607, 1792, 64, NETWORK, 209.5, 104.8, "RTX Blackwell white paper, fp32 accumulation"),
    _gpu("RTX-4090", 24564, 1008, 32, NETWORK, 165.2, 82.6, "Ada white paper, fp32 accumulation"),
    _gpu("RTX-3090", 24576, 936, 32, NETWORK, 71, 35.6, "GA102 white paper, fp32 accumulation"),
)
DEVICES: dict[str, Device] = {device.name: device for device in _TABLE}
# How people and drivers call them, in lower case without `NVIDIA`, signs and spaces; the first that fits. A name that
# leaves the card open means the larger memory, and of H100s the SXM module.
_FORM = r"(?:sxm\d?|pcie|hbm\d?e?|\d+gb)*"
_CALLED = {
    rf"b200{_FORM}": "B200",
    rf"h200{_FORM}": "H200",
    r"h100(?:\d+gb)?nvl": "H100-NVL",
    r"h100(?:\d+gb)?(?:pcie|hbm2e)(?:\d+gb)?": "H100-PCIe",
    rf"h100{_FORM}": "H100-SXM",
    r"a100(?:sxm\d?|pcie)?40gb": "A100-40GB",
    rf"a100{_FORM}": "A100-80GB",
    r"l40s": "L40S",
    r"a10g": "A10G",
    r"l4": "L4",
    r"t4": "T4",
    r"v100(?:sxm\d?|pcie)?16gb": "V100-16GB",
    rf"v100{_FORM}": "V100-32GB",
    r"(?:rtx)?5090": "RTX-5090",
    r"(?:rtx)?4090": "RTX-4090",
    r"(?:rtx)?3090": "RTX-3090",
}


@dataclass(frozen=True)
class Fleet:
    """`count` devices of one kind that train one model."""

    device: Device
    count: int = 1
    here: bool = False  # this machine, not one that was named

    def __str__(self) -> str:
        return self.device.name if self.count == 1 else f"{self.count}x{self.device.name}"

    @property
    def efficiency(self) -> Range:
        """Of the rate of `count` single devices, the share that they reach together."""
        return next((share for most, share in EFFICIENCY if self.count <= most), BEYOND)

    @property
    def link(self) -> float:
        """Bytes/s that each GPU sends in a collective, one direction, at most.

        Rings go through all GPUs, and each of several leaves a machine by another network card: so the sum of a
        machine's cards bounds every one of its GPUs, not a card one of them. Of the 400 GB/s of 8 cards H100s reach
        360 to 260 on 4 to 128 machines (NCCL's issue 1229, reduce-scatter), 46 to 48 of each 50 (nccl-tests' 290).
        """
        return min(self.device.link, self.device.network) if self.machines > 1 else self.device.link

    @property
    def machines(self) -> int:
        """How many machines these are in: those that are here in one, others in as few as hold equally many each."""
        if self.here:
            return 1
        return next(n for n in range(-(-self.count // NODE), self.count + 1) if self.count % n == 0)


def parse_gpus(text: str, peak_tflops: float | None = None, memory: int | None = None) -> Fleet:
    """`8xH100`, `H200`, `2x A100-40GB`, `rtx4090`; any other name with its bf16 peak and `memory` in bytes.

    Raises `UserError` for an unknown name without those, a known one with them, or a count that is none.
    """
    match = re.fullmatch(r"\s*(?:([-+.\d]+)\s*[xX*×]\s*)?(.*?)\s*", text, re.DOTALL)
    number, name = match.groups() if match else (None, text)
    if number is not None and not (number.isdecimal() and 0 < int(number) <= MOST):
        raise UserError(f"--gpus {text}: {number} is no number of GPUs", fix="such as --gpus 8xH100")
    device, count = device_called(name), int(number or 1)
    described = peak_tflops is not None or memory is not None
    if device is not None and described:
        raise UserError(
            f"--gpus {text}: of the {device.name} peak and memory are known",
            fix="leave --peak-tflops and --mem out, or give the GPU another name",
        )
    if device is None and peak_tflops is not None and memory is not None and name and name.isprintable():
        device = _described(name, peak_tflops, memory)
    if device is None:
        plain = {_plain(known): known for known in DEVICES} | {"h100": "H100", "a100": "A100", "v100": "V100"}
        close = [plain[found] for found in difflib.get_close_matches(_plain(name), plain, n=2, cutoff=0.5)]
        hint = f"did you mean {' or '.join(close)}? " if close and not described else ""
        both = "; --peak-tflops and --mem are needed both" if described else ""
        raise UserError(
            f"--gpus {text}: unknown GPU {name!r}{both}",
            fix=f"{hint}known are {', '.join(DEVICES)}; of any other say its bf16 peak and memory, such as "
            f"--gpus 8x{name or 'NAME'} --peak-tflops 500 --mem 64GiB",
        )
    return Fleet(device, count)


def _described(name: str, peak_tflops: float, memory: int) -> Device:
    """A GPU of which peak and memory are known; the rest is assumed, and its source says so."""
    units = dict.fromkeys(("bf16", "fp16"), 1e12 * peak_tflops)
    slowest = min(each.bandwidth / max(each.peak.values()) for each in DEVICES.values())
    bandwidth = slowest * units["bf16"]
    source = (
        f"as given, {peak_tflops:g} TFLOP/s, {memory / 2**30:.3g} GiB; assumed: {bandwidth / GB:,.0f} GB/s to memory "
        f"(the least of known GPUs for that peak), {LINK:g} to other GPUs (PCIe 4), {NETWORK:g} between machines"
    )
    return Device(name, memory, bandwidth, LINK * GB, NETWORK * GB, units, OTHER, source)


def device_called(name: str) -> Device | None:
    """The device of a name as people or drivers write it (`h100 pcie`, `NVIDIA A100-SXM4-80GB`); None if unknown."""
    plain = _plain(name)
    return next((DEVICES[device] for form, device in _CALLED.items() if re.fullmatch(form, plain)), None)


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


# -- this machine -----------------------------------------------------------------------------------------------------


def this_machine(device: str = "auto", rates: Mapping[str, float] | None = None) -> Fleet:
    """What `parallel.device` finds here: the GPUs that nvidia-smi lists, or the CPU.

    A CPU has no data sheet that counts its cores as this process may use them: its fp32 rate is that of a matmul
    here and now, unless `rates` (FLOP/s by precision, of an earlier measurement) has one; so is that of an unknown GPU
    unless `rates` has one. Raises `UserError` if a GPU is asked for and none is found, or nothing is known of it.
    """
    gpus = [] if device in ("cpu", "mps") else _nvidia_smi()
    if device == "cuda" and not gpus:
        raise UserError(
            "parallel.device=cuda: nvidia-smi lists no GPU here", fix="name the GPUs that it will run on: --gpus 8xH100"
        )
    if device == "mps":
        fix = "plan it for the CPU with parallel.device=cpu, or measure it there: --measure"
        raise UserError("parallel.device=mps: Apple publishes no FLOP/s of its GPUs", fix)
    if not gpus:
        return Fleet(_cpu(rates or {}), here=True)
    name, memory = gpus[0]
    known = device_called(name)
    if known is None and not rates:
        described = f"--gpus {shlex.quote(f'{len(gpus)}x{name}')} --peak-tflops 500 --mem {memory >> 20}MiB"
        raise UserError(
            f"nothing is known of the {name} here", fix=f"measure it with --measure, or say its bf16 peak: {described}"
        )
    if known is None:
        inf = math.inf
        known = Device(name, memory, inf, inf, inf, dict(rates or {}), OTHER, "its matmul, measured here")
    return Fleet(replace(known, memory=memory), sum(gpu[0] == name for gpu in gpus), here=True)


def known_as(device: str, name: str, cores: int) -> str:
    """What a device is called in the calibration, from the facts that a run tells of its machine."""
    if device == "cpu":
        return f"{name}, {cores} core{'s' * (cores > 1)}"
    return found.name if (found := device_called(name)) else name


def cpu_name() -> str:
    """The model of the CPU, where the system tells it."""
    names = [value for key, value in _cpuinfo() if key == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


def main_memory() -> int:
    """Bytes that this machine, or the container this runs in, has for its processes."""
    memory: int = psutil.virtual_memory().total
    limit = _limit()
    return memory if limit is None else min(memory, limit)


def free_memory() -> int:
    """Bytes of it that nobody uses now; what only holds files again counts, for it makes way."""
    memory: int = psutil.virtual_memory().available
    limit = _limit()
    return memory if limit is None else min(memory, max(0, limit - _used()))


def _limit() -> int | None:
    """What this container may use; None outside of one, or if it may use all."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
    except OSError:
        return None
    return int(limit) if limit.isdigit() else None


def _used() -> int:
    """What this container uses, without what only holds files again."""
    try:
        used = int((CGROUP / "memory.current").read_text())
        held = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return used - int(held["inactive_file"]) - int(held["active_file"])
    except (OSError, ValueError, KeyError):
        return 0


def _cpu(rates: Mapping[str, float]) -> Device:
    """This machine's CPU, at the rates of its usable cores."""
    peak, source = dict(rates), "its matmul, as an earlier --measure found it"
    if "fp32" not in peak and "bf16" not in peak:
        peak, source = {"fp32": matmul_rate()}, "a matmul, just measured"
        if has_fast_bf16():
            peak["bf16"] = BF16_OVER_FP32 * peak["fp32"]
    bandwidth = copy_rate()
    name = known_as("cpu", cpu_name(), usable_cores())
    return Device(name, main_memory(), bandwidth, bandwidth, bandwidth, peak, CPU, source, is_cpu=True)


def has_fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX512-BF16 or AMX), as Linux tells it; elsewhere it is not known."""
    flags = next((value.split() for key, value in _cpuinfo() if key == "flags"), [])
    return "avx512_bf16" in flags or "amx_bf16" in flags


def matmul_rate(seconds: float = 0.08, size: int = 512) -> float:
    """FLOP/s of a square fp32 product of numpy's, the best of those in `seconds`: a busy machine only slows.

    It is small enough to be over before the system gives the cores to somebody else.
    """
    import numpy as np

    a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    return 2 * size**3 / _best(lambda: a @ a, seconds)


def copy_rate(seconds: float = 0.02, size: int = 1 << 24) -> float:
    """Bytes/s to and from memory, read + written, of a copy that is larger than caches."""
    import numpy as np

    a = np.ones(size, np.uint8)
    b = np.empty_like(a)
    return 2 * size / _best(lambda: np.copyto(b, a), seconds)


def _best(work: Callable[[], object], seconds: float) -> float:
    """The shortest time of `work`, which runs once to warm up and then for about so many seconds."""
    work()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _cpuinfo() -> list[tuple[str, str]]:
    """Keys and values of the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return []
    return [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in first.splitlines())]


def _nvidia_smi() -> list[tuple[str, int]]:
    """Name and bytes of each GPU that this process may use; none if there is no driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if (visible is not None and visible.strip() in ("", "-1")) or not shutil.which("nvidia-smi"):
        return []
    ask = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout
        gpus = [(row[0].strip(), int(row[1]) * 2**20) for row in csv.reader(said.splitlines()) if len(row) == 2]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    return gpus if visible is None else gpus[: len(visible.split(","))]
