"""The way of a run, one step after another; the run takes it, and so does an arm that leaves it on trial.

    batch index -> loader -> train_step -> (one step later) observe -> maybe evaluate -> maybe probe

Metrics are observed at a fixed lag of one step, so that no step waits for the host; the metrics not yet observed are
part of the state. Whatever a step does is told through `emit`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lumina.checkpoint import snapshot
from lumina.checkpoint.snapshot import Snapshot
from lumina.config import overlay
from lumina.config.overlay import RECOMPUTE, SKIP, Overlay, acting, skipped
from lumina.config.resolve import Resolved
from lumina.data.loader import Batch
from lumina.orchestrator.protocol import Look, Observation
from lumina.progress import Tell
from lumina.run.folder import Run
from lumina.training import edits, failing
from lumina.training.evaluate import Evaluation
from lumina.training.invariants import Invariants
from lumina.training.observer import Emit, Observer
from lumina.training.oom import Fitting, free
from lumina.training.probe import TOKENS as PROBE_TOKENS
from lumina.training.probe import Probe
from lumina.training.schedule import Part, depth_capacity, rate, shortened
from lumina.training.setup import Parts
from lumina.training.state import Lagged, State
from lumina.training.step import Step

COMPILED = ("micro_batch", "recompute", "temperature", "balance", "capacity_factor", "expert_dropout")
SHAPES = (*COMPILED, "mod_capacity")  # another one may take a compiler or an allocator its time


class Course:
    """Steps through a run: what it trains with, where it stands, and who is told."""

    def __init__(
        self,
        run: Run,
        resolved: Resolved,
        parts: Parts,
        peak: float,
        emit: Emit,
        told: Tell,
        beat: Callable[[bool], None],
    ) -> None:
        """`beat` hears of each step that begins, and whether its shapes are new."""
        self.parts, self.config, self.emit, self.told, self.beat = parts, parts.config, emit, told, beat
        self.first = "the first step"
        looked_at = parts.heldout(parts.main_kind, PROBE_TOKENS)[0]
        self.probe = Probe(parts.model, looked_at, parts.precision)
        self.invariants = None if parts.config.orchestrator.mode == "off" else Invariants(parts)
        self.looks = parts.config.orchestrator.probe_every > 0
        self.seen: Observation | None = None  # the newest of this attempt
        self.looked: Look | None = None  # likewise
        self.state = State(parts.model, parts.optimizer, self.probe)
        self.observer = Observer(parts, peak, self._tell, self)
        self.fitting = Fitting(run, resolved, parts, self.state, told, emit)
        self.last_eval: tuple[int, Evaluation] | None = None
        self.last = 0.0  # when the last step ended, less what since was not training

    def begin(self) -> None:
        """Finds out whether the next step fits into the memory; training time counts from then on."""
        self.fitting.tell_retry()
        step = self.state.progress.step + 1
        if step <= self.steps:
            values = self.values(step)
            self._prepare(values)
            self.fitting.rehearse(self._batch(step, values), step, self.plan(values))
        self.last = time.perf_counter()
        self.told(self.first, 0, 1)

    def advance(self) -> None:
        """The next step, then what is due after it."""
        self.step()
        step = self.state.progress.step
        if step == self.steps:
            return
        if (every := self.config.train.eval_every) and step % every == 0:
            self.evaluate()
        if self.looks and step % self.config.orchestrator.probe_every == 0:
            self._check(self.look)

    def step(self) -> None:
        """The next step alone."""
        parts, step = self.parts, self.state.progress.step + 1
        values, before = self.values(step), self.values(max(1, step - 1))
        self.beat(any(values[name] != before[name] for name in SHAPES))
        self._tell_phase(step)
        self._prepare(values, before)
        self._edit(step)
        progress = self.state.progress  # after an edit that failed it is another
        batch = self._batch(step, values)
        metrics = self.fitting.step(batch, values["lr"], self.plan(values), step)
        self.observe()
        values, past = self.values(step), skipped(self.state.overlays)
        if invariants := self.invariants:
            self._check(lambda: invariants.after_step(progress, step, values, batch, past))
        if not self.invariants:
            progress.batch = parts.loader.planned(step - 1, past)
        now = time.perf_counter()
        progress.step_seconds, self.last = now - self.last, now
        progress.step, progress.tokens = step, progress.tokens + self.config.train.batch_tokens
        progress.wall += progress.step_seconds
        self.state.pending = Lagged(metrics)

    def _edit(self, step: int) -> None:
        """Makes the edits that come before this step; what the step before did is told first, as it was.

        One that fails is taken back and off the plan: the run trains on as if nobody had asked for it. On trial it
        ends the trial.
        """
        point: Snapshot | None = None
        for edit in overlay.edits(self.state.overlays, step):
            self.observe()
            point, error = None if self.fitting.trying else self.take(into=point), None
            try:
                edits.make(edit, self.parts, self.probe)
            except Exception as failed:
                if self.fitting.trying or failing.ends(failed, self.config):
                    raise
                error = failed
            if point and self.parts.world.max(error is not None):
                self._take_back(edit, point, failing.said(error))
            elif edit.key == "optimizer.reset":  # its count of steps is then of those that are still to come
                self.state.progress.skipped = self.state.progress.step

    def _take_back(self, edit: Overlay, point: Snapshot, error: str) -> None:
        """Stands where it stood before the edit, which the log then has no more: a resume does not make it again."""
        self.return_to(point)
        self.state.overlays = tuple(one for one in self.state.overlays if one is not edit)
        self._prepare(self.values(self.state.progress.step + 1))
        laid = {"overlays": overlay.pack(self.state.overlays), "ends": self.steps}
        self.emit("incident", step=self.state.progress.step, kind="act refused", asked=edit.id, error=error, **laid)

    def _batch(self, step: int, values: dict[str, float]) -> Batch:
        return self.parts.loader.batch(step - 1, skipped(self.state.overlays), int(values["data.order"]))

    @property
    def phases(self) -> list[Part]:
        """As planned, or shortened by a decay that was started."""
        return self._phases(self.state.overlays)

    @property
    def steps(self) -> int:
        """With which the run ends."""
        return self.phases[-1].end

    def ends(self, overlays: Sequence[Overlay]) -> int:
        """With which step it would end under these."""
        return self._phases(overlays)[-1].end

    def _phases(self, overlays: Sequence[Overlay]) -> list[Part]:
        started = overlay.shortened(overlays)
        return shortened(self.parts.phases, *started) if started else self.parts.phases

    def values(self, step: int) -> dict[str, float]:
        """The numbers of a step, counted from 1: as planned, and what overlays make of them."""
        return acting(self.state.overlays, step, self.planned(step))

    def planned(self, step: int) -> dict[str, float]:
        """The numbers of a step by the plan alone, whose phases a decay that was started shortens."""
        config, plan, phases = self.config, self.parts.plan, self.phases
        moe, mod = config.model.moe, config.model.mod
        return {
            "lr": rate(phases, config.train.schedule, step),
            "clip": plan.clip,
            "weight_decay": config.train.weight_decay,
            "z_loss": plan.z_loss,
            "skip": 0,
            "bias_rate": 0.0 if step > phases[-1].end - phases[-1].decay else plan.bias_rate,
            "balance": moe.balance if moe else 0.0,
            "temperature": moe.temperature if moe else 1.0,
            "capacity_factor": moe.capacity if moe else 0.0,
            "expert_dropout": moe.dropout if moe else 0.0,
            "mod_capacity": depth_capacity(mod, step, self.parts.steps) if mod else 1.0,
            "predictor": 1.0,
            "micro_batch": self.fitting.micro_batch,
            "recompute": RECOMPUTE.index(config.train.recompute),
            "data.order": 0,
        }

    def plan(self, values: dict[str, float]) -> Step:
        """The constants of a step with these numbers."""
        return replace(
            self.parts.plan,
            clip=values["clip"],
            z_loss=values["z_loss"],
            bias_rate=values["bias_rate"],
            micro_batches=self.fitting.sequences // int(values["micro_batch"]),
            skip=bool(values["skip"]),
        )

    def _prepare(self, values: dict[str, float], before: dict[str, float] | None = None) -> None:
        """Model and optimizer are set to the numbers of a step; `before` are those of the one before it."""
        model, optimizer = self.parts.model, self.parts.optimizer
        optimizer.weight_decay, optimizer.predictor_rate = values["weight_decay"], values["predictor"]
        for depth_router in model.routers:
            depth_router.capacity = values["mod_capacity"]
        for router in (moe.router for moe in model.moes):
            router.temperature, router.balance = values["temperature"], values["balance"]
            router.capacity, router.dropout = values["capacity_factor"], values["expert_dropout"]
        for block in model.units:
            block.recompute = RECOMPUTE[int(values["recompute"])]
        if before and self.config.train.compile == "on" and any(values[name] != before[name] for name in COMPILED):
            torch.compiler.reset()  # what was compiled in must not count towards the limit of graphs

    def changed(self, step: int) -> str:
        """What the plan, or what lies over it, changed with a step."""
        phase = any(step == phase.begin + 1 for phase in self.phases[1:])
        found = [*(["phase"] if phase else [])]
        if step > 1 and self.values(step)["mod_capacity"] != self.values(step - 1)["mod_capacity"]:
            found.append("capacity")
        own = (one for one in self.state.overlays if one.key not in (SKIP, "skip"))  # the data is of the same kind
        found += [one.id for one in own if step in (one.begin, 1 + (one.end or step))]
        return ", ".join(found)

    def take(self, into: Snapshot | None = None) -> Snapshot:
        """Where the run stands, as a restore point in memory; overlays are no part of it. `into` is used again."""
        state = {"progress": self.state.progress, "pending": self.state.pending, "last_eval": self.last_eval}
        return snapshot.take(self.state.tensors(), state, into=into)

    def return_to(self, point: Snapshot) -> None:
        """Stands where `take` was called, to the bit."""
        fits = self.state.progress.eval_tokens  # what memory does not hold, it does not hold after the way back either
        state = snapshot.restore(point, self.state.tensors())
        self.state.progress, self.state.pending = state["progress"], state["pending"]
        self.state.progress.eval_tokens = min(fits, self.state.progress.eval_tokens)
        self.last_eval = state["last_eval"]
        self._prepare(self.values(max(1, self.state.progress.step)))

    def _tell_phase(self, step: int) -> None:
        """A change that was planned: so says an event, for whoever would take it for a fault."""
        for number, phase in enumerate(self.parts.phases):
            if len(self.parts.phases) > 1 and step == phase.begin + 1:
                told = {"data": phase.data, "lr": phase.lr, "warmup": phase.warmup, "decay": phase.decay}
                steps = phase.end - phase.begin
                self.emit("phase", step=step, phase=number + 1, of=len(self.parts.phases), steps=steps, **told)

    def observe(self) -> Observation | None:
        """Tells what the previous step did, unless it was told."""
        values = self.state.pending.read() if self.state.pending else self.state.progress.pending
        self.state.progress.pending = None
        self.state.pending = None
        if values is None:
            return None
        if self.first:
            self.told(self.first, 1, 1)
            self.first = ""
        self.seen = self.observer(self.state.progress, values)
        return self.seen

    def evaluate(self) -> Evaluation:
        """Evaluates all held-out tokens of each kind with the causal routing; its time is not training time.

        Returns that of the main kind.
        """
        parts, begin, mod = self.parts, time.perf_counter(), self.config.model.mod
        for kind in parts.kinds:
            start = time.perf_counter()
            result = self.fitting.evaluate(kind, mod.capacity if mod else None)
            if mod and self.values(max(1, self.state.progress.step))["mod_capacity"] != mod.capacity:
                result = replace(result, comparable=False)  # it computes another share than it will
            self.emit(
                "eval",
                step=self.state.progress.step,
                tokens=self.state.progress.tokens,
                split="heldout" if kind == parts.main_kind else f"heldout {kind}",
                data=kind,
                routing="causal",
                seconds=round(time.perf_counter() - start, 3),
                **result.fields(),
            )
            if kind == parts.main_kind:
                self.last_eval = self.state.progress.step, result
        self.last += time.perf_counter() - begin
        assert self.last_eval is not None
        return self.last_eval[1]

    def look(self) -> Look:
        """Tells what the probe sees; its time is not training time."""
        start, step = time.perf_counter(), self.state.progress.step
        golden = self.parts.loader.batch(0)
        seen = self.probe(golden)
        broken = self._broken(golden)
        seconds = time.perf_counter() - start
        self.looked = seen.look(step, broken)
        told = {"broken": list(broken)} if broken else {}
        self.emit("probe", step=step, seconds=round(seconds, 3), **seen.fields(), **told)
        self.last += seconds
        return self.looked

    def _check(self, check: Callable[[], object]) -> None:
        """A check that fails, for want of memory or by a fault of its own, is told and is the attempt's last: training
        goes on. Of several processes the others would wait in it, so there it ends the attempt; in a trial or a replay
        it is for the orchestrator, of which these are, to end.
        """
        try:
            check()
        except Exception as error:
            if self.parts.world.size > 1 or self.fitting.trying or failing.ends(error, self.config):
                raise
            self.invariants, self.looks, self.state.progress.broken = None, False, []
            said = failing.said(error)
        else:
            return
        free()  # not before the error is gone, which holds on to what it was computing
        self.emit("incident", step=self.state.progress.step, kind="checks failed", error=said)

    def _broken(self, golden: Batch) -> tuple[str, ...]:
        """Invariants that only a look can see."""
        if not self.invariants:
            return ()
        since = self.state.progress.step - (self.config.orchestrator.probe_every or 0)
        held = [one for one in self.state.overlays if one.begin <= self.state.progress.step]
        asked = frozenset(one.key for one in held if one.end is None or one.end > since)
        return self.invariants.at_look(self.state.progress, golden, asked)

    def _tell(self, type: str, /, **fields: Any) -> None:
        self.emit(type, **fields)
