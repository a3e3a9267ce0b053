"""Who else may watch a run: rules of the step from the literature, and reflexes to the same alarms as ours.

Each is given a session before its next step and changes what it likes. Those that act on alarms hear the orchestrator's
own detectors, so that the tables compare what is done about an alarm, not how it is heard; after each action they rest.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lumina.errors import UserError
from lumina.orchestrator.finding import Finding
from lumina.orchestrator.orchestrator import Orchestrator
from lumina.orchestrator.protocol import Controls, Data, Decision
from lumina.orchestrator.signals import Facts

if TYPE_CHECKING:
    from lumina.training.session import Session

Install = Callable[["Session", int], None]  # the second is the seed
React = Callable[["Reflex", Finding, Controls], None]

MODES = ("off", "advise", "act")  # of the orchestrator
CLIP = 0.1  # science of stability: the strongest that is in use; the plan clips at 1
ALPHA, Z, WARM = 0.97, 2.5, 25  # ZClip (2504.02507): decay of mean and variance, threshold, steps before it acts
WINDOW, FEWEST, SIGMAS = 128, 64, 6.0  # OLMo's skip-step: so many steps, at least, standard deviations
REST, MOST = 100, 6  # steps after an action, ways back


class Policy(NamedTuple):
    """`mode` is that of the orchestrator beneath it."""

    install: Install | None
    mode: str = "off"


def _before(session: Session) -> list[tuple[float, float]]:
    """Loss and gradient norm of the steps that the run has taken."""
    return [(event["loss"], event["grad_norm"]) for event in session.run.events() if event["t"] == "step"]


def fixed_clip(session: Session, seed: int) -> None:
    """Gradients are clipped at a tenth of what was planned."""
    course = session.course
    inner = course.planned
    course.planned = lambda number: inner(number) | {"clip": CLIP}  # type: ignore[method-assign, assignment]


def zclip(session: Session, seed: int) -> None:
    """ZClip: a gradient norm more than `Z` deviations above its moving mean is clipped to `Z`^2 / z above it."""
    optimizer = session.parts.optimizer
    inner, seen = optimizer.norms, [norm for _, norm in _before(session)]
    mean, variance = 0.0, 0.0

    def learn(norm: float) -> None:
        nonlocal mean, variance
        mean = ALPHA * mean + (1 - ALPHA) * norm
        variance = ALPHA * variance + (1 - ALPHA) * (norm - mean) ** 2

    def begin(norms: list[float]) -> None:
        nonlocal mean, variance
        mean = sum(norms) / len(norms)
        variance = sum((norm - mean) ** 2 for norm in norms) / len(norms)

    def clipping() -> Tensor:
        norms = inner()
        norm = float(norms[0])
        if len(seen) < WARM:
            seen.append(norm)
            if len(seen) == WARM:
                begin(seen)
            return norms
        sigma = variance**0.5
        z = (norm - mean) / (sigma + 1e-6)
        if z > Z:
            to = mean + Z**2 / z * sigma
            torch._foreach_mul_(optimizer.gradients(optimizer.groups.clipped), to / norm)
            norms, norm = norms * (to / norm), to
        if math.isfinite(norm):
            learn(norm)
        return norms

    if len(seen) >= WARM:
        begin(seen[:WARM])
        for norm in seen[WARM:]:
            learn(norm)
    optimizer.norms = clipping  # type: ignore[method-assign]


def skip_step(session: Session, seed: int) -> None:
    """OLMo's: a step whose loss or gradient norm is beyond 6 deviations of the last 128 moves nothing.

    What is not finite is no part of them, which in theirs makes it skip for as long.
    """
    optimizer, model = session.parts.optimizer, session.parts.model
    inner, norms, zero = optimizer.step, optimizer.norms, optimizer.zero_grad
    seen: deque[tuple[float, float]] = deque(_before(session), WINDOW - 1)
    nats, found = list[Tensor](), dict[str, float]()

    def hook(module: Any, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            nats.append(torch.stack([output[0].nats.detach(), output[0].tokens.detach()]))

    def emptied() -> None:
        nats.clear()
        zero()

    def measured() -> Tensor:
        out = norms()
        found["norm"] = float(out[0])
        return out

    def stepping(lr: float, skip: Tensor) -> None:
        loss = torch.stack(nats).sum(0) if nats else torch.ones(2)
        now = float(loss[0] / loss[1]), found.get("norm", 0.0)
        strange = len(seen) + 1 >= FEWEST and any(map(_beyond, zip(*seen, strict=True), now))
        if all(map(math.isfinite, now)):
            seen.append(now)  # also of a step that moves nothing, as there
        inner(lr, torch.ones_like(skip) if strange else skip)

    model.register_forward_hook(hook)
    optimizer.zero_grad, optimizer.norms, optimizer.step = emptied, measured, stepping  # type: ignore[method-assign]


def _beyond(before: tuple[float, ...], now: float) -> bool:
    known = torch.tensor(before, dtype=torch.float64)
    return bool(now > known.mean() + SIGMAS * known.std())


class Reflex(Orchestrator):
    """Hears what the orchestrator hears, and does one thing about it."""

    def __init__(self, session: Session, react: React, seed: int) -> None:
        super().__init__("act", Facts.of(session.config), session._emit)
        self.react, self.seed, self.backs = react, seed, 0
        self.rests = {False: 0, True: 0}  # up to which step, after soft findings and hard ones: these wait for no spike

    def _handle(self, finding: Finding, controls: Controls) -> bool:
        if finding.step < self.rests[finding.hard]:
            return False
        self.rests[finding.hard] = finding.step + REST
        try:
            self.react(self, finding, controls)
        except UserError as error:  # it cannot be done here
            self.emit("incident", step=finding.step, kind="refused", error=error.message)
        return True

    def draw(self, finding: Finding) -> random.Random:
        """The same again for the same finding."""
        return random.Random(f"{self.seed} {finding.step}")

    def go_back(self, finding: Finding, controls: Controls, data: Data) -> None:
        """To before it, at most `MOST` times."""
        points = [step for step in controls.points() if step < finding.before]
        if points and self.backs < MOST:
            self.backs += 1
            controls.rollback(_why(finding, f"rewind_{data}"), max(points), data)


def _reflex(react: React) -> Policy:
    def install(session: Session, seed: int) -> None:
        session.oversight.orchestrator = Reflex(session, react, seed)

    return Policy(install, "act")


def _why(finding: Finding, action: str) -> Decision:
    return Decision(finding.rule, action, {"step": finding.step}, finding.text)


def _lay(finding: Finding, controls: Controls, key: str, value: float) -> None:
    controls.overlay(_why(finding, f"{key}={value:g}"), key, value)


def halve(reflex: Reflex, finding: Finding, controls: Controls) -> None:
    """Half the learning rate, each time."""
    _lay(finding, controls, "lr.scale", 0.5)


def rewind(reflex: Reflex, finding: Finding, controls: Controls) -> None:
    """Back to before it, and past the batches since (PaLM)."""
    reflex.go_back(finding, controls, "skip")


def at_random(reflex: Reflex, finding: Finding, controls: Controls) -> None:
    """One of what could be done."""
    ways: list[Callable[[], None]] = [
        lambda: None,
        lambda: _lay(finding, controls, "lr.scale", 0.5),
        lambda: _lay(finding, controls, "lr.scale", 2.0),
        lambda: _lay(finding, controls, "clip", CLIP),
        lambda: _lay(finding, controls, "weight_decay", 0.0),
        lambda: _lay(finding, controls, "optimizer.reset", 1),
        lambda: reflex.go_back(finding, controls, "replay"),
        lambda: reflex.go_back(finding, controls, "skip"),
    ]
    reflex.draw(finding).choice(ways)()


POLICIES = {
    "fixed clip": Policy(fixed_clip),
    "zclip": Policy(zclip),
    "skip-step": Policy(skip_step),
    "halve": _reflex(halve),
    "rewind": _reflex(rewind),
    "random": _reflex(at_random),
}
FIXED = ("off", *(name for name in POLICIES if name != "random"))  # of which the best is known in hindsight
