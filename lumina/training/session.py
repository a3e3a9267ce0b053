"""A session: one attempt of a run, from where it stands to its last step or to a request to stop.

    batch index -> loader -> train_step -> (one step later) observe -> maybe evaluate -> maybe save

Metrics are observed at a fixed lag of one step, so that no step waits for the host; the metrics not yet observed
are part of the checkpoint. Everything a reader wants goes through one `EventWriter`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from signal import Signals
from typing import Any

from lumina.config.change import RESUME
from lumina.config.resolve import Resolved
from lumina.events import EventWriter
from lumina.progress import Tell, silent
from lumina.run.folder import Run
from lumina.run.signals import StopRequest
from lumina.training import machine, setup
from lumina.training.evaluate import Evaluation
from lumina.training.observer import Observer
from lumina.training.oom import Fitting
from lumina.training.probe import TOKENS as PROBE_TOKENS
from lumina.training.probe import Probe
from lumina.training.saving import Saver
from lumina.training.schedule import depth_capacity, rate
from lumina.training.state import Lagged, State

Listener = Callable[[dict[str, Any]], None]


class Session:
    """One attempt of a run: restores, steps to the end or to a stop request, and leaves everything saved."""

    def __init__(
        self,
        run: Run,
        resolved: Resolved,
        parts: setup.Parts,
        rate: float,
        listeners: Sequence[Listener],
        told: Tell,
        changed: dict[str, list[Any]] | None = None,
    ) -> None:
        self.run, self.config, self.parts, self.listeners = run, parts.config, parts, listeners
        self.world, self.told = parts.world, told if parts.world.main else silent
        self.first = "the first step"
        self.source, self.changed = resolved.source, changed or {}
        self.choices = {
            key: origin.removeprefix("resolved: ")
            for key, origin in resolved.origins.items()
            if origin.startswith("resolved: ")
        }
        self.peak = rate * self.world.size  # FLOP/s of square matmuls, of all processes: what MFU is measured against
        looked_at = parts.heldout(parts.main_kind, PROBE_TOKENS)[0]
        self.probe = Probe(parts.model, looked_at, parts.precision)
        self.state = State(parts.model, parts.optimizer, self.probe)
        self.saver = Saver(run, parts, self.state, self.told, recast=resolved.origins["precision.mode"] == RESUME)
        self.fitting = Fitting(run, resolved, parts, self.state, self.told, self._emit)
        self.observer = Observer(parts, self.peak, self._emit)
        self.freeze_from = parts.steps - parts.phases[-1].decay
        self.last_eval: tuple[int, Evaluation] | None = None

    def train(self) -> None:
        """Runs the attempt. A first SIGINT or SIGTERM saves and raises `Stopped`."""
        attempt = self.world.decide(self.run.next_attempt)
        skipped = self.saver.restore() if attempt else []
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            if self.world.main:
                self.events = stack.enter_context(EventWriter(self.run.event_log, attempt, self.listeners))
            self._announce(skipped, attempt)
            self.fitting.tell_retry()
            self._rehearse()
            self.last = time.perf_counter()
            self.told(self.first, 0, 1)
            while self.state.progress.step < self.parts.steps:
                self._step()
                if signal := self.world.max(stop.requested):
                    self._stop(Signals(signal).name)
            self._finish()

    # -- one step -----------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """The next step, then what is due after it."""
        parts, progress, train = self.parts, self.state.progress, self.config.train
        step = progress.step + 1
        self._tell_phase(step)
        self._set_depth(step)
        metrics = self.fitting.step(
            parts.loader.batch(step - 1),
            rate(parts.phases, train.schedule, step),
            parts.plan,
            freeze_bias=step > self.freeze_from,
            step=step,
        )
        self._observe()
        now = time.perf_counter()
        progress.step_seconds, self.last = now - self.last, now
        progress.step, progress.tokens = step, progress.tokens + train.batch_tokens
        progress.wall += progress.step_seconds
        self.state.pending = Lagged(metrics)
        if step == parts.steps:
            return
        if train.eval_every and step % train.eval_every == 0:
            self._evaluate()
        if (every := self.config.orchestrator.probe_every) and step % every == 0:
            self._look()
        if self.config.checkpoint.every and step % self.config.checkpoint.every == 0:
            self._save()

    def _rehearse(self) -> None:
        """Whether the next step fits into the memory, and those after it."""
        step = self.state.progress.step + 1
        if step <= self.parts.steps:
            self._set_depth(step)
            self.fitting.rehearse(self.parts.loader.batch(step - 1), step)

    def _set_depth(self, step: int) -> None:
        for router in self.parts.model.routers:
            router.capacity = self._capacity(step)

    def _tell_phase(self, step: int) -> None:
        """A change that was planned: so says an event, for whoever would take it for a fault."""
        for number, phase in enumerate(self.parts.phases):
            if len(self.parts.phases) > 1 and step == phase.begin + 1:
                told = {"data": phase.data, "lr": phase.lr, "warmup": phase.warmup, "decay": phase.decay}
                steps = phase.end - phase.begin
                self._emit("phase", step=step, phase=number + 1, of=len(self.parts.phases), steps=steps, **told)

    def _capacity(self, step: int) -> float:
        """What depth routers take of a sequence in this step."""
        mod = self.config.model.mod
        return depth_capacity(mod, step, self.parts.steps) if mod else 1.0

    def _observe(self) -> None:
        """Tells what the previous step did."""
        values = self.state.pending.read() if self.state.pending else self.state.progress.pending
        self.state.progress.pending = None
        if values is None:
            return
        if self.first:
            self.told(self.first, 1, 1)
            self.first = ""
        self.observer(self.state.progress, values)

    def _evaluate(self) -> None:
        """Evaluates all held-out tokens of each kind with the causal routing; its time is not training time."""
        parts, begin, mod = self.parts, time.perf_counter(), self.config.model.mod
        for kind in parts.kinds:
            start = time.perf_counter()
            result = self.fitting.evaluate(kind, mod.capacity if mod else None)
            if mod and self._capacity(self.state.progress.step) != mod.capacity:
                result = replace(result, comparable=False)  # it still computes more than it will
            self._emit(
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

    def _look(self) -> None:
        """Tells what the probe sees; its time is not training time."""
        start = time.perf_counter()
        seen = self.probe()
        seconds = time.perf_counter() - start
        self._emit("probe", step=self.state.progress.step, seconds=round(seconds, 3), **seen)
        self.last += seconds

    # -- saving, stopping ----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Saves this step, if that is not done; its time is not training time."""
        if self.saver.saved_step == self.state.progress.step:
            return
        start = time.perf_counter()
        receipt = self.saver.save(self.last_eval)
        self._emit("checkpoint", step=receipt.step, seconds=round(receipt.seconds, 3), bytes=receipt.bytes)
        self.last += time.perf_counter() - start

    def _stop(self, signal: str) -> None:
        """Saves where we are, then says how to go on."""
        self._save()
        self._observe()
        self._emit("end", step=self.state.progress.step, reason="stopped", signal=signal)
        raise Stopped(self.run, self.state.progress.step, signal)

    def _finish(self) -> None:
        """The last observation, evaluation and checkpoint."""
        self._evaluate()
        self._save()
        self._observe()
        self._emit("end", step=self.state.progress.step, reason="done")

    def _emit(self, type: str, /, **fields: Any) -> None:
        """Events are the main process's to write."""
        if self.world.main:
            self.events.emit(type, **fields)

    def _announce(self, skipped: Sequence[tuple[Path, str]], attempt: int) -> None:
        self._emit(
            "run",
            step=self.state.progress.step,
            path=str(self.run.path),
            preset=self.source,
            parent_step=self.state.progress.step if attempt else None,
            skipped_checkpoints=[[path.name, reason] for path, reason in skipped],
            loader_tok_s=round(self.parts.loader.throughput()),
            machine=machine.facts(self.config.parallel.device),
            matmul_flops=self.peak,
            choices=self.choices,
            changed=self.changed,
            **setup.description(self.parts),
        )


class Stopped(Exception):  # noqa: N818 - not an error: the run was asked to stop and saved itself
    """The run was stopped by a signal after saving its state at `step`."""

    def __init__(self, run: Run, step: int, signal: str) -> None:
        super().__init__(f"stopped by {signal} at step {step}; state saved")
        self.run, self.step, self.signal = run, step, signal
