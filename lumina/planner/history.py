"""A run's folder as its forecasts are held against it: what counts, what was undone, where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lumina.config.resolve import read as read_config
from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.events import Event, merged, read_events
from lumina.planner import outset
from lumina.planner.curve import Recorder
from lumina.planner.forecast import Aim
from lumina.planner.outlook import aim_of


@dataclass(frozen=True)
class History:
    """All events of a run, those of the history that counts, its plan and its configuration, where they can be read."""

    path: Path
    every: list[Event]
    events: list[Event]
    plan: dict[str, Any] | None
    config: Config | None

    @classmethod
    def of(cls, path: Path) -> History:
        log = path / "events.jsonl"
        every = list(read_events(log)) if log.is_file() else []
        try:
            config = read_config(path / "config.yaml").config
        except UserError:
            config = None
        return cls(path, every, merged(every), outset.read(path), config)

    def of_type(self, *types: str) -> list[Event]:
        return [event for event in self.events if event["t"] in types]

    @property
    def begun(self) -> Event:
        """The newest `run` event."""
        return next((event for event in reversed(self.every) if event["t"] == "run"), {})

    @property
    def finished(self) -> bool:
        return bool(self.every) and self.every[-1]["t"] == "end" and self.every[-1].get("reason") == "done"

    @property
    def step(self) -> int:
        return max((event["step"] for event in self.of_type("step")), default=0)

    @property
    def cpu(self) -> bool:
        return self.begun.get("device") != "cuda"

    @property
    def aim(self) -> Aim | None:
        """Where it was going; None if it never began, its configuration cannot be read, or it is too old to say."""
        if self.config is None or not {"phases", "steps", "batch_tokens", "data"} <= self.begun.keys():
            return None
        return aim_of(self.config, self.begun)

    def recorder(self, aim: Aim) -> Recorder:
        """Its curve."""
        return Recorder.of(aim.schedule, self.events)


def total(run: History) -> tuple[float | None, str]:
    """Seconds of all processes that worked on the run, and what is not in them; None if it never began."""
    processes: dict[float, list[Event]] = {}
    for event in run.every:
        if event["t"] == "run" and "began" in event:
            processes.setdefault(event["began"], [])
        if processes:
            processes[next(reversed(processes))].append(event)
    if not processes:
        worked = _worked(run.every)
        return worked or None, "the clock is not in the log: steps, evaluations and saves alone"
    seconds, cut = 0.0, 0
    for began, events in processes.items():
        if events[-1]["t"] == "end":
            seconds += events[-1]["at"] - began
        else:
            seconds, cut = seconds + events[0]["at"] - began + _worked(events), cut + 1
    return seconds, f"{cut} of the processes did not tell their end, and count as far as they told" if cut else ""


def _worked(events: Sequence[Event]) -> float:
    """Seconds of steps, evaluations, looks and waiting for saves in these events, whatever became of them."""
    aside = {"eval": "seconds", "probe": "seconds", "checkpoint": "stall"}
    seconds = [float(event.get(aside[event["t"]], 0.0)) for event in events if event["t"] in aside]
    return sum(seconds) + sum(_trained(events).values())


def _trained(events: Sequence[Event]) -> dict[int, float]:
    """Seconds of the steps of each attempt; `wall` goes on from where the attempt began."""
    seconds = dict[int, float]()
    walls: dict[int, list[float]] = {}
    for event in events:
        if event["t"] == "step":
            walls.setdefault(event["attempt"], []).append(event["wall"])
    for attempt, told in walls.items():
        first = told[1] - told[0] if len(told) > 1 else 0.0  # of its first step only the end is known
        begun_anew = attempt == 0
        seconds[attempt] = told[-1] if begun_anew else told[-1] - told[0] + first
    return seconds


def undone(run: History) -> float:
    """Seconds of training in steps that do not count any more."""
    steps = run.of_type("step")
    kept = steps[-1]["wall"] if steps else 0.0
    attempts = len({event["attempt"] for event in run.every})
    return max(0.0, sum(_trained(run.every).values()) - kept) if attempts > 1 else 0.0


def spread_of_steps(run: History) -> tuple[float, float]:
    """Between which the mean step of a tenth of the run lay."""
    steps = run.of_type("step")
    tenth = max(1, len(steps) // 10)
    marks = [0.0, *(event["wall"] for event in steps[tenth - 1 :: tenth])]
    means = [(later - earlier) / tenth for earlier, later in pairwise(marks)]
    return min(means), max(means)


def asides(run: History) -> dict[str, float]:
    """Mean seconds of whatever is not a step."""
    times = {
        "evaluation": [event["seconds"] for event in run.of_type("eval")],
        "probe": [event["seconds"] for event in run.of_type("probe")],
        "save": [event["stall"] for event in run.of_type("checkpoint")],
    }
    return {name: sum(values) / len(values) for name, values in times.items() if values}
