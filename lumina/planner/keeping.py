"""What a finished run leaves for the plans to come: its times, how far forecasts were off, the shape of its curve."""

from __future__ import annotations

from pathlib import Path

from lumina.planner import calibration
from lumina.planner.actual import Comparison, compared
from lumina.planner.findings import findings, tokens_per_param
from lumina.planner.hardware import known_as
from lumina.planner.history import History, asides, spread_of_steps


def keep(path: Path) -> None:
    """Records what a run that has come to its last step teaches into the calibration.

    Raises `UserError` if that cannot be written.
    """
    run = History.of(Path(path))
    aim = run.aim
    if run.config is None or aim is None:
        return
    machine = run.begun["machine"]
    device = known_as(run.begun["device"], machine["device_name"], machine["cores"])
    curve = findings(run.recorder(aim).curve, aim, tokens_per_param(run.config, run.begun))
    figures = _figures(run, compared(run)) | curve
    calibration.record(device, run.config, run.begun["processes"], figures)


def _figures(run: History, held: Comparison) -> dict[str, float]:
    """What the calibration keeps of times, memory and loss."""
    found = dict[str, float]()
    items = {item.name: item for item in held.items}
    step = items["step"].actual
    if step is not None:
        low, high = spread_of_steps(run)
        found |= {"step": step, "step_low": min(step, low), "step_high": max(step, high)}
        if (bare := ((run.plan or {}).get("step_seconds") or {}).get("uncorrected")) and bare["mid"]:
            found[f"ratio_{bare['bound']}"] = step / bare["mid"]
    found |= {name: value for name, value in asides(run).items() if value}
    ratios = {"memory_ratio": items["memory"].ratio, "time_ratio": items["training"].ratio}
    found |= {name: ratio for name, ratio in ratios.items() if ratio is not None}
    loss = items["loss"]
    if loss.forecast is not None and loss.actual is not None:
        found["loss_residual"] = loss.actual - loss.forecast.mid
    return found
