"""After the run: what was forecast of it against what happened, for memory, time and loss.

Everything is read from the run's folder: `plan.json`, `config.yaml`, `meta.json` and the events. Of a run that is not
finished, was resumed or went back, what it says holds for the history that counts, and the time of all attempts is
counted; what a run has no record of is named in `missing`, never made up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lumina.errors import UserError
from lumina.planner import outset
from lumina.planner.history import History, total, undone
from lumina.planner.laws import Interval

Kind = Literal["heldout", "train"]

GIB = 2**30
LAST, LEAST_STEPS = 0.02, 10  # of a run, at least: the steps whose mean is its final training loss


@dataclass(frozen=True)
class Item:
    """One quantity: what was forecast (None: nothing was), what it came to (None: not known), in `unit`."""

    name: str
    unit: str
    forecast: Interval | None
    actual: float | None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Actual over forecast."""
        known = self.forecast is not None and self.actual is not None and self.forecast.mid
        return self.actual / self.forecast.mid if known else None  # type: ignore[operator,union-attr]

    @property
    def inside(self) -> bool | None:
        """Whether it lay in the interval; None of a forecast that has none."""
        if self.forecast is None or self.actual is None or self.forecast.low == self.forecast.high:
            return None
        return self.forecast.low <= self.actual <= self.forecast.high


@dataclass(frozen=True)
class Told:
    """A forecast that was made on the way, at this step."""

    step: int
    share: float
    loss: Interval
    inside: bool | None  # None while the run is not finished


@dataclass(frozen=True)
class Comparison:
    """A run against its forecasts: the `trail` are those of its loss of this `kind`, which came to `final`."""

    run: str
    finished: bool
    step: int
    steps: int
    attempts: int
    undone_seconds: float  # of training, in steps that were taken again or given up
    items: tuple[Item, ...]
    kind: Kind
    final: float | None
    trail: tuple[Told, ...]
    missing: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values; intervals are low, mid, high."""
        items = {
            item.name: {
                "unit": item.unit,
                "forecast": item.forecast and item.forecast._asdict(),
                "actual": item.actual,
                "ratio": item.ratio,
                "inside": item.inside,
                "note": item.note,
            }
            for item in self.items
        }
        trail = [asdict(told) | {"loss": told.loss._asdict()} for told in self.trail]
        return asdict(self) | {"items": items, "trail": trail, "missing": list(self.missing)}

    def lines(self) -> list[str]:
        """The same for a person."""
        state = "finished" if self.finished else f"at step {self.step} of {self.steps}"
        attempts = f", {self.attempts} attempts" if self.attempts > 1 else ""
        undone = f", {_seconds(self.undone_seconds)} of training undone" if self.undone_seconds else ""
        lines = [f"run    {self.run}: {state}{attempts}{undone}"]
        lines += [_line(item) for item in self.items]
        if self.trail:
            what = "held-out" if self.kind == "heldout" else "training"
            lines.append(f"way    forecasts of the final {what} loss, with their intervals of 80 %")
        last = -1.0
        for told in self.trail:
            if told.share - last < 0.099 and told is not self.trail[-1]:
                continue  # some ten of them say it
            last = told.share
            verdict = "" if told.inside is None else " in it" if told.inside else " outside"
            between = f"{told.loss.low:.3f} to {told.loss.high:.3f}"
            lines.append(f"       {told.share:4.0%}  {told.loss.mid:.3f} ({between}){verdict}")
        if self.final is not None and self.trail:
            lines.append(f"       it came to {self.final:.3f}")
        return lines + [f"!      {line}" for line in self.missing]


def compare(path: Path) -> Comparison:
    """Holds a run's folder against what was forecast of it. Raises `UserError` if its event log is damaged."""
    try:
        return compared(History.of(Path(path)))
    except (LookupError, TypeError) as error:
        wrong = f"{Path(path) / 'events.jsonl'}: damaged: an event lacks what it should say ({error})"
        raise UserError(wrong, fix="restore the log") from error


def compared(run: History) -> Comparison:
    """The same of a folder that was read."""
    kind, final = _final(run)
    missing = _missing(run)
    plan = run.plan or {}
    return Comparison(
        run=str(run.path),
        finished=run.finished,
        step=run.step,
        steps=run.begun.get("steps") or plan.get("steps") or 0,
        attempts=len({event["attempt"] for event in run.every}),
        undone_seconds=undone(run),
        items=(_memory(run), _step(run), *_times(run), _loss(run)),
        kind=kind,
        final=final,
        trail=tuple(_trail(run, kind, final)),
        missing=tuple(missing),
    )


# -- each quantity -----------------------------------------------------------------------------------------------------


