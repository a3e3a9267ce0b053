"""The door to a run in training: `orchestrator.protocol.Controls`, done to a session between two steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lumina.config.overlay import SKIP, Overlay, Value, added, lifted, pack, skipped
from lumina.errors import UserError
from lumina.orchestrator.protocol import Controls, Data, Decision, Fork, Outcome, Replay
from lumina.training.arms import Arms
from lumina.training.replay import replay
from lumina.training.session import Session


class SessionControls(Controls):
    """`Controls` of this session; see there for what each does."""

    def __init__(self, session: Session) -> None:
        self.session, self.course, self.state = session, session.course, session.state

    @property
    def step(self) -> int:
        return self.state.progress.step

    @property
    def overlays(self) -> tuple[Overlay, ...]:
        return self.state.overlays

    # -- what lies over the plan -----------------------------------------------------------------------------------

    def overlay(self, why: Decision, key: str, value: Value, steps: int | None = None) -> Overlay:
        begin = self.step + 1
        new = Overlay(f"{key}={value}@{begin}", key, value, begin, None if steps is None else self.step + steps)
        overlays = added(self.overlays, new)
        self._require_effect(new)
        self.session.secure()
        self._lay(why, overlays, overlay=new.id)
        return new

    def lift(self, why: Decision, id: str) -> None:
        self._lay(why, lifted(self.overlays, id, self.step), overlay=id)

    def undo(self, why: Decision, id: str) -> None:
        rest = tuple(one for one in self.overlays if one.id != id)
        if rest == self.overlays:
            there = ", ".join(one.id for one in self.overlays) or "none"
            raise UserError(f"{id}: no such overlay", fix=f"there are: {there}")
        begin = next(one.begin for one in self.overlays if one.id == id)
        if begin > self.step:  # nothing was done with it yet
            self._lay(why, rest, overlay=id)
        else:
            self.session.rollback(self.session.way_back(begin), overlays=rest, why=why)

    def _lay(self, why: Decision, overlays: tuple[Overlay, ...], ahead: int = 1, **what: Any) -> None:
        """Tells what is going to be in force, then it is; `ahead`: so many steps are taken with it at once."""
        self.session.record("decision", step=self.step, **why.fields(), overlays=pack(overlays), **what)
        self.state.overlays = overlays
        self.session.keep_ways_back(ahead)

    def _require_effect(self, new: Overlay) -> None:
        """Raises `UserError` for what this run has nothing of, and for batches that it has read or never will."""
        loader, model = self.course.parts.loader, self.course.parts.model
        if new.key == "bias_rate" and not model.moes:
            raise UserError(f"{new.key}: a {self.course.config.model.kind} model has no experts", fix="leave it out")
        if new.key == SKIP:
            assert isinstance(new.value, list)
            before = skipped(self.overlays)
            next_, last = loader.planned(self.step, before), loader.planned(loader.phase_end(self.step) - 1, before)
            if not next_ <= new.value[0] <= last:
                wrong = f"{SKIP}={new.value}: batch {new.value[0]} is not one that is still to come in this phase"
                raise UserError(wrong, fix=f"to come are {next_} to {last}; for those before, go back")

    # -- going back, trying ------------------------------------------------------------------------------------------

    def points(self) -> tuple[int, ...]:
        return self.session.restore_points()

    def rollback(self, why: Decision, step: int, data: Data = "replay") -> None:
        self.session.rollback(step, (step + 1, self.step) if data == "skip" else None, why=why)

    def snapshot(self) -> int:
        return self.session.take_point().bytes

    @contextmanager
    def fork(self, step_seconds: float) -> Iterator[Arms]:
        with Arms(self.course, self.session.run.path / "trials", step_seconds, self.session.heed) as arms:
            yield arms

    def commit(self, why: Decision, fork: Fork, outcome: Outcome) -> None:
        assert isinstance(fork, Arms)
        overlays = fork.require_held(outcome)
        self.session.secure()
        self._lay(why, overlays, ahead=outcome.steps, arm=outcome.name)
        fork.keep(outcome)

    def replay(self) -> Replay | None:
        return replay(self.session)

    # -- saving, stopping --------------------------------------------------------------------------------------------

    def save(self) -> None:
        self.session._save()

    def replan(self, why: Decision) -> None:
        self.session.record("decision", step=self.step, **why.fields())
        self.course.parts.optimizer.replan(self.course.config.train)

    def stop(self, why: Decision) -> None:
        self.session.record("decision", step=self.step, **why.fields())
        self.session.ending = why.rule
