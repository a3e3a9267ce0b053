"""Names of devices, what is known of them, and what this machine is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lumina.errors import UserError
from lumina.planner import hardware
from lumina.planner.hardware import DEVICES, Fleet, device_called, known_as, parse_gpus, this_machine
from lumina.planner.time import OF_BANDWIDTH

# As people type them, and as drivers and torch report them.
NAMES = {
    "8xH100": ("H100-SXM", 8),
    "H200": ("H200", 1),
    " 2 x a100-40gb ": ("A100-40GB", 2),
    "4*rtx4090": ("RTX-4090", 4),
    "64XH100-PCIe": ("H100-PCIe", 64),
    "NVIDIA H100 80GB HBM3": ("H100-SXM", 1),
    "NVIDIA H100 PCIe": ("H100-PCIe", 1),
    "NVIDIA H100 NVL": ("H100-NVL", 1),
    "NVIDIA A100-SXM4-40GB": ("A100-40GB", 1),
    "NVIDIA A100 80GB PCIe": ("A100-80GB", 1),
    "Tesla V100-SXM2-16GB": ("V100-16GB", 1),
    "Tesla T4": ("T4", 1),
    "NVIDIA L4": ("L4", 1),
    "NVIDIA L40S": ("L40S", 1),
    "NVIDIA GeForce RTX 3090": ("RTX-3090", 1),
}
WRONG = {
    "8xH1000": "did you mean H100 ",
    "GH200": "did you mean H200",
    "A10": "did you mean A10G",
    "L40": "did you mean L40S",
    "RTX 2080": "known are B200, H200",
    "": "unknown GPU ''",
    "0xH100": "0 is no number of GPUs",
    "-2xH100": "-2 is no number",
    "1.5xH100": "1.5 is no number",
    "99999999xH100": "is no number of GPUs",
}


@pytest.mark.parametrize("text", NAMES)
def test_a_name_means_one_card(text: str) -> None:
    fleet = parse_gpus(text)
    assert (fleet.device.name, fleet.count) == NAMES[text]


@pytest.mark.parametrize("text", WRONG)
def test_what_is_not_known_is_said_with_what_is(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_gpus(text)
    assert WRONG[text] in str(caught.value)
    assert "H100" in str(caught.value)


def test_every_device_has_its_source_and_is_called_what_it_is() -> None:
    for name, device in DEVICES.items():
        assert device_called(name) is device
        assert len(device.source) > 10
        assert device.memory < 200e9
        assert device.bandwidth <= 8e12
        assert all(0 < low <= high < 0.7 for low, high in map(device.mfu, ("dense", "moe", "mod", "hybrid")))


def test_peaks_are_dense_and_of_the_units_that_a_precision_uses() -> None:
    H100, T4 = DEVICES["H100-SXM"], DEVICES["T4"]
    assert H100.rate("bf16") == H100.rate("bf16_pure") == 989.5e12  # not the 1,979 of structured sparsity
    assert H100.rate("fp32") == 67e12  # not the 495 of TF32
    assert (T4.precision, H100.precision) == ("fp16", "bf16")
    with pytest.raises(UserError, match="T4 has no bf16 units") as caught:
        T4.rate("bf16")
    assert "precision.mode=fp16" in caught.value.fix


def test_more_than_a_machine_full_of_gpus_loses_some() -> None:
    H100 = DEVICES["H100-SXM"]
    few, many, most = (Fleet(H100, count) for count in (8, 512, 2048))
    assert few.efficiency == (1.0, 1.0)
    assert few.efficiency[0] > many.efficiency[0] > most.efficiency[0] > 0.5
    assert few.link > many.link


def test_a_collective_uses_every_network_card_of_a_machine() -> None:
    """What reduce-scatter reached on 4 to 128 machines of 8 H100s: NCCL's issue 1229."""
    link = parse_gpus("16xH100").link
    assert OF_BANDWIDTH * link <= 260e9 < 360e9 <= link == 8 * 400e9 / 8
    assert parse_gpus("16xA100").link == 1600e9 / 8  # of llm-foundry's cluster
    assert parse_gpus("16xH100-PCIe").link < parse_gpus("8xH100-PCIe").link == 64e9


@pytest.mark.parametrize(("count", "machines"), [(1, 1), (8, 1), (12, 2), (16, 2), (17, 17), (64, 8), (100, 20)])
def test_machines_are_as_few_as_hold_equally_many(count: int, machines: int) -> None:
    assert Fleet(DEVICES["H100-SXM"], count).machines == machines
    assert Fleet(DEVICES["H100-SXM"], count, here=True).machines == 1


