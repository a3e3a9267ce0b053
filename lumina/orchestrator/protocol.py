"""What whoever watches a run may see of it, and all that may be done to it. `training.controls` does it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from lumina.config.overlay import Overlay, Value

Data = Literal["replay", "skip"]


@dataclass(frozen=True)
class Observation:
    """What one step did, known one step later. Nothing here depends on a clock."""

    step: int
    tokens: int  # trained, this step's included
    loss: float  # nats a token
    acc: float  # share of the tokens
    lr: float  # that acted
    grad_norm: float  # before clipping
    skipped: bool  # the guard moved nothing: loss or gradients were not finite
    balance: float | None  # largest over mean expert load, mean over layers; None without experts
    agreement: float | None  # share of tokens on which the causal depth rule and the choice agree; None without
    loss_scale: float | None  # of fp16


@dataclass(frozen=True)
class Decision:
    """Why something is done, for the `decision` event that is written before it is done."""

    rule: str  # what asked for it: a detector's name, or "hand"
    action: str  # in short: "lr.scale=0.5"
    evidence: dict[str, Any] = field(default_factory=dict)  # plain values
    reason: str = ""  # one sentence for a person
    links: list[str] = field(default_factory=list)  # files of trials, checkpoints, names of overlays

    def fields(self) -> dict[str, Any]:
        """As event fields; what is empty is left out."""
        return {"kind": "act"} | {k: v for k, v in asdict(self).items() if v or k in ("rule", "action", "evidence")}


@dataclass(frozen=True)
class Outcome:
    """What an arm came to: `steps` with its overlays, then a probe of `probe` steps of linear decay to 0."""

    name: str
    steps: int
    probe: int
    losses: list[float]  # of its `steps`, in nats a token
    heldout: float  # causal loss after the probe, in nats a token
    comparable: bool  # as in `eval` events
    seconds: float  # counted, not measured: all its steps times the step time that the fork was given


class Fork(Protocol):
    """A place that the run left on trial. Every arm begins there, and ends there."""

    def run(self, name: str, overlays: Sequence[Overlay], steps: int, probe: int, hold: bool = False) -> Outcome:
        """Goes `steps` with these overlays beside those in force, then the probe; leaves the run where it was.

        An overlay without an end holds in the probe too, whose decay begins at the rate that it leaves. Its events go
        to `trials/<name>.jsonl`. `hold` keeps the state before the probe in memory, for `Controls.commit`.
        Raises `UserError` for overlays out of bounds, or an arm longer than the rest of the run.
        """
        ...


class Controls(Protocol):
    """The only door: whatever is done to a run, by decision or by hand, goes through here, between two steps.

    Each action is journalled, on the disk, before it is done; each raises `UserError`, with nothing done, if it cannot
    be. One that lays something over the plan first saves where the run stands, and keeps that until it is undone.
    """

    @property
    def step(self) -> int:
        """The last step taken."""
        ...

    @property
    def overlays(self) -> tuple[Overlay, ...]:
        """What was laid over the plan, ended ones included."""
        ...

    def overlay(self, why: Decision, key: str, value: Value, steps: int | None = None) -> Overlay:
        """Lays a value over the plan from the next step on, for so many steps or to the end.

        `data.skip` leaves out batches that are still to be read.
        """
        ...

    def lift(self, why: Decision, id: str) -> None:
        """Ends an overlay: from the next step on it has no effect."""
        ...

    def undo(self, why: Decision, id: str) -> None:
        """Goes back to before an overlay and on without it: a new attempt, the run that never had it."""
        ...

    def rollback(self, why: Decision, step: int, data: Data = "replay") -> None:
        """Goes back to the restore point of `step`, in memory or on disk, and on from there in a new attempt.

        `skip` quarantines the batches read since then; what lies over the plan stays in force.
        """
        ...

    def snapshot(self) -> int:
        """Makes this step the restore point in memory, in place of the one before; returns its bytes."""
        ...

    def fork(self, step_seconds: float) -> AbstractContextManager[Fork]:
        """Leaves the run on trial, to return to this step; `step_seconds` is what a step counts."""
        ...

    def commit(self, why: Decision, fork: Fork, outcome: Outcome) -> None:
        """Goes on from the end of an arm that was held: its steps, without the probe, are the run's."""
        ...

    def save(self) -> None:
        """Saves a checkpoint of this step."""
        ...

    def stop(self, why: Decision) -> None:
        """Saves and ends the attempt; `lumina resume` goes on with it."""
        ...
