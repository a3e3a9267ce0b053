"""What may change when a run goes on: how it is computed, kept and shown. What is computed makes another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lumina.config.check import build
from lumina.config.layers import Layer, drop_other_kinds, read_settings, unknown
from lumina.config.resolve import Resolved, flatten
from lumina.errors import UserError

RESUME = "lumina resume"  # the origin of what was changed
KEYS = (
    "parallel.device", "parallel.threads", "train.micro_batch", "train.compile", "train.recompute", "precision.mode",
    "precision.eval", "model.moe.kernel", "orchestrator.mode", "orchestrator.snapshot_every",
)  # fmt: skip
SECTIONS = ("checkpoint.", "telemetry.")
# What was settled for another value of these is settled anew.
FOLLOWS = {
    "precision.eval": ("precision.mode",),
    "model.moe.kernel": ("parallel.device", "precision.mode"),
    "train.compile": ("parallel.device",),
    "checkpoint.every": ("checkpoint.mtbf",),
    "orchestrator.snapshot_every": ("orchestrator.mode",),
}


def change(resolved: Resolved, settings: Sequence[str] | Mapping[str, Any]) -> Resolved:
    """The configuration of a run with `settings` over it; what the machine decides is `auto` again where they touch it.

    Raises one `UserError` with all that is wrong, such as keys that would make it another run.
    """
    problems: list[str] = []
    layer = read_settings(settings, problems)
    layer = Layer(RESUME, layer.values)
    problems += unknown(layer)
    fixed = [key for key in layer.values if key not in KEYS and not key.startswith(SECTIONS)]
    if fixed and not problems:
        raise UserError(
            f"{', '.join(fixed)}: a run keeps what it computes; only how may change when it goes on: "
            f"{', '.join(KEYS)}, {' and '.join(f'{name}*' for name in SECTIONS)}",
            fix="go on without, or begin another run: lumina train",
        )
    values, origins = flatten(resolved.config), dict(resolved.origins)
    values |= layer.values
    drop_other_kinds(values, layer, [layer], problems)
    origins |= dict.fromkeys(layer.values, RESUME)
    for key, causes in FOLLOWS.items():
        touched = key not in layer.values and any(cause in layer.values for cause in causes)
        if touched and origins.get(key, "").startswith("resolved: "):
            values[key] = "auto"
    config = build(values, origins, problems)
    return replace(resolved, config=config, origins={key: origins.get(key, "default") for key in flatten(config)})


def differences(before: Resolved, after: Resolved) -> dict[str, list[Any]]:
    """`{key: [from, to]}` of every value that is another."""
    old, new = flatten(before.config), flatten(after.config)
    return {key: [old.get(key), value] for key, value in new.items() if old.get(key) != value}
