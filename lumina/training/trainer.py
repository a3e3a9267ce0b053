"""The trainer: a run from its first step to its last, or from where it stopped, to the bit.

    batch index -> loader -> train_step -> (one step later) observe -> maybe evaluate -> maybe save

Metrics are observed at a fixed lag of one step, so that no step waits for the host; the metrics not yet observed
are part of the checkpoint. Everything a reader wants goes through one `EventWriter`.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from signal import Signals
from typing import Any

from lumina.checkpoint import retention, store
from lumina.config.resolve import Resolved, read, request_hash, resolve, write
from lumina.data.corpus import Corpus
from lumina.data.shards import data_fingerprint
from lumina.data.tokenizer import Tokenizer
from lumina.errors import UserError
from lumina.events import EventWriter
from lumina.parallel.world import World, join
from lumina.progress import Tell, silent, whole
from lumina.run import index
from lumina.run.folder import Run
from lumina.run.lock import RunLock
from lumina.run.signals import StopRequest
from lumina.training import machine, memory, setup
from lumina.training.evaluate import Evaluation, evaluate
from lumina.training.observer import Observer
from lumina.training.probe import TOKENS as PROBE_TOKENS
from lumina.training.probe import Probe
from lumina.training.schedule import depth_capacity, rate
from lumina.training.state import Lagged, Progress, pack, unpack
from lumina.training.step import train_step

Listener = Callable[[dict[str, Any]], None]
EVAL_TOKENS = 16384  # tokens evaluated at once


class Trainer:
    """`Trainer("debug", data="x.txt", **{"train.steps": 300}).fit()` trains and returns the `Run`.

    `source` is a preset or a YAML file; `settings` are `key=value` strings or a mapping, and keyword arguments
    are dotted keys. Raises `UserError` for anything wrong with them. `listeners` receive every event, `progress` is
    told how far whatever is long has come.
    """

    def __init__(
        self,
        source: str | Path = "debug",
        settings: Sequence[str] | Mapping[str, Any] = (),
        *,
        data: str | Sequence[str] | None = None,
        root: str | Path = "runs",
        fresh: bool = False,
        listeners: Sequence[Listener] = (),
        progress: Tell = silent,
        **keys: Any,
    ) -> None:
        if settings and keys:
            raise TypeError("give keys as `settings` or as keyword arguments, not both")
        settings = settings or keys
        if data is not None:
            named = {"data.train": data}
            settings = {**settings, **named} if isinstance(settings, Mapping) else [*settings, *_as_text(named)]
        self.resolved = resolve(source, settings)
        self.root, self.fresh, self.listeners, self.progress = Path(root), fresh, listeners, progress
        self.already_finished = False  # whether `fit` found the request answered by a finished run

    def fit(self) -> Run:
        """Trains to the end, going on with an unfinished run of the same request unless `fresh`.

        Started by torchrun, all its processes call this; listeners hear of it in the main process only.
        """
        world = join()
        start = world.each(lambda: setup.origin(self.resolved.config))
        asked, self.resolved = self.resolved, setup.begin_with(self.resolved, start)
        world.decide(lambda: memory.require(self.resolved, world.size, world.local_size))
        request, known, self.already_finished = world.decide(lambda: self._look_up(asked, start))
        if known is not None:
            return resume(known, self.listeners, self.progress)
        own = str(start.run.tokenizer) if start else None
        corpus = setup.load_data(self.resolved.config, tokenizer=own, world=world, progress=self.progress)
        settled, rate = setup.settle_all(self.resolved, corpus, world, self.progress)
        with whole("building the model", self.progress):
            parts = setup.build(settled.config, corpus, world)
            setup.load_origin(parts)
            world.each(lambda: parts.kinds)
        meta = {
            "request": request,
            "data": corpus.fingerprint,
            "started_in": str(Path.cwd()),
            "machine": machine.facts(parts.config.parallel.device),
            "processes": world.size,
        }
        run = world.decide(lambda: Run.create(self.root, settled.source))
        with world.holding(RunLock(run.lock)):
            world.decide(lambda: _write(run, settled, corpus, meta))
            Session(run, settled, parts, rate, self.listeners, self.progress).train()
        return run

    def _look_up(self, asked: Resolved, start: setup.Origin | None) -> tuple[str, Run | None, bool]:
        """The hash of what was asked, the run that answers it if there is one, and whether that is finished."""
        data = asked.config.data
        content = data_fingerprint(data, self.progress)
        if data.tokenizer != "bpe":
            content += Tokenizer.load(data.tokenizer).fingerprint
        if start:
            content += store.fingerprint(start.checkpoint.path)
        request = request_hash(asked, content)
        known, status = (None, "none") if self.fresh else index.newest(self.root, request)
        return request, known, status == "finished"


def _write(run: Run, settled: Resolved, corpus: Corpus, meta: dict[str, Any]) -> None:
    """What makes a folder a run."""
    try:
        write(settled, run.config)
        corpus.tokenizer.save(run.tokenizer)
        run.write_meta(meta)
    except BaseException as error:  # half a folder is no run: nobody could go on with it
        shutil.rmtree(run.path, ignore_errors=True)
        if isinstance(error, OSError):
            fix = "free space there, or choose another folder with --root"
            raise UserError(f"{run.path}: the run cannot be written: {error.strerror}", fix) from error
        raise


def resume(run: Run, listeners: Sequence[Listener] = (), progress: Tell = silent) -> Run:
    """Goes on with a run from its newest complete checkpoint (from the start if it has none).

    A finished run is returned as it is.
    """
    world = join()
    if world.decide(lambda: run.finished):
        return run
    resolved = world.each(lambda: read(run.config))
    world.decide(lambda: memory.require(resolved, world.size, world.local_size))
    with world.holding(RunLock(run.lock)):
        meta = world.each(run.read_meta)
        world.each(lambda: machine.check_settled(resolved.config, str(run.config), world))
        corpus = _data_again(run, resolved, meta, world, progress)
        config = setup.adapt(resolved, meta["processes"], world)
        with whole("building the model", progress):
            parts = setup.build(config, corpus, world)
            if not store.checkpoints(run.checkpoints):
                setup.load_origin(parts)
        Session(run, resolved, parts, setup.matmul_rate(config, world), listeners, progress).train()
    return run


def _data_again(run: Run, resolved: Resolved, meta: dict[str, Any], world: World, progress: Tell) -> Corpus:
    """The data of a run, if it is still what it was."""
    world.each(run.require_tokenizer)
    try:
        corpus = setup.load_data(resolved.config, tokenizer=str(run.tokenizer), world=world, progress=progress)
    except UserError as error:
        if Path.cwd() != Path(meta["started_in"]):
            error.fix = f"the run was started in {meta['started_in']}; resume it from there"
        raise

    def compare() -> None:
        if corpus.fingerprint != meta["data"]:
            raise UserError(
                f"{run.path}: its training data or tokenizer changed since it was started",
                fix="restore the files, or start another: lumina train … --fresh",
            )

    world.each(compare)
    return corpus


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
    ) -> None:
        self.run, self.config, self.parts, self.listeners = run, parts.config, parts, listeners
        self.world, self.told = parts.world, told if parts.world.main else silent
        self.first = "compiling, and the first step" if self.config.train.compile == "on" else "the first step"
        self.source = resolved.source
        self.choices = {
            key: origin.removeprefix("resolved: ")
            for key, origin in resolved.origins.items()
            if origin.startswith("resolved: ")
        }
        self.peak = rate * self.world.size  # FLOP/s of square matmuls, of all processes: what MFU is measured against
        self.identity = {
            "tokenizer": parts.corpus.tokenizer.fingerprint,
            "data": parts.corpus.fingerprint,
            "kind": self.config.model.kind,
        }
        looked_at = parts.heldout(parts.main_kind, PROBE_TOKENS)[0]
        self.probe = Probe(parts.model, looked_at, parts.precision)
        self.observer = Observer(parts, self.peak, self._emit)
        self.freeze_from = parts.steps - parts.phases[-1].decay
        self.heldout = {kind: parts.heldout(kind, EVAL_TOKENS) for kind in parts.kinds}
        self.progress = Progress()
        self.pending: Lagged | None = None
        self.last_eval: tuple[int, Evaluation] | None = None
        self.saved_step: int | None = None

    def train(self) -> None:
        """Runs the attempt. A first SIGINT or SIGTERM saves and raises `Stopped`."""
        attempt = self.world.decide(self.run.next_attempt)
        skipped = self._restore() if attempt else []
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            if self.world.main:
                self.events = stack.enter_context(EventWriter(self.run.event_log, attempt, self.listeners))
            self._announce(skipped, attempt)
            self.last = time.perf_counter()
            self.told(self.first, 0, 1)
            while self.progress.step < self.parts.steps:
                self._step()
                if signal := self.world.max(stop.requested):
                    self._stop(Signals(signal).name)
            self._finish()

    # -- one step -----------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """The next step, then what is due after it."""
        parts, progress, train = self.parts, self.progress, self.config.train
        step = progress.step + 1
        self._tell_phase(step)
        capacity = self._capacity(step)
        for router in parts.model.routers:
            router.capacity = capacity
        metrics = train_step(
            parts.model,
            parts.optimizer,
            parts.loader.batch(step - 1),
            rate(parts.phases, train.schedule, step),
            parts.plan,
            parts.precision,
            freeze_bias=step > self.freeze_from,
            step=step,
        )
        self._observe()
        now = time.perf_counter()
        progress.step_seconds, self.last = now - self.last, now
        progress.step, progress.tokens = step, progress.tokens + train.batch_tokens
        progress.wall += progress.step_seconds
        self.pending = Lagged(metrics)
        if step == parts.steps:
            return
        if train.eval_every and step % train.eval_every == 0:
            self._evaluate()
        if (every := self.config.orchestrator.probe_every) and step % every == 0:
            self._look()
        if self.config.checkpoint.every and step % self.config.checkpoint.every == 0:
            self._save()

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
        values = self.pending.read() if self.pending else self.progress.pending
        self.progress.pending = None
        if values is None:
            return
        if self.first:
            self.told(self.first, 1, 1)
            self.first = ""
        self.observer(self.progress, values)

    def _evaluate(self) -> None:
        """Evaluates all held-out tokens of each kind with the causal routing; its time is not training time."""
        parts, begin, mod = self.parts, time.perf_counter(), self.config.model.mod
        for kind, batches in self.heldout.items():
            start = time.perf_counter()
            result = evaluate(
                parts.model,
                batches,
                batches.text_bytes,
                parts.precision,
                mod.capacity if mod else None,
                self.world,
                self.told,
            )
            if mod and self._capacity(self.progress.step) != mod.capacity:
                result = replace(result, comparable=False)  # it still computes more than it will
            self._emit(
                "eval",
                step=self.progress.step,
                tokens=self.progress.tokens,
                split="heldout" if kind == parts.main_kind else f"heldout {kind}",
                data=kind,
                routing="causal",
                seconds=round(time.perf_counter() - start, 3),
                **result.fields(),
            )
            if kind == parts.main_kind:
                self.last_eval = self.progress.step, result
        self.last += time.perf_counter() - begin

    def _look(self) -> None:
        """Tells what the probe sees; its time is not training time."""
        start = time.perf_counter()
        seen = self.probe()
        seconds = time.perf_counter() - start
        self._emit("probe", step=self.progress.step, seconds=round(seconds, 3), **seen)
        self.last += seconds

    # -- saving, stopping, restoring ----------------------------------------------------------------------------

    def _save(self) -> None:
        """Publishes a checkpoint of this step and points `latest` at it, and `best` if it was evaluated as the best."""
        start, progress = time.perf_counter(), self.progress
        if self.last_eval and self.last_eval[0] == progress.step and self.last_eval[1].comparable:
            loss = self.last_eval[1].loss
            if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
                progress.best_loss, progress.best_step = loss, progress.step
        if self.pending:  # else it is what this attempt began with, if that is not observed yet
            progress.pending = self.pending.read()
        with whole(f"saving step {progress.step}", self.told):
            receipt = store.save(
                self.run.checkpoints,
                progress.step,
                self.parts.model.tensors(),
                self.parts.optimizer.tensors() | self.probe.tensors(),
                pack(progress, self.parts.optimizer, self.identity),
                self.world,
            )
        self.world.decide(self._tidy)
        self.saved_step = progress.step
        self._emit("checkpoint", step=progress.step, seconds=round(receipt.seconds, 3), bytes=receipt.bytes)
        self.last += time.perf_counter() - start

    def _tidy(self) -> None:
        self._link_best()
        retention.prune(self.run.checkpoints, self.config.checkpoint.keep_last)

    def _link_best(self) -> None:
        """Points `best` where the state says it is: also after a crash between a save and its link."""
        best = self.progress.best_step
        if best is not None and store.folder(self.run.checkpoints, best).is_dir():
            store.point(self.run.checkpoints, "best", best)

    def _stop(self, signal: str) -> None:
        """Saves where we are, then says how to go on."""
        if self.saved_step != self.progress.step:
            self._save()
        self._observe()
        self._emit("end", step=self.progress.step, reason="stopped", signal=signal)
        raise Stopped(self.run, self.progress.step, signal)

    def _finish(self) -> None:
        """The last observation, evaluation and checkpoint."""
        self._evaluate()
        self._save()
        self._observe()
        self._emit("end", step=self.progress.step, reason="done")

    def _restore(self) -> list[tuple[Path, str]]:
        """Loads the newest complete checkpoint; returns those it had to pass over, with the reason.

        Raises `UserError` if there are some and all are damaged: to begin again is for the user to say.
        """
        found, skipped = store.newest(self.run.checkpoints, self.world, self.told)
        if found is None and skipped:
            reasons = [f"{path.name}: {reason}" for path, reason in skipped]
            raise UserError(
                "\n  - ".join([f"{self.run.checkpoints}: every checkpoint is damaged", *reasons]),
                fix="restore one, or start another: lumina train … --fresh",
            )
        if found is None:
            return []
        retention.check_links(self.run.checkpoints)
        for what, value in self.identity.items():
            if found.state[what] != value:
                raise UserError(
                    f"{found.path}: saved with another {what} ({found.state[what]}) than the run now has ({value})",
                    fix=f"restore the run's {what}, or start another: lumina train … --fresh",
                )
        optim = self.parts.optimizer.tensors() | self.probe.tensors()
        store.load(found, self.parts.model.tensors(), optim, self.world)
        self.progress = unpack(found.state, self.parts.optimizer)
        self.world.decide(self._link_best)
        self.saved_step = found.step
        return skipped

    def _emit(self, type: str, /, **fields: Any) -> None:
        """Events are the main process's to write."""
        if self.world.main:
            self.events.emit(type, **fields)

    def _announce(self, skipped: Sequence[tuple[Path, str]], attempt: int) -> None:
        self._emit(
            "run",
            step=self.progress.step,
            path=str(self.run.path),
            preset=self.source,
            parent_step=self.progress.step if attempt else None,
            skipped_checkpoints=[[path.name, reason] for path, reason in skipped],
            loader_tok_s=round(self.parts.loader.throughput()),
            machine=machine.facts(self.config.parallel.device),
            matmul_flops=self.peak,
            choices=self.choices,
            **setup.description(self.parts),
        )


def _as_text(settings: Mapping[str, Any]) -> list[str]:
    """The `key=value` form; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


class Stopped(Exception):  # noqa: N818 - not an error: the run was asked to stop and saved itself
    """The run was stopped by a signal after saving its state at `step`."""

    def __init__(self, run: Run, step: int, signal: str) -> None:
        super().__init__(f"stopped by {signal} at step {step}; state saved")
        self.run, self.step, self.signal = run, step, signal
