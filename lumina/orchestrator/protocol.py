"""What whoever watches a run may see of it, and all that may be done to it. `training.controls` does it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from lumina.config.overlay import Overlay, Value

Data = Literal["replay", "skip"]
# The ends of arms are evaluated on as much held-out text as takes this share of the compute of an arm, and on `FEWEST`
# tokens at least: the difference of two arms on the same text is then known to about a thousandth of a nat.
ENDPOINT, FEWEST = 0.1, 16_384
Stage = Literal["warmup", "stable", "decay"]


@dataclass(frozen=True)
class Observation:
    """What one step did, known one step later. Nothing here depends on a clock."""

    step: int
    tokens: int  # trained, this step's included
    loss: float  # nats a token
    acc: float  # share of the tokens
    lr: float  # that acted
    clip: float  # that acted
    stage: Stage  # of the schedule of this step's phase
    changed: str  # what the plan changed with this step: "phase", "capacity", ids of overlays that begin or end; or ""
    grad_norm: float  # before clipping
    grad_embed: float  # the same of parts: the embedding, an untied head, the routers of experts and of depth
    grad_head: float | None  # None if tied
    grad_router: float | None  # None without
    update_ratio: float  # norm of what the step moved over the norm of the weights, of a sample of them
    adam_rms: float  # root mean square of g / sqrt(v), of a sample: above 2.3 precedes spikes (Wortsman et al. 2023)
    log_z: float  # root mean square of log Z, nats
    skipped: bool  # the guard moved nothing: loss or gradients were not finite
    batch: int  # number of the batch, as planned, in its phase
    content: str  # hash of the batch's tokens; empty where they are planned to come again, in another epoch
    load: tuple[tuple[float, ...], ...] = ()  # tokens of each expert over the mean, for each layer
    entropy: tuple[float, ...] = ()  # of the routers' scores a token, nats, for each layer
    capacity: tuple[float, ...] = ()  # share of the tokens that each depth-routed layer's causal rule takes
    agreement: float | None = None  # share of tokens on which the causal depth rule and the choice agree; None without
    loss_scale: float | None = None  # of fp16
    broken: tuple[str, ...] = ()  # invariants that do not hold, each a sentence that begins with its name and ": "

    @property
    def clipped(self) -> float:
        """1 if the gradients were scaled down to `clip`, else 0."""
        return float(self.grad_norm > self.clip)

    @property
    def balance(self) -> float | None:
        """Largest over mean expert load, mean over layers; None without experts."""
        return sum(max(layer) for layer in self.load) / len(self.load) if self.load else None


@dataclass(frozen=True)
class Look:
    """What the probe saw behind `step`, without gradient and with the causal routing."""

    step: int
    loss: float  # of a fixed piece of held-out text, nats a token
    golden: float  # of a fixed batch as training reads it, nats a token: apart from `loss` if the way of data is broken
    attention: float  # largest attention logit
    churn: tuple[float | None, ...] = ()  # share of the tokens whose experts changed since the last look, by layer
    agreement: float | None = None  # of the causal depth rule and top-C on the held-out piece
    broken: tuple[str, ...] = ()  # invariants that only a look can see


@dataclass(frozen=True)
class Replay:
    """A step taken again from the restore point in memory, on trial."""

    step: int  # that was repeated
    loss: float  # as it was observed first
    again: float  # the same step once more
    same: bool  # to the bit: loss and gradient norm
    heldout: float  # of the weights before the step, on the probe's text
    exact: bool = True  # whether this machine gives the same bits for the same step
    ahead: int = 0  # batches that follow the step's without a gap and cost as much as it
    others: tuple[float, ...] = ()  # losses of the weights before the step on other batches of the training data
    before: float = math.nan  # loss of the restore point's weights on the batch of the step
    others_before: tuple[float, ...] = ()  # of these weights on the other batches


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
    heldout: float  # causal loss after the probe, in nats a token, of a part of the held-out text (`ENDPOINT`)
    comparable: bool  # as in `eval` events
    seconds: float  # counted, not measured: all its steps times the step time that the fork was given
    void: str = ""  # why there is nothing to compare: memory ran out. `heldout` is NaN then, and it is not held


Heard = tuple[Observation | None, Look | None]  # what a step showed: of the step before, and the look behind it


class Fork(Protocol):
    """A place that the run left on trial. Every arm begins there, and ends there."""

    def run(self, name: str, overlays: Sequence[Overlay], steps: int, probe: int, hold: bool = False) -> Outcome:
        """Goes `steps` with these overlays beside those in force, then the probe; leaves the run where it was.

        An overlay without an end holds in the probe too, whose decay begins at the rate that it leaves; without steps
        there is the probe alone. Its events go to `trials/<name>.jsonl`. `hold` keeps the state before the probe in
        memory, for `Controls.commit`; without it no step is evaluated or looked behind as the run's own are.
        Raises `UserError` for overlays out of bounds, or an arm longer than the rest of the run; `OutOfMemory` where
        one of several processes has too little memory, for the others wait for it: the attempt ends.
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

    @property
    def rest(self) -> int:
        """Steps that the run has left."""
        ...

    @property
    def step_seconds(self) -> float:
        """That the last step took."""
        ...

    def work(self, overlays: Sequence[Overlay]) -> float:
        """What a step costs with these beside those in force, over what it costs now: counted FLOPs."""
        ...

    def alters(self, overlays: Sequence[Overlay]) -> bool:
        """Whether the next step would be another with these."""
        ...

    def points(self) -> tuple[int, ...]:
        """The steps that `rollback` can go back to, ascending."""
        ...

    def replan(self, why: Decision) -> None:
        """Puts back what holds more than a step: the optimizer's constants, as configured, and a new loader.

        All else is asked of the plan in each step.
        """
        ...

    def overlay(self, why: Decision, key: str, value: Value, steps: int | None = None) -> Overlay:
        """Lays a value over the plan from the next step on, for so many steps or to the end.

        `data.skip` leaves out batches that are still to be read; an edit changes the state before the next step, and
        `decay` ends the run with so many steps of it: see `lumina.config.overlay`.
        """
        ...

    def lift(self, why: Decision, id: str) -> None:
        """Ends an overlay: from the next step on it has no effect."""
        ...

    def undo(self, why: Decision, *ids: str) -> None:
        """Goes back to before the first of these overlays and on without them: a new attempt, the run that never had
        them."""
        ...

    def rollback(self, why: Decision, step: int, data: Data = "replay", until: int = 0) -> None:
        """Goes back to the restore point of `step`, in memory or on disk, and on from there in a new attempt.

        `skip` quarantines the batches read since then, and those up to step `until` of the same phase; what lies over
        the plan stays in force.
        """
        ...

    def snapshot(self) -> int:
        """Makes this step a restore point in memory, in place of the older of two; returns its bytes."""
        ...

    def fork(self, step_seconds: float, worth: int = 0) -> AbstractContextManager[Fork]:
        """Leaves the run on trial, to return to this step; `step_seconds` is what a step counts.

        All its arms are evaluated on the same held-out text: as much as `ENDPOINT` of `worth` steps is worth. Another
        fork of equal `worth` has the same.
        """
        ...

    def commit(self, why: Decision, fork: Fork, outcome: Outcome) -> list[Heard]:
        """Goes on from the end of an arm that was held: its steps, without the probe, are the run's.

        Returns what they showed, in order.
        """
        ...

    def replay(self, before: int) -> Replay | None:
        """Takes the last observed step again from the newest restore point in memory before step `before`.

        None if there is none, or no memory for it. It leaves no trace.
        """
        ...

    def save(self) -> None:
        """Saves a checkpoint of this step."""
        ...

    def stop(self, why: Decision) -> None:
        """Saves and ends the attempt; `lumina resume` goes on with it."""
        ...
