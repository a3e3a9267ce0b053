"""From a request to the parts of a run: data prepared, machine-dependent choices settled, model and optimizer built.

Everything that can be wrong with the input is found here, before a run folder exists.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch

from lumina.checkpoint import store
from lumina.checkpoint.catalogue import abandoned
from lumina.checkpoint.writer import Way
from lumina.config.resolve import Resolved, adopt, read, settle
from lumina.config.schema.config import Config
from lumina.config.schema.train import CHINCHILLA
from lumina.data.corpus import Corpus
from lumina.data.loader import DataPhase, Heldout, Loader, cuts_of
from lumina.data.records import KINDS, Kind
from lumina.data.shards import prepare
from lumina.data.tokenizer import BYTES, SPECIALS, Tokenizer
from lumina.errors import UserError
from lumina.model import cost
from lumina.model.transformer import Transformer
from lumina.parallel import sharding
from lumina.parallel.world import ALONE, World
from lumina.planner.length import optimal_length, repetition
from lumina.progress import Tell, silent, tracked
from lumina.run.folder import Run
from lumina.run.lineage import lineage
from lumina.training import interval, machine
from lumina.training.optim import Optimizer
from lumina.training.precision import DTYPES, LossScale, Precision
from lumina.training.schedule import Part
from lumina.training.schedule import parts as parts_of_run
from lumina.training.step import Step, train_step

VOCAB_MULTIPLE = 64  # rows of the embedding: matmuls like round numbers
GRAPHS = 64  # of a block at most: kinds of blocks (routed or not, with experts or not) x capacities of `mod.anneal`
DEADLINE_STEPS = 5  # steps timed to turn `train.time` into steps
DEADLINE_RESERVE = 0.05  # of the time, kept for evaluations and checkpoints


@dataclass
class Parts:
    """A run, ready to step."""

    config: Config
    corpus: Corpus
    model: Transformer
    optimizer: Optimizer
    loader: Loader
    phases: list[Part]
    precision: Precision
    plan: Step
    cost: cost.Cost
    world: World

    @property
    def main_kind(self) -> Kind:
        """What decides which evaluation is the best: what the run ends on, texts where it ends on both."""
        kind: Kind = "chat" if self.config.data.mode in ("finetune", "hybrid_sequential") else "text"
        return kind if kind in self.kinds else self.kinds[0]

    @cached_property
    def kinds(self) -> list[Kind]:
        """What can be evaluated. Raises `UserError` if nothing can."""
        kinds = [kind for kind in KINDS if len(self.heldout(kind, 1))]
        if not kinds:
            fix = "hold out others with data.eval=FILE, or set model.seq_len higher"
            raise UserError("no held-out conversation has an answer that fits into a window", fix)
        return kinds

    def heldout(self, kind: Kind, tokens: int) -> Heldout:
        """The held-out side of a kind, in batches of about so many tokens."""
        return self._heldout[kind].in_batches(max(1, tokens // self.config.model.seq_len))

    @cached_property
    def _heldout(self) -> dict[Kind, Heldout]:
        seq_len, end_id = self.config.model.seq_len, self.corpus.tokenizer.end_id
        on = self.config.data.train_on
        return {kind: Heldout(self.corpus.of("heldout", kind), seq_len, 1, end_id, on) for kind in KINDS}

    @property
    def steps(self) -> int:
        assert self.config.train.steps is not None  # settled
        return self.config.train.steps

    def reseat(self) -> None:
        """A new loader: whatever the old one had come to hold is gone, and batch i is what it is planned to be."""
        self.loader = _loader(self.config, self.corpus, self.phases)


def load_data(config: Config, tokenizer: str | None = None, world: World = ALONE, progress: Tell = silent) -> Corpus:
    """The corpus of `config.data`; `tokenizer` (a run's own) replaces the configured one.

    The main process prepares it, the others find it in the cache, which several machines have to share.
    """
    load = partial(
        prepare, config.data, tokenizer=tokenizer or "", vocab=config.model.vocab, seq_len=config.model.seq_len
    )
    loaded: list[Corpus] = []
    world.decide(lambda: loaded.append(load(progress=progress)))
    return world.each(lambda: loaded[0] if loaded else load())


@dataclass(frozen=True)
class Origin:
    """What `train.init_from` names: a run, and the checkpoint whose weights are taken."""

    run: Run
    checkpoint: store.Checkpoint


def origin(config: Config) -> Origin | None:
    """Finds `train.init_from`. Raises `UserError` if it is no run with a complete checkpoint of a whole model."""
    if not config.train.init_from:
        return None
    path = Path(config.train.init_from).expanduser()
    is_checkpoint = store.STEP.fullmatch(path.resolve().name) is not None
    run = Run.open(path.resolve().parent.parent if is_checkpoint else path)
    out = abandoned(run.checkpoints, lineage(run).counts)
    own = run.id
    found = store.read(path, own=own) if is_checkpoint else store.newest(run.checkpoints, without=out, own=own)[0]
    if found is None:
        raise UserError(f"train.init_from: {run.path}: no complete checkpoint", fix="let it train until it saves one")
    if read(run.config).config.train.lora.rank:
        fix = f"merge it, and begin with the result: lumina lora merge {run.path}"
        raise UserError(f"train.init_from: {run.path} holds adapters beside its weights", fix)
    run.require_tokenizer()
    return Origin(run, found)


def begin_with(resolved: Resolved, start: Origin | None) -> Resolved:
    """The request with the model of its `origin`, and the exact checkpoint in place of the run's name."""
    if start is None:
        return resolved
    own = resolved.config.data.tokenizer
    if own != "bpe" and Tokenizer.load(own).fingerprint != Tokenizer.load(start.run.tokenizer).fingerprint:
        raise UserError(
            f"data.tokenizer={own}: another tokenizer than that of train.init_from={start.run.path}",
            fix="leave data.tokenizer out: the run's own is used",
        )
    adopted = adopt(resolved, read(start.run.config).config, str(start.run.path))
    why = f"newest complete checkpoint of {resolved.config.train.init_from}"
    return settle(adopted, {"train.init_from": (str(start.checkpoint.path.resolve()), why)})


def load_origin(parts: Parts) -> None:
    """The weights of `train.init_from`; whatever else a model has keeps its initial values."""
    start = parts.world.each(lambda: origin(parts.config))
    if start is not None:
        store.load(start.checkpoint, parts.model.base_tensors(), world=parts.world)


def settle_all(
    resolved: Resolved, corpus: Corpus, world: World = ALONE, progress: Tell = silent, root: Path = Path("runs")
) -> tuple[Resolved, float]:
    """Settles vocabulary, device, precision, kernel, micro-batch, steps, compilation and the interval between saves for
    this machine, this data and the disk of `root`.

    Returns the matmul rate too, in FLOP/s of one process, which one of the choices needs.
    """
    wanted = resolved.config.parallel.device
    world.each(lambda: machine.choose_device(wanted))  # each may be on another machine
    chosen = world.decide(lambda: _vocab_choice(resolved, corpus) | machine.choose(resolved.config, world))
    world.decide(lambda: machine.require_micro_batch(resolved.config, world))
    resolved = settle(resolved, chosen)
    config = resolved.config
    rate = matmul_rate(config, world)
    if config.train.tokens == CHINCHILLA:
        unique = corpus.facts["tokens"]["train"]
        resolved = settle(resolved, world.decide(lambda: optimal_length(config, unique)))
        config = resolved.config
    seconds, saves = config.train.time, config.checkpoint
    if seconds is not None or saves.every == "auto":
        # One step, not compiled, stands in until the step time is known.
        trial = settle(resolved, {"train.steps": (10**6, "trial"), "train.compile": ("off", "trial")})
        parts = build(trial.config, corpus, world)
        step_time = _measure_step_time(parts, progress)
    if seconds is not None:
        resolved = settle(resolved, world.decide(lambda: _deadline_choice(config, seconds, step_time)))
    if saves.every == "auto":
        resolved = _settle_interval(resolved, parts, step_time, root)
    return _settle_compile(resolved, rate, world), rate


def settle_again(changed: Resolved, world: World) -> Resolved:
    """The same for what is open again in the configuration of a run that was changed."""
    device = changed.config.parallel.device
    world.each(lambda: machine.choose_device(device))
    resolved = settle(changed, world.decide(lambda: machine.choose(changed.config, world)))
    rate = matmul_rate(resolved.config, world) if resolved.config.train.compile == "auto" else 0.0
    return _settle_compile(resolved, rate, world)


def settle_interval(
    resolved: Resolved, began_with: int, corpus: Corpus, world: World, progress: Tell, root: Path
) -> Resolved:
    """The same for the interval between saves of a run that goes on, where that is open again.

    Weights of their own are trained and saved below `root`, and thrown away.
    """
    if resolved.config.checkpoint.every != "auto":
        return resolved
    trial = settle(resolved, {"train.compile": ("off", "trial")})
    parts = build(adapt(trial, began_with, world), corpus, world)
    return _settle_interval(resolved, parts, _measure_step_time(parts, progress), root)


def _settle_interval(resolved: Resolved, parts: Parts, step_time: float, root: Path) -> Resolved:
    """Measures what a save costs, in both ways where neither the user nor the machine leaves only one."""
    config, world = resolved.config, parts.world
    ways: tuple[Way, ...] = (cast("Way", config.checkpoint.write),)
    own = not resolved.origins["checkpoint.write"].startswith("resolved: ")
    if not own and world.decide(lambda: machine.either_way(config, world)):
        ways = "inline", "background"
    costs = interval.measure(parts, root, ways, partial(_trial_step, parts, 0), step_time)

    def choose() -> machine.Choices:
        way = interval.cheaper(costs) if len(ways) > 1 else {}
        cost = min(costs.values(), key=lambda cost: cost.lost)
        steps, evals = config.train.steps or 0, config.train.eval_every
        return way | interval.choose(cost, step_time, config.checkpoint.mtbf, steps, evals)

    return settle(resolved, world.decide(choose))


def _settle_compile(resolved: Resolved, rate: float, world: World) -> Resolved:
    config = resolved.config
    if config.train.compile == "auto":
        steps = config.train.steps or 0
        flops = mean_flops(config, steps)
        compiled = world.decide(lambda: machine.choose_compile(config, steps, flops, rate * world.size))
        resolved = settle(resolved, {"train.compile": compiled})
    world.each(lambda: machine.require_compiler(resolved.config))
    return resolved


def matmul_rate(config: Config, world: World) -> float:
    """FLOP/s of the main process, which the others wait for, in the run's format or in fp32: the larger."""
    torch.set_num_threads(int(config.parallel.threads))
    device = config.parallel.device
    # What the machine can do, also where the chosen format has no units of its own, as fp16 on a CPU.
    formats = {torch.float32, DTYPES[config.precision.mode]} - ({torch.float16} if device == "cpu" else set())
    return world.decide(lambda: max(machine.matmul_rate(device, dtype) for dtype in formats))


def mean_flops(config: Config, steps: int) -> float:
    """FLOPs of a trained token, averaged over a run of `steps` in which the depth capacity may fall."""
    return cost.mean_flops(config.model, steps, config.train.lora.rank)


def _deadline_choice(config: Config, seconds: float, step_time: float) -> machine.Choices:
    """`step_time` is that of a step after `mod.anneal`; those before are longer by their FLOPs."""
    least = cost.count(config.model, rank=config.train.lora.rank).flops_per_token
    training, mean, steps = seconds * (1 - DEADLINE_RESERVE), step_time, 0
    for _ in range(DEADLINE_STEPS):  # the mean depends on the number of steps; this settles at once, or soon
        steps = max(1, int(training / mean))
        mean = step_time * mean_flops(config, steps) / least
    falls = config.model.mod and config.model.mod.anneal
    longer = "" if not falls else f", {mean:.3f}s on average while the depth settles"
    return {"train.steps": (steps, f"train.time={seconds:g}s at {step_time:.3f}s a step{longer}")}


def adapt(resolved: Resolved, began_with: int, world: World) -> Config:
    """A run's settled configuration for the processes it goes on with, of which it may have begun with others.

    They share this machine's cores, and a micro-batch has to divide a process's part of the batch. As many as it
    `began_with` keep what was settled.
    """
    config = resolved.config
    threads = int(config.parallel.threads)
    if world.size != began_with:
        own = not resolved.origins["parallel.threads"].startswith("resolved: ")
        threads = min(machine.threads(world), threads) if own else machine.threads(world)
    micro = machine.micro_batch(config, world, int(config.train.micro_batch))
    parallel = config.parallel.model_copy(update={"threads": threads})
    train = config.train.model_copy(update={"micro_batch": micro})
    return config.model_copy(update={"parallel": parallel, "train": train})


def build(config: Config, corpus: Corpus, world: World = ALONE) -> Parts:
    """Model, optimizer and loader of a settled configuration, freshly initialised."""
    torch.set_num_threads(int(config.parallel.threads))
    if config.parallel.device == "cuda":
        torch.cuda.set_device(world.local_rank)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(config.train.deterministic)
    precision = Precision.of(config.precision, config.parallel.device)
    model = build_model(config, precision, world)
    sequences = config.train.batch_tokens // config.model.seq_len
    phases = parts_of_run(config.train, config.data, config.train.steps or 0)
    return Parts(
        config=config,
        corpus=corpus,
        model=model,
        optimizer=Optimizer(
            model, config.train, world, LossScale(config.parallel.device) if config.precision.mode == "fp16" else None
        ),
        loader=_loader(config, corpus, phases),
        phases=phases,
        precision=precision,
        plan=Step(
            micro_batches=sequences // world.size // int(config.train.micro_batch),
            clip=config.train.clip,
            z_loss=config.train.z_loss,
            bias_rate=config.model.moe.bias_rate if config.model.moe else 0.0,
            world=world,
            seed=config.train.seed,
            frozen=config.train.lora.rank > 0,
        ),
        cost=cost.count(config.model, rank=config.train.lora.rank),
        world=world,
    )


def _loader(config: Config, corpus: Corpus, phases: Sequence[Part]) -> Loader:
    train, seq_len = config.train, config.model.seq_len
    read = [DataPhase(phase.begin, phase.data) for phase in phases]
    return Loader(corpus, config.data, read, seq_len, train.batch_tokens // seq_len, train.seed, train.steps or 0)


def build_model(config: Config, precision: Precision, world: World) -> Transformer:
    """The model on its device, shared out among the processes; no process ever holds all of it."""
    world.each(lambda: _require_alone(config, world))
    with torch.device("meta"):
        model = Transformer(config.model, lora=config.train.lora)
    model.cast(precision.weights)
    if config.train.compile == "on":
        torch.compiler.reset()  # graphs of another model would count towards the limit of this one
        torch._dynamo.config.recompile_limit = GRAPHS
    for block in model.units:
        block.recompute = config.train.recompute
        if config.train.compile == "on":
            block.compile()
    if world.size > 1:
        units = model.units if config.model.tied else [model.embed, *model.units]
        sharding.shard(model, units, world, config.parallel.device)
    sharding.materialize(model, config.parallel.device)
    model.initialize(config.train.seed, sharding.assign)
    return model


def _require_alone(config: Config, world: World) -> None:
    if config.train.lora.rank and world.size > 1:
        raise UserError(
            f"train.lora.rank={config.train.lora.rank}: adapters are trained by one process, not {world.size}",
            fix="start it without torchrun, or leave train.lora.rank out",
        )


def _vocab_choice(resolved: Resolved, corpus: Corpus) -> machine.Choices:
    """A foreign tokenizer, or a larger one of shards, sets the preset's vocabulary; a vocabulary that the user chose
    must hold it."""
    have, need = resolved.config.model.vocab, corpus.tokenizer.vocab_size
    own = resolved.config.data.tokenizer
    if own == "bpe" and need <= have:
        return {}
    source = "the shards" if own == "bpe" else own
    if resolved.origins["model.vocab"].startswith(("preset", "default")):
        least = len(SPECIALS) + BYTES  # that the schema takes, also for an alphabet of 65 letters
        rounded = -(-max(need, least) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        return {"model.vocab": (rounded, f"{need} tokens of {source}, rounded up")}
    if have < need:
        raise UserError(
            f"model.vocab={have} is smaller than the vocabulary of {source}: {need} tokens",
            fix=f"leave model.vocab out, or set it to {need} or more",
        )
    return {}


def _measure_step_time(parts: Parts, progress: Tell) -> float:
    """Median seconds of a training step, on throw-away weights."""
    times = []
    for i in tracked(range(DEADLINE_STEPS + 1), "timing a step", DEADLINE_STEPS + 1, progress):
        start = time.perf_counter()
        _trial_step(parts, i)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _trial_step(parts: Parts, i: int) -> None:
    """The batch of step `i`, and the step to its end."""
    batch = parts.loader.batch(i)
    train_step(parts.model, parts.optimizer, batch, 0.0, parts.plan, parts.precision, freeze_bias=True).tolist()


def description(parts: Parts) -> dict[str, Any]:
    """What a reader of the run's events wants to know first."""
    config, corpus = parts.config, parts.corpus
    return {
        "kind": config.model.kind,
        "steps": parts.steps,
        "batch_tokens": config.train.batch_tokens,
        "micro_batch": config.train.micro_batch,
        "params": parts.cost.total,
        "active": parts.cost.active,
        "active_mean": parts.cost.active_mean,
        "flops_per_token": parts.cost.flops_per_token,
        "layers": config.model.layers,
        "experts": config.model.moe.experts if config.model.moe else 0,
        "seed": config.train.seed,
        "device": config.parallel.device,
        "threads": config.parallel.threads,
        "precision": config.precision.mode,
        "precision_eval": config.precision.eval,
        "recompute": config.train.recompute,
        "compile": config.train.compile,
        "processes": parts.world.size,
        "vocab": config.model.vocab,
        "data": corpus.facts
        | parts.loader.facts
        | {f"heldout_{key}": value for key, value in cuts_of(parts.heldout("chat", 1).windows).items()},
        "epochs": repetition(
            corpus.facts["tokens"]["train"], parts.steps * config.train.batch_tokens, parts.loader.epochs
        ),
        "mode": config.data.mode,
        "phases": [asdict(phase) for phase in parts.phases],
        "lora": config.train.lora.rank,
        "trained": sum(p.numel() for p in parts.model.parameters() if p.requires_grad),
        "init_from": config.train.init_from,
    }
