"""The trainer: from a request, or from a run that stopped, to a session that trains it to its end."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lumina.checkpoint import catalogue
from lumina.checkpoint.places import checkpoints, step_of
from lumina.config.change import RESUME, change, differences
from lumina.config.resolve import Resolved, read, request_hash, resolve, settle, write
from lumina.data.corpus import Corpus
from lumina.data.shards import data_fingerprint
from lumina.data.tokenizer import Tokenizer
from lumina.errors import DiskRefused, MachineFailed, UserError
from lumina.parallel.world import World, join
from lumina.progress import Tell, silent, whole
from lumina.run import index, verdicts
from lumina.run.folder import Run
from lumina.run.inbox import Inbox
from lumina.run.lineage import lineage
from lumina.run.lock import RunLock
from lumina.training import machine, memory, oom, room, setup
from lumina.training.session import Listener, Session
from lumina.training.ways_back import Back

TOO_LONG = "set train.micro_batch smaller, or train.steps instead of train.time"
BUILDING = "building the model"
TOO_LARGE = "choose a smaller model (see `lumina presets`), or share it among more processes with torchrun"


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

        Started by torchrun, all its processes call this; listeners hear of it in the main process only. Raises
        `UserError`, `OutOfMemory`, and, once there is a run, `MachineFailed` for an error of the system that may pass.
        """
        world = join()
        start = world.each(lambda: setup.origin(self.resolved.config))
        asked, self.resolved = self.resolved, setup.begin_with(self.resolved, start)
        world.decide(lambda: memory.require(self.resolved, world.size, world.local_size))
        request, known, self.already_finished = world.decide(lambda: self._look_up(asked, start))
        if known is not None:
            return resume(known, self.listeners, self.progress)
        world.decide(lambda: room.require(self.resolved.config, self.root))
        own = str(start.run.tokenizer) if start else None
        corpus = setup.load_data(self.resolved.config, tokenizer=own, world=world, progress=self.progress)
        with oom.ending_alone(world), oom.beyond_repair("timing a step", TOO_LONG):
            settled, rate = setup.settle_all(self.resolved, corpus, world, self.progress, self.root)
        with oom.ending_alone(world), oom.beyond_repair(BUILDING, TOO_LARGE), whole(BUILDING, self.progress):
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
        with world.holding(RunLock(run.lock)), oom.ending_alone(world), _machine_of(run), _memory_of(run):
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
            content += catalogue.seal(start.checkpoint.path)
        request = request_hash(asked, content)
        known, status = (None, "none") if self.fresh else index.newest(self.root, request)
        return request, known, status == "finished"


def stand(source: str | Path, keys: Mapping[str, Any], root: Path, listeners: Sequence[Listener] = ()) -> Session:
    """A session of a new run below `root`, before its first step: for whoever drives or disturbs it from outside.

    Benchmarks and verification do; `Session.train` takes its steps. Later plans learn nothing of it.
    """
    resolved = resolve(source, dict(keys))
    corpus = setup.load_data(resolved.config)
    settled, rate = setup.settle_all(resolved, corpus, root=root)
    parts = setup.build(settled.config, corpus)
    run = Run.create(root, settled.source)
    meta = {"request": "", "data": corpus.fingerprint, "started_in": str(Path.cwd()), "processes": 1}
    _write(run, settled, corpus, meta)
    return Session(run, settled, parts, rate, listeners, silent, apart=True)


def _write(run: Run, settled: Resolved, corpus: Corpus, meta: dict[str, Any]) -> None:
    """What makes a folder a run."""
    try:
        write(settled, run.config)
        corpus.tokenizer.save(run.tokenizer)
        with suppress(DiskRefused):  # a store that cannot be read puts no arms in order, and is no reason not to train
            verdicts.copy_into(run, verdicts.version(settled.config))
        run.write_meta(meta)
    except BaseException as error:  # half a folder is no run: nobody could go on with it
        shutil.rmtree(run.path, ignore_errors=True)
        if isinstance(error, OSError):
            fix = "free space there, or choose another folder with --root"
            raise UserError(f"{run.path}: the run cannot be written: {error.strerror}", fix) from error
        raise