def test_memory_is_what_drivers_report() -> None:
    """Not 10^9 bytes a GB, which is 6 % less than an H100 has."""
    reported = {"H100-SXM": 81559, "H200": 143771, "L40S": 46068, "RTX-4090": 24564, "A100-80GB": 81920}
    assert {name: DEVICES[name].memory / 2**20 for name in reported} == reported


def test_a_gpu_that_is_not_known_can_be_described() -> None:
    fleet = parse_gpus("16xMI300X", 1307, 192 * 2**30)
    device = fleet.device
    assert (device.name, fleet.count, device.memory, device.rate("bf16")) == ("MI300X", 16, 192 * 2**30, 1307e12)
    assert device.bandwidth / device.rate("bf16") == min(d.bandwidth / max(d.peak.values()) for d in DEVICES.values())
    assert all(word in device.source for word in ("as given, 1307 TFLOP/s, 192 GiB", "assumed", "PCIe 4"))
    with pytest.raises(UserError, match="no fp32 units that are known"):
        device.rate("fp32")


@pytest.mark.parametrize(
    ("text", "peak", "memory", "said"),
    [
        ("8xMI300X", 1307, None, "unknown GPU 'MI300X'; --peak-tflops and --mem are needed both"),
        ("8xMI300X", None, 2**37, "--peak-tflops and --mem are needed both"),
        ("8xH100", 1307, 2**37, "of the H100-SXM peak and memory are known"),
        ("8x", 1307, 2**37, "unknown GPU ''"),
        ("-8xMI300X", 1307, 2**37, "-8 is no number of GPUs"),
    ],
)
def test_a_description_that_is_none_is_refused(text: str, peak: float | None, memory: int | None, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_gpus(text, peak, memory)
    assert said in str(caught.value)


def test_an_unknown_gpu_is_answered_with_how_to_describe_it() -> None:
    with pytest.raises(UserError) as caught:
        parse_gpus("8xMI300X")
    assert "known are B200, H200" in caught.value.fix
    assert caught.value.fix.endswith("--gpus 8xMI300X --peak-tflops 500 --mem 64GiB")


def nvidia_smi(folder: Path, said: str, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
    """A driver's tool that says this."""
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\nprintf '{said}'\nexit {code}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_of_this_machine_are_those_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "NVIDIA A100-SXM4-40GB, 40960\\nNVIDIA A100-SXM4-40GB, 40960\\n", monkeypatch)
    fleet = this_machine()
    assert (fleet.device.name, fleet.count, fleet.here) == ("A100-40GB", 2, True)
    assert fleet.device.memory == 40960 * 2**20  # as the driver has it, not the data sheet
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert this_machine().count == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert this_machine(rates={"fp32": 1e11}).device.is_cpu


def test_an_unknown_gpu_is_not_guessed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "NVIDIA X9, 8192\\n", monkeypatch)
    with pytest.raises(UserError, match="nothing is known of the NVIDIA X9"):
        this_machine()
    with pytest.raises(UserError) as caught:
        this_machine()
    assert "--gpus '1xNVIDIA X9' --peak-tflops 500 --mem 8192MiB" in caught.value.fix
    assert this_machine(rates={"bf16": 5e13}).device.rate("bf16") == 5e13


def test_a_driver_that_fails_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "failed", monkeypatch, code=9)
    assert this_machine(rates={"fp32": 1e11}).device.is_cpu
    with pytest.raises(UserError, match="lists no GPU"):
        this_machine("cuda")
    with pytest.raises(UserError, match="Apple publishes"):
        this_machine("mps")


def test_the_cpu_is_measured_unless_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "matmul_rate", lambda: 7e10)
    monkeypatch.setattr(hardware, "has_fast_bf16", lambda: False)
    fresh, known = this_machine("cpu").device, this_machine("cpu", {"bf16": 4e11}).device
    assert (fresh.peak, fresh.precision) == ({"fp32": 7e10}, "fp32")
    assert (known.peak, known.precision) == ({"bf16": 4e11}, "bf16")
    assert "just measured" in fresh.source
    assert "earlier" in known.source


def test_measuring_measures() -> None:
    assert 1e8 < hardware.matmul_rate(0.01, 128) < 1e13
    assert 1e7 < hardware.copy_rate(0.01, 1 << 20) < 1e13


def test_a_run_and_a_plan_call_a_device_the_same() -> None:
    assert known_as("cuda", "NVIDIA H100 80GB HBM3", 16) == "H100-SXM"
    assert known_as("cuda", "Some Card", 16) == "Some Card"
    assert known_as("cpu", "AMD EPYC", 2) == "AMD EPYC, 2 cores"