def _memory(run: History) -> Item:
    """The most that any attempt held; on a CPU without what the process held before the model."""
    plan = run.plan or {}
    peak = max((event["mem"] for event in run.every if event["t"] == "step"), default=None)
    forecast = plan.get("memory")
    before = plan.get("memory_before", 0)
    exact = forecast and Interval(*(3 * [float(forecast["total"])]))
    note = ""
    if run.cpu and before:
        note = f"without {before / GIB:.2f} GiB that the process held before the model"
    elif run.cpu:
        note = "the whole process, libraries included"
    return Item("memory", "bytes", exact, None if peak is None else float(max(0, peak - before)), note)


def _step(run: History) -> Item:
    steps = run.of_type("step")
    actual = steps[-1]["wall"] / len(steps) if steps else None
    plan = (run.plan or {}).get("step_seconds")
    return Item("step", "seconds", outset.interval(plan), actual, plan["source"] if plan else "")


def _times(run: History) -> list[Item]:
    """Seconds of the training steps that count, and of all attempts from their start to their end."""
    plan = run.plan or {}
    steps = run.of_type("step")
    train = steps[-1]["wall"] if steps else None
    note = "" if run.finished else "so far"
    step, seconds = outset.interval(plan.get("step_seconds")), plan.get("seconds")
    parts = (seconds or {}).get("parts", {})
    scale = parts["steps"] / step.mid if step and parts.get("steps") else None
    forecast = Interval(*(edge * scale for edge in step)) if step and scale else None
    spent, counted = total(run)
    uncounted = (seconds or {}).get("uncounted", [])
    beside = f"the forecast is without {', '.join(uncounted)}" if uncounted else ""
    notes = "; ".join(part for part in (note, counted, beside) if part)
    return [
        Item("training", "seconds", forecast, train, note),
        Item("total", "seconds", outset.interval(seconds), spent, notes),
    ]


def _loss(run: History) -> Item:
    """The held-out loss against the law that the run began with."""
    plan = (run.plan or {}).get("loss")
    note = f"by {plan['law']}: the loss of its own text and tokens" if plan and plan["law"] != "own" else ""
    if not run.finished:
        note = "; ".join(part for part in ("so far", note) if part)
    return Item("loss", "nats", outset.interval(plan), _heldout(run), note)


def _final(run: History) -> tuple[Kind, float | None]:
    """The loss that forecasts on the way are judged by, and what it came to, if the run is finished.

    Held-out if any was forecast of it: else the training loss, as the mean of its last steps.
    """
    kind: Kind = "heldout" if any(event.get("heldout") for event in run.of_type("forecast")) else "train"
    if not run.finished:
        return kind, None
    if kind == "heldout":
        return kind, _heldout(run)
    losses = [event["loss"] for event in run.of_type("step")]
    last = losses[-max(LEAST_STEPS, round(LAST * len(losses))) :]
    return kind, sum(last) / len(last) if last else None


def _heldout(run: History) -> float | None:
    """The last comparable held-out loss; of a finished run that of its end."""
    evals = [event for event in run.of_type("eval") if event["split"] == "heldout" and event["comparable"]]
    return float(evals[-1]["loss"]) if evals else None


def _trail(run: History, kind: Kind, final: float | None) -> list[Told]:
    told = []
    for event in run.of_type("forecast"):
        loss = outset.interval(event.get(kind))
        if loss is not None:
            inside = None if final is None else loss.low <= final <= loss.high
            told.append(Told(event["step"], event["share"], loss, inside))
    return told


def _missing(run: History) -> list[str]:
    missing = []
    if run.plan is None:
        missing.append("no plan.json: the run began before there was one, or it is damaged; nothing was forecast of it")
    else:
        missing += [f"no forecast of {what}: {why}" for what, why in run.plan.get("missing", {}).items()]
    if not run.every:
        missing.append("no events.jsonl: the run has not begun")
    if run.config is None:
        missing.append("config.yaml cannot be read")
    if run.every and not any(event["t"] == "forecast" for event in run.every):
        missing.append("no forecast on the way: it is older, or shorter than the steps between two of them")
    return missing


# -- figures for people ------------------------------------------------------------------------------------------------


def _line(item: Item) -> str:
    show = SHOW[item.unit]
    actual = "not known" if item.actual is None else show(item.actual)
    if item.forecast is None:
        said = "nothing was forecast"
    elif item.inside is None:
        said = f"forecast {show(item.forecast.mid)}"
    else:
        between = f"{show(item.forecast.low)} to {show(item.forecast.high)}"
        said = f"forecast {show(item.forecast.mid)} ({between}: {'inside' if item.inside else 'outside'})"
    off = f", {item.ratio:.2f} of it" if item.ratio is not None else ""
    return f"{item.name:8} {actual}; {said}{off}" + (f"; {item.note}" if item.note else "")


def _bytes(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= GIB / 10 else f"{value / 2**20:.1f} MiB"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"


def _nats(value: float) -> str:
    return f"{value:.3f} nats"


SHOW: dict[str, Callable[[float], str]] = {"bytes": _bytes, "seconds": _seconds, "nats": _nats}