def resume(
    run: Run,
    listeners: Sequence[Listener] = (),
    progress: Tell = silent,
    *,
    settings: Sequence[str] | Mapping[str, Any] = (),
    back: Back | None = None,
) -> Run:
    """Goes on with a run from its newest complete checkpoint (from the start if it has none), or goes `back`.

    `settings` change how it is computed, kept and shown from here on, as `config.change` lists; its `config.yaml`
    holds them then, so that it goes on with them the next time. A finished run is returned as it is, unless it goes
    back or something in its inbox may: then it is unfinished again. Raises `UserError` if it cannot go on so, with
    nothing changed; `OutOfMemory`; and `MachineFailed` for an error of the system that may pass.
    """
    world = join()
    if back is None and world.decide(lambda: run.finished and not Inbox(run).waiting()):
        return run
    before = world.each(lambda: read(run.config))
    resolved = _changed(run, before, settings, world)
    world.decide(lambda: memory.require(resolved, world.size, world.local_size))
    world.decide(lambda: room.require(resolved.config, run.checkpoints, _undone(run, back)))
    with world.holding(RunLock(run.lock)), oom.ending_alone(world), _machine_of(run), _memory_of(run):
        _again(run, before, resolved, world, listeners, progress).train(back)
    return run


def stand_again(run: Run, settings: Mapping[str, Any], listeners: Sequence[Listener] = ()) -> Session:
    """As `stand`, of a run that stopped: a session that goes on with it, with `settings` as of `resume`."""
    world, before = join(), read(run.config)
    return _again(run, before, _changed(run, before, settings, world), world, listeners, silent, apart=True)


def _again(
    run: Run,
    before: Resolved,
    resolved: Resolved,
    world: World,
    listeners: Sequence[Listener],
    progress: Tell,
    apart: bool = False,
) -> Session:
    """The session that goes on with a run, which was resolved `before`."""
    meta = world.each(run.read_meta)
    world.each(lambda: machine.check_settled(resolved.config, str(run.path), world))
    corpus = _data_again(run, resolved, meta, world, progress)
    with oom.beyond_repair("timing a step", "set checkpoint.every to a number of steps"):
        resolved = setup.settle_interval(resolved, meta["processes"], corpus, world, progress, run.path.parent)
    config = setup.adapt(resolved, meta["processes"], world)
    with oom.beyond_repair(BUILDING, TOO_LARGE), whole(BUILDING, progress):
        parts = setup.build(config, corpus, world)
    changed = differences(before, resolved)
    return Session(run, resolved, parts, setup.matmul_rate(config, world), listeners, progress, changed, apart)


def _undone(run: Run, back: Back | None) -> list[Path]:
    """The checkpoints that count for nothing when the run goes on."""
    after = [path for path in checkpoints(run.checkpoints) if back and step_of(path) > back.step]
    return after + catalogue.abandoned(run.checkpoints, lineage(run).counts)


def _memory_of(run: Run) -> AbstractContextManager[None]:
    """Of whatever has no smaller pieces, such as a probe or a checkpoint."""
    return oom.beyond_repair("the run", f"free memory, then go on from the last checkpoint: lumina resume {run.path}")


@contextmanager
def _machine_of(run: Run) -> Iterator[None]:
    """Raises `MachineFailed` for what no room foresaw of the system's errors: a disk that hung may be well again."""
    try:
        yield
    except BrokenPipeError:  # of whoever reads what is said
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        again = f"lumina resume {shlex.quote(str(run.path))}"
        fix = f"look at the disk or the network it is on, then go on from the last checkpoint: {again}"
        raise MachineFailed(f"{where}{error.strerror or error}", fix) from error


def _changed(run: Run, before: Resolved, settings: Sequence[str] | Mapping[str, Any], world: World) -> Resolved:
    """The configuration to go on with: what a lack of memory left word of, then what the user asks."""
    resolved = before
    if (retry := world.decide(lambda: oom.read_retry(run))) and "micro_batch" in retry:
        why = f"{oom.KIND} with {retry['before']} in step {retry['step']}"
        resolved = world.each(lambda: settle(resolved, {"train.micro_batch": (retry["micro_batch"], why)}))
    if not settings:
        return resolved
    asked = world.each(lambda: change(resolved, settings))
    resolved = setup.settle_again(asked, world)
    mine = {key for key, origin in asked.origins.items() if origin == RESUME}
    if asked.config.train.micro_batch != before.config.train.micro_batch:
        world.decide(lambda: machine.require_micro_batch(resolved.config, world))
    return replace(resolved, origins=resolved.origins | dict.fromkeys(mine, RESUME))


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


def _as_text(settings: Mapping[str, Any]) -> list[str]:
    """The `key=value` form; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
