"""Alarms about speed and memory. They depend on the clock, so they are words and nothing else.

Nothing here knows of `Controls`, and no detector, policy or checkpoint knows of this: a listener of `step` events that
tells `incident`s. What is alarming for step times was found by another group on healthy runs (science of stability):
p99 at 1.28 times the median, so 1.25 times is an alarm if the median itself stays there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lumina.events import Event
from lumina.orchestrator.robust import median

SLOW = 1.25  # times the usual step time
WINDOW = 100  # steps whose median counts
FULL = 0.95  # of the memory there is
GROWS = 0.05  # of the memory there is, from one window to the next, three times in a row: it will not last
TIMES = 3


class Alarms:
    """Hears `step` events; `memory` is what the device has, in bytes. `emit` takes a type and fields."""

    def __init__(self, memory: float, emit: Callable[..., object]) -> None:
        self.memory, self.emit = memory, emit
        self.seconds: list[float] = []  # of a token, in the window that is being filled
        self.used: list[float] = []  # largest of each window
        self.peak = 0.0
        self.usual: float | None = None  # median of the fastest window
        self.said: set[str] = set()

    def __call__(self, event: Event) -> None:
        if event["t"] in ("run", "phase"):  # another machine, or other work: learn anew
            self.__init__(self.memory, self.emit)  # type: ignore[misc]
        if event["t"] != "step" or not event.get("tok_s"):
            return
        self.seconds.append(1 / event["tok_s"])
        self.peak = max(self.peak, event.get("mem") or 0.0)
        if len(self.seconds) == WINDOW:
            self._judge(event["step"])
            self.seconds, self.peak = [], 0.0

    def _judge(self, step: int) -> None:
        now = median(self.seconds)
        self.usual = now if self.usual is None else min(self.usual, now)
        self._say("slow", now > SLOW * self.usual, step, times=round(now / self.usual, 2))
        self.used = [*self.used[-TIMES:], self.peak]
        self._say("memory full", self.peak > FULL * self.memory, step, used=self.peak, memory=self.memory)
        gains = [later - earlier for earlier, later in zip(self.used, self.used[1:], strict=False)]
        growing = len(gains) == TIMES and min(gains) > GROWS * self.memory
        self._say("memory grows", growing, step, used=self.peak, memory=self.memory)

    def _say(self, kind: str, now: bool, step: int, **figures: Any) -> None:
        """Once, until it is over."""
        if now and kind not in self.said:
            self.emit("incident", step=step, kind=kind, **figures)
        self.said = self.said | {kind} if now else self.said - {kind}
