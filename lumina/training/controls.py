"""The door to a run in training: `orchestrator.protocol.Controls`, done to a session between two steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lumina.config.overlay import DECAY, KEYS, SKIP, Overlay, Value, acting, added, lifted, pack, require_kind, skipped
from lumina.config.overlay import edits as edits_of
from lumina.errors import UserError
from lumina.model.cost import count
from lumina.orchestrator.protocol import Controls, Data, Decision, Fork, Heard, Outcome, Replay
from lumina.training import edits
from lumina.training.arms import Arms
from lumina.training.replay import replay

if TYPE_CHECKING:
    from lumina.training.session import Session

# What rests while only adapters are trained; their weights must stay those of the model that they adapt.
RESTING = ("bias_rate", "predictor", "qk_clip", "router.reset", "expert.reseed")


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

    @property
    def rest(self) -> int:
        return self.course.steps - self.step

    @property
    def step_seconds(self) -> float:
        return self.state.progress.step_seconds

    def work(self, overlays: Sequence[Overlay]) -> float:
        model, rank, step = self.course.config.model, self.course.config.train.lora.rank, self.step + 1
        planned = self.course.planned(step)

        def flops(laid: Sequence[Overlay]) -> float:
            return count(model, capacity=acting(laid, step, planned)["mod_capacity"], rank=rank).flops_per_token

        return flops((*self.overlays, *overlays)) / flops(self.overlays)

    def alters(self, overlays: Sequence[Overlay]) -> bool:
        step, last = self.step + 1, self.course.steps
        if edits_of(overlays, step) or any(one.key in (SKIP, DECAY) for one in overlays):
            return True
        laid = (*self.overlays, *overlays)
        planned = [(at, self.course.planned(at)) for at in (step, last)]
        return any(acting(laid, at, plan) != acting(self.overlays, at, plan) for at, plan in planned)

    # -- what lies over the plan -----------------------------------------------------------------------------------

    def overlay(self, why: Decision, key: str, value: Value, steps: int | None = None) -> Overlay:
        begin = self.step + 1
        end = None if steps is None else self.step + steps
        if end is None and key in KEYS and KEYS[key].once:
            end = begin
        new = Overlay(f"{key}={value}@{begin}".replace(" ", ""), key, value, begin, end)
        overlays = added(self.overlays, new)
        self._require_effect(new)
        self.session.secure()
        self._lay(why, overlays, overlay=new.id)
        return new

    def lift(self, why: Decision, id: str) -> None:
        self._lay(why, lifted(self.overlays, id, self.step), overlay=id)

    def undo(self, why: Decision, *ids: str) -> None:
        there = [one.id for one in self.overlays]
        if missing := [id for id in ids if id not in there]:
            raise UserError(f"{missing[0]}: no such overlay", fix=f"there are: {', '.join(there) or 'none'}")
        rest = tuple(one for one in self.overlays if one.id not in ids)
        begin = min(one.begin for one in self.overlays if one.id in ids)
        if begin > self.step:  # nothing was done with them yet
            self._lay(why, rest, overlay=", ".join(ids))
        else:
            self.session.ways.rollback(self.session.ways.before(begin), overlays=rest, why=why)

    def _lay(self, why: Decision, overlays: tuple[Overlay, ...], ahead: int = 1, **what: Any) -> None:
        """Tells what is going to be in force, then it is; `ahead`: so many steps are taken with it at once."""
        ends = self.course.ends(overlays)
        self.session.record("decision", step=self.step, **why.fields(), overlays=pack(overlays), ends=ends, **what)
        self.state.overlays = overlays
        self.session.keep_ways_back(ahead)

    def _require_effect(self, new: Overlay) -> None:
        """Raises `UserError` for what this run has nothing of, and for what is not to come any more."""
        config, rest = self.course.config, self.rest
        require_kind(new.key, config.model.kind)
        if rest < 1:
            raise UserError(f"{new.key}: the run has no step left", fix="go back first, or undo what ended it")
        if self.course.parts.plan.frozen and new.key in RESTING:
            raise UserError(f"{new.key}: adapters alone are trained, what it acts on rests", fix="leave it out")
        if new.key == SKIP:
            self._require_to_come(new)
        elif new.key == DECAY:
            self._require_decay(new, rest)
        elif new.key == "micro_batch":
            self._require_micro_batch(new)
        elif new.key in KEYS and KEYS[new.key].pair:
            edits.require_expert(self.course.parts.model, new)

    def _require_to_come(self, new: Overlay) -> None:
        assert isinstance(new.value, list)
        loader, before = self.course.parts.loader, skipped(self.overlays)
        next_, last = loader.planned(self.step, before), loader.planned(loader.phase_end(self.step) - 1, before)
        if not next_ <= new.value[0] <= last:
            wrong = f"{SKIP}={new.value}: batch {new.value[0]} is not one that is still to come in this phase"
            raise UserError(wrong, fix=f"to come are {next_} to {last}; for those before, go back")

    def _require_decay(self, new: Overlay, rest: int) -> None:
        """It makes the run one that was planned shorter, which of a cosine it cannot."""
        assert not isinstance(new.value, list)
        if self.course.config.train.schedule != "wsd":
            raise UserError(f"{DECAY}: a cosine decays all along", fix="stop the run, or scale its rate: lr.scale=0.5")
        phase = next(phase for phase in reversed(self.course.phases) if new.begin > phase.begin)
        if not phase.begin + phase.warmup < new.begin <= phase.end - phase.decay:
            first, last = phase.begin + phase.warmup, phase.end - phase.decay - 1
            raise UserError(
                f"{DECAY}: not between warm-up and the planned decay",
                fix=f"ask for it after one of steps {first} to {last}" if first <= last else "let the run end",
            )
        if new.value > rest:
            raise UserError(f"{DECAY}={new.value}: the run has {rest} steps left", fix="give it so many at most")

    def _require_micro_batch(self, new: Overlay) -> None:
        assert not isinstance(new.value, list)
        sequences, fitting = self.course.fitting.sequences, self.course.fitting
        most = sequences if self.course.parts.world.size == 1 else fitting.micro_batch
        if sequences % int(new.value) or new.value > most:
            sizes = [str(size) for size in range(1, most + 1) if sequences % size == 0]
            wrong = f"micro_batch={new.value}: each process computes {sequences} sequences a step"
            raise UserError(wrong, fix=f"pieces may be of {', '.join(sizes)}")

    # -- going back, trying ------------------------------------------------------------------------------------------

    def points(self) -> tuple[int, ...]:
        return self.session.ways.known()

    def rollback(self, why: Decision, step: int, data: Data = "replay", until: int = 0) -> None:
        last = max(self.step, min(until, self.course.parts.loader.phase_end(self.step - 1)))
        self.session.ways.rollback(step, (step + 1, last) if data == "skip" else None, why=why)

    def snapshot(self) -> int:
        return self.session.ways.take_point().bytes

    @contextmanager
    def fork(self, step_seconds: float, worth: int = 0) -> Iterator[Arms]:
        folder = self.session.run.path / "trials"
        with Arms(self.course, folder, step_seconds, worth, self.session.heed, self._require_effect) as arms:
            yield arms

    def commit(self, why: Decision, fork: Fork, outcome: Outcome) -> list[Heard]:
        assert isinstance(fork, Arms)
        overlays = fork.require_held(outcome)
        self.session.secure(again=True)  # what is on the disk of this step may not know of the trial
        self._lay(why, overlays, ahead=outcome.steps, arm=outcome.name)
        heard = fork.keep(outcome)
        for seen, _ in heard:
            self.session.oversight.seen = seen or self.session.oversight.seen
        return heard

    def replay(self, before: int) -> Replay | None:
        return replay(self.session, before)

    # -- saving, stopping --------------------------------------------------------------------------------------------

    def save(self) -> None:
        self.session._save()

    def replan(self, why: Decision) -> None:
        self.session.record("decision", step=self.step, **why.fields())
        self.course.parts.optimizer.replan(self.course.config.train)
        self.course.parts.reseat()

    def stop(self, why: Decision) -> None:
        self.session.record("decision", step=self.step, **why.fields())
        self.session.ending = why.rule
