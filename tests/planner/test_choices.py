"""A plan's configuration is the one that training would settle on this machine, found without trying."""

from __future__ import annotations

from typing import Any

import pytest

from lumina.config.resolve import flatten, resolve, settle
from lumina.errors import UserError
from lumina.planner.choices import settled
from lumina.planner.hardware import parse_gpus, this_machine
from lumina.training import machine

# Found by trying, or by how much memory is free now.
OPEN = ("model.moe.kernel", "train.compile", "checkpoint.write", "checkpoint.every", "orchestrator.snapshot_every")


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        ("debug", {}),
        ("b1", {"model.seq_len": "4k", "precision.eval": "fp32"}),
        ("b7", {"train.batch_tokens": 24576, "model.seq_len": 1024, "model.kind": "dense"}),
        ("tiny", {"parallel.threads": 1, "train.micro_batch": 2}),
    ],
)
def test_it_is_what_training_chooses(source: str, keys: dict[str, Any]) -> None:
    resolved = resolve(source, {"parallel.device": "cpu", **keys})
    really = flatten(settle(resolved, machine.choose(resolved.config)).config)
    planned = flatten(settled(resolved.config, this_machine("cpu")))
    assert {key: planned[key] for key in planned if key not in OPEN} == {
        key: value for key, value in really.items() if key not in OPEN
    }


def test_a_batch_has_to_divide_among_the_devices() -> None:
    with pytest.raises(UserError, match="do not divide among 3 processes") as caught:
        settled(resolve("debug").config, parse_gpus("3xH100"))
    assert "start 2 or 4 processes" in caught.value.fix


def test_a_gpu_decides_the_precision() -> None:
    found = {name: settled(resolve("debug").config, parse_gpus(name)).precision.mode for name in ("T4", "H100", "L4")}
    assert found == {"T4": "fp16", "H100": "bf16", "L4": "bf16"}
