"""Runs that never were, for the orchestrator to watch, and a door that writes down what goes through it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from lumina.config.overlay import Overlay
from lumina.errors import UserError
from lumina.orchestrator.orchestrator import Orchestrator
from lumina.orchestrator.policy import Mode
from lumina.orchestrator.protocol import Decision, Look, Observation, Outcome, Replay
from lumina.orchestrator.signals import Facts, Signals

End = Callable[[str, list[str], int], float]  # of an arm: name, names of what it lays over the plan, pair

FACTS = Facts(vocab=260, batch_tokens=512, beta2=0.95)
MOE = Facts(vocab=260, batch_tokens=512, beta2=0.95, top_k=2, bias_rate=1e-3)
MOD = Facts(vocab=260, batch_tokens=512, beta2=0.95, routed=0.25, capacity=0.25)


def seen(step: int, **changes: Any) -> Observation:
    """What a sound step looks like: losses fall as a power, with noise of 5 %, the same for each step number."""
    noise = random.Random(step).gauss(0, 0.05)
    values: dict[str, Any] = {
        "step": step, "tokens": 512 * step, "loss": 2.0 * math.exp(noise) * (1 + 10 / (step + 5)), "acc": 0.4,
        "lr": 3e-3, "clip": 1.0, "stage": "warmup" if step <= 10 else "stable", "changed": "",
        "grad_norm": math.exp(random.Random(-step).gauss(0, 0.1)), "grad_embed": 0.5, "grad_head": None,
        "grad_router": None, "update_ratio": 1e-3, "adam_rms": 1.0, "log_z": 5.0, "skipped": False, "batch": step - 1,
        "content": f"{step:x}",
    }  # fmt: skip
    return Observation(**(values | changes))


def watched(steps: int, facts: Facts = FACTS, first: int = 1, **changes: Any) -> Signals:
    """The signals of a sound run of so many steps; `changes` are of every one."""
    signals = Signals(facts)
    for step in range(first, first + steps):
        signals.observe(seen(step, **changes))
    return signals


def look(step: int, **changes: Any) -> Look:
    return Look(**({"step": step, "loss": 2.0, "golden": 2.1, "attention": 5.0} | changes))


def replay(
    step: int, loss: float, *others: float, same: bool = True, again: float | None = None, ahead: int = 0
) -> Replay:
    return Replay(step, loss, loss if again is None else again, same, 2.0, ahead=ahead, others=others)


class Door:
    """`Controls` of a run that only writes down; `answers` are what replays come to."""

    def __init__(self, points: tuple[int, ...] = (), answer: Replay | None = None, refuse: str = "") -> None:
        self.known, self.answer, self.refuse = points, answer, refuse
        self.did: list[tuple[Any, ...]] = []
        self.why: list[Decision] = []
        self.replays = 0
        self.returned: Callable[[int], None] = lambda step: None  # hears of a way back, as training does
        self.saved: Callable[[int], None] = lambda step: None  # hears of a checkpoint
        self.step, self.last, self.step_seconds = 0, 100_000, 0.5
        self.overlays: tuple[Overlay, ...] = ()
        self.end: End = lambda name, laid, pair: 2.0  # held-out loss of an arm
        self.arms: list[Outcome] = []
        self.worth: list[int] = []  # of each fork
        self.same: list[str] = []  # overlays that change nothing

    @property
    def rest(self) -> int:
        return self.last - self.step

    def work(self, overlays: Sequence[Overlay]) -> float:
        return 1.0

    @contextmanager
    def fork(self, step_seconds: float, worth: int = 0) -> Iterator[Door]:
        self.worth.append(worth)
        yield self

    def alters(self, overlays: Sequence[Overlay]) -> bool:
        return [one.id for one in overlays] != self.same

    def run(self, name: str, overlays: Sequence[Overlay], steps: int, probe: int, hold: bool = False) -> Outcome:
        order = [one for one in overlays if one.key == "data.order"]
        laid = [one.id for one in overlays if one.key != "data.order"]
        pair = order[0].value if order else 0
        assert isinstance(pair, int)
        loss = self.end(name, laid, pair)
        self.arms.append(Outcome(name, steps, probe, [], loss, True, self.step_seconds * (steps + probe)))
        self.held = [*overlays] if hold else self.held
        return self.arms[-1]

    held: ClassVar[list[Overlay]] = []

    def commit(self, why: Decision, fork: Any, outcome: Outcome) -> list[Any]:
        if self.refuse:
            raise UserError(self.refuse, "mend it")
        self.saved(self.step)
        self._do(why, "commit", *(one.id for one in self.held))
        self.overlays = (*self.overlays, *self.held)
        self.step += outcome.steps
        return [(seen(step), None) for step in range(self.step - outcome.steps, self.step)]

    def undo(self, why: Decision, *ids: str) -> None:
        self._do(why, "undo", *ids)
        back = min(one.begin for one in self.overlays if one.id in ids) - 1
        self.overlays = tuple(one for one in self.overlays if one.id not in ids)
        self.returned(back)

    def points(self) -> tuple[int, ...]:
        return self.known

    def replay(self, before: int) -> Replay | None:
        self.replays += 1
        return self.answer

    def rollback(self, why: Decision, step: int, data: str = "replay", until: int = 0) -> None:
        if self.refuse:
            raise UserError(self.refuse, "mend it")
        self._do(why, "rollback", step, data, *([until] if until else []))
        self.step = step
        self.returned(step)

    def replan(self, why: Decision) -> None:
        self._do(why, "replan")

    def stop(self, why: Decision) -> None:
        self._do(why, "stop")

    def _do(self, why: Decision, *what: Any) -> None:
        self.why.append(why)
        self.did.append(what)


class Watch:
    """An orchestrator, what it told, and the door that it has."""

    def __init__(self, mode: Mode = "act", facts: Facts = FACTS, **door: Any) -> None:
        self.told: list[dict[str, Any]] = []
        self.orchestrator = Orchestrator(mode, facts, self._emit)
        self.door = Door(**door)
        self.door.returned = lambda step: self.orchestrator.return_to(self.packed[step])
        self.packed = dict[int, dict[str, Any]]()  # of restore points
        self.door.saved = lambda step: self.packed.update({step: self.orchestrator.pack()})

    def _emit(self, type: str, **fields: Any) -> None:
        self.told.append({"t": type, "attempt": 0, **fields})

    def step(self, observation: Observation, looked: Look | None = None) -> None:
        """One turn, as `training` takes it."""
        self.door.step = observation.step + 1  # what a step did is known one step later
        self.orchestrator.observe(observation)
        if looked:
            self.orchestrator.looked(looked)
        self.orchestrator.between(self.door)  # type: ignore[arg-type]
        if self.door.known and observation.step in self.door.known:
            self.packed[observation.step] = self.orchestrator.pack()

    def run(self, first: int, last: int, **changes: Any) -> None:
        for step in range(first, last + 1):
            self.step(seen(step, **changes))

    def decisions(self, kind: str = "advise") -> Iterator[dict[str, Any]]:
        return (event for event in self.told if event["t"] == "decision" and event["kind"] == kind)
