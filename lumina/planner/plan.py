"""The plan: everything that is known of a run before it begins, each number with its interval or its source.

question -> solve (configuration, tokens) -> counts, memory, time, price, losses, data, hyperparameters, use
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from lumina.config.resolve import Resolved
from lumina.config.schema.config import Config
from lumina.config.units import span
from lumina.model.cost import Cost, count
from lumina.planner import hyperparameters, memory, overtraining, remedies, repeated, time
from lumina.planner.calibration import Store
from lumina.planner.hardware import Fleet
from lumina.planner.laws import (
    DEFAULT,
    FLOPS_A_PARAMETER,
    LAWS,
    Interval,
    Law,
    Optimum,
    beyond_moe,
    expansion,
    law,
    moe_gain,
    params_of,
)
from lumina.planner.question import Question
from lumina.planner.solve import Solved, Solver, asked
from lumina.planner.traits import mismatch

WAYS = ("train.micro_batch", "train.recompute", "precision.mode")  # to train the same model in less memory


@dataclass(frozen=True)
class Data:
    """Tokens there are to train on and to evaluate, and how that is known: a count, or an estimate.

    `chosen`: somebody named it; every preset names the embedded sample, which is meant for the small ones.
    """

    tokens: float
    heldout: float | None
    how: str
    counted: bool
    chosen: bool = True


@dataclass(frozen=True)
class Fit:
    """Bytes of one device by part, of how many there are, and what to change where that does not fit.

    On a GPU an evaluation does not count: one that does not fit is done again in smaller batches.
    """

    parts: Mapping[str, int]
    total: int
    capacity: int
    fits: bool
    largest_micro_batch: int | None
    remedies: tuple[str, ...]
    corrected: Interval | None  # by what finished runs here took over their forecast


@dataclass(frozen=True)
class Loss:
    """What a law says: `params` as it counts them; `loss` covers 80 % of its refits, if it has any."""

    law: str
    source: str
    counts: str
    params: float
    loss: Interval
    optimum: Optimum  # of this run's 6·N·D
    tokens_for: float  # with which these parameters are the optimum
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Moe:
    """What a mixture of experts is worth by the joint law (Ludziejewski et al. 2025)."""

    expansion: float  # the law's E: experts over those that a token takes, shared ones in both
    gain: float  # compute that a dense model needs for the same loss, over this one's
    extrapolated: tuple[str, ...]  # what of it is beyond the law's runs


@dataclass(frozen=True)
class Residuals:
    """By how many nats the held-out losses of `runs` finished ones of this kind lay above what was forecast of them."""

    runs: int
    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class Repeats:
    """How often the data is read, and what that is worth (Muennighoff et al. 2023)."""

    epochs: float
    effective: float  # fresh tokens that are worth as much
    next_epoch: float  # of a fresh token
    loss: float  # of C4, as are the next ones
    twice: repeated.Next  # the loss with twice the compute on params, data or epochs alone
    more_data: bool  # whether there may be twice the text
    better: str  # of those that can be had, the one of the least loss


@dataclass(frozen=True)
class Advice:
    """A hyperparameter: the value, what each source would choose, and how far those are apart."""

    value: float
    sources: Mapping[str, float]

    @property
    def low(self) -> float:
        return min(self.sources.values())

    @property
    def high(self) -> float:
        return max(self.sources.values())

    @property
    def inside(self) -> bool:
        return self.low <= self.value <= self.high


@dataclass(frozen=True)
class Use:
    """Reading and writing `tokens` later: FLOPs, and the smaller model that is cheaper in all, if one is."""

    tokens: float
    flops: float
    smaller: overtraining.Alternative | None


@dataclass(frozen=True)
class Plan:
    """A run before it begins. Times in seconds, sizes in bytes, losses in nats a token of the law's own text.

    Where the run that was asked for does not fit and a setting is enough that it does, the run is the one with that
    (`question.remedies`), and `asked` is the memory of the other.
    """

    solved: Solved
    fleet: Fleet
    question: Question
    cost: Cost
    tokens: int
    steps: int
    flops: float  # counted, attention included
    flops_6nd: float  # as the law counts
    memory: Fit
    asked: Fit | None
    step: time.StepTime
    mfu: Interval
    run: time.RunTime
    price: Interval | None
    losses: tuple[Loss, ...]  # the chosen law's first
    residuals: Residuals | None
    moe: Moe | None
    data: Data | None
    repeats: Repeats | None
    lr: Advice
    batch: Advice
    warmup: Advice
    use: Use | None
    extrapolated: tuple[str, ...]  # which laws of hyperparameters are asked for what they were not fitted to
    warnings: tuple[str, ...] = ()

    @property
    def config(self) -> Config:
        return self.solved.config

    @property
    def resolved(self) -> Resolved:
        return self.solved.resolved

    @property
    def loss(self) -> Loss:
        return self.losses[0]

    def as_json(self) -> dict[str, Any]:
        """Plain values for programs; intervals are low, mid, high."""
        own = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in ("solved", "fleet")}
        device = self.fleet.device
        return {
            "preset": self.resolved.request["preset"],
            "kind": self.config.model.kind,
            "changes": {key: {"value": value, "why": why} for key, (value, why) in self.solved.changes.items()},
            "reasons": list(self.solved.reasons),
            "devices": {
                "name": device.name,
                "count": self.fleet.count,
                "here": self.fleet.here,
                "source": device.source,
            },
            "fits": self.memory.fits,
            **own,
        }


def make(question: Question, fleet: Fleet, store: Store, data: Data | None = None) -> Plan:
    """Answers a question for `fleet`, with what `store` knows of it.

    Raises `UserError` if nothing answers it, or an answer would not be honest.
    """
    chosen = law(question.law)
    device = fleet.device.name

    def measured(config: Config) -> dict[str, float]:
        return store.lookup(device, config, fleet.count)

    def step_time(config: Config) -> time.StepTime:
        kind, precision = config.model.kind, config.precision.mode
        ratios = {bound: store.figures(f"ratio_{bound}", device, kind, precision) for bound in time.BOUNDS}
        return time.step_time(config, fleet, measured(config), ratios)

    solver = Solver(question, fleet, chosen, step_time, measured)
    solved = solver.solve()
    fit, unfit = _fit(solved.config, fleet, store), None
    if (fitting := _remedied(solver, fit, store)) is not None:
        unfit = fit
        question, solved, fit = fitting
    config = solved.config
    cost, step = count(config.model), step_time(config)
    meant = data if data and (data.chosen or solved.tokens <= repeated.TOO_MANY * data.tokens) else None
    available = meant.tokens if meant else None
    run = time.run_time(config, step, fleet, meant.heldout if meant else None, measured(config))
    losses = tuple(_loss(each, cost, solved.tokens) for each in (chosen, *_others(chosen)))
    found = hyperparameters.bands(*asked(cost, solved.tokens))
    plan = Plan(
        solved=solved,
        fleet=fleet,
        question=question,
        cost=cost,
        tokens=solved.tokens,
        steps=time.steps_of(config),
        flops=cost.flops_per_token * solved.tokens,
        flops_6nd=FLOPS_A_PARAMETER * losses[0].params * solved.tokens,
        memory=fit,
        asked=unfit,
        step=step,
        mfu=step.mfu(config, fleet),
        run=run,
        price=time.price(run.total, fleet, question.price) if question.price else None,
        losses=losses,
        residuals=_residuals(store, config.model.kind),
        moe=_moe(config, cost, solved.tokens),
        data=data,
        repeats=_repeats(cost, available, solved.tokens, limited=question.available is not None),
        lr=Advice(config.train.lr, {band.source: band.lr for band in found if band.lr}),
        batch=Advice(config.train.batch_tokens, {band.source: band.batch_tokens for band in found}),
        warmup=_warmup(config, cost, time.steps_of(config)),
        extrapolated=tuple(hyperparameters.outside(*asked(cost, solved.tokens))),
        use=_use(question.inference, losses[0], chosen, solved.tokens),
    )
    return replace(plan, warnings=tuple(_warnings(plan, available, chosen)))


def _others(chosen: Law) -> list[Law]:
    """The laws that are shown beside the chosen one; a set that is known to mislead is not."""
    return [each for name, each in LAWS.items() if each is not chosen and name != "hoffmann-rounded"]


def _loss(law: Law, cost: Cost, tokens: int) -> Loss:
    params = params_of(cost, law)
    return Loss(
        law.name,
        law.source,
        law.counts,
        params,
        law.interval(lambda each: each.loss(params, tokens)),
        law.optimum(FLOPS_A_PARAMETER * params * tokens),
        law.tokens_for(params),
        tuple([law.note] if law.note else []) + tuple(law.outside(params, tokens)),
    )


def _moe(config: Config, cost: Cost, tokens: int) -> Moe | None:
    if config.model.moe is None:
        return None
    experts = expansion(config.model.moe)
    flops = FLOPS_A_PARAMETER * cost.active_mean * tokens
    gain, beyond = moe_gain(flops, experts), beyond_moe(cost, experts)
    if gain < 1 < experts:
        beyond.append(f"{flops:.2g} FLOP, so few that the law gains nothing by experts")
    return Moe(experts, gain, tuple(beyond))


def _residuals(store: Store, kind: str) -> Residuals | None:
    """Of any device: a loss does not depend on it."""
    seen = sorted(
        entry.figures["loss_residual"]
        for entry in store.entries
        if entry.kind == kind and "loss_residual" in entry.figures
    )
    return Residuals(len(seen), seen[0], seen[len(seen) // 2], seen[-1]) if seen else None


def _fit(config: Config, fleet: Fleet, store: Store) -> Fit:
    where = "cpu" if fleet.device.is_cpu else "cuda"
    needed, capacity = memory.memory(config, fleet.count, where), fleet.device.memory
    fits = remedies.fits(config, capacity, fleet.count, where)
    ways = [] if fits else remedies.remedies(config, capacity, fleet.count, where)
    ratios = store.figures("memory_ratio", fleet.device.name, config.model.kind)
    return Fit(
        parts=needed.parts,
        total=needed.total,
        capacity=capacity,
        fits=fits,
        largest_micro_batch=remedies.largest_micro_batch(config, capacity, fleet.count, where),
        # More processes of one machine's CPU share its memory.
        remedies=tuple(way for way in ways if not (fleet.device.is_cpu and "processes" in way)),
        corrected=_around(needed.total, ratios),
    )


def _remedied(solver: Solver, fit: Fit, store: Store) -> tuple[Question, Solved, Fit] | None:
    """The run with settings by which it fits, if some are enough that change how a model is trained, and not the model.

    A size that follows from a time may be another with them, and need more of them.
    """
    remedies: dict[str, str] = {}
    for _ in range(len(WAYS)):
        ways = (remedy.split() for remedy in fit.remedies)
        enough = next((way for way in ways if all(word.partition("=")[0] in WAYS for word in way)), None)
        if enough is None:
            return None
        remedies |= {word.partition("=")[0]: word for word in enough}
        question = replace(solver.question, remedies=tuple(remedies.values()))
        solved = replace(solver, question=question).solve()
        fit = _fit(solved.config, solver.fleet, store)
        if fit.fits:
            return question, solved, fit
    return None


def _around(value: float, ratios: list[float]) -> Interval | None:
    """A forecast times the ratios actual / forecast that were seen."""
    if not ratios:
        return None
    ordered = sorted(ratios)
    return Interval(value * ordered[0], value * ordered[len(ordered) // 2], value * ordered[-1])


def _repeats(cost: Cost, available: float | None, tokens: int, limited: bool) -> Repeats | None:
    """`limited`: it is said that there is no more text."""
    if not available:
        return None
    params, epochs = params_of(cost, repeated.LAW), tokens / available
    twice = repeated.next_best(params, available, tokens)
    more_data = not limited or available >= 2 * tokens
    return Repeats(
        epochs,
        repeated.effective_tokens(available, tokens),
        repeated.next_epoch_value(max(1.0, epochs)),
        repeated.loss(params, available, tokens),
        twice,
        more_data,
        twice.best(more_data),
    )


def _warmup(config: Config, cost: Cost, steps: int) -> Advice:
    said = hyperparameters.warmup(cost.active, config.train.batch_tokens, config.train.betas[1])
    return Advice(span(config.train.warmup, steps), {each.source: each.steps for each in said})


def _use(inference: float | None, loss: Loss, law: Law, tokens: int) -> Use | None:
    if inference is None:
        return None
    flops = overtraining.FLOPS_IN_USE * loss.params * inference
    return Use(inference, flops, overtraining.break_even(loss.params, tokens, inference, law))


def _warnings(plan: Plan, available: float | None, law: Law) -> list[str]:
    found: list[str] = []
    if not plan.memory.fits:
        found.append("it does not fit" + ("" if plan.memory.remedies else ", and no setting helps"))
    if plan.asked is not None:
        lossy = "; bf16 weights lose small updates" if "precision.mode=bf16_pure" in plan.question.remedies else ""
        found.append(f"as asked it does not fit: this is the plan with {' '.join(plan.question.remedies)}{lossy}")
    if plan.question.price and plan.fleet.here and plan.fleet.device.is_cpu:
        found.append(f"the price is taken for an hour of this machine, {plan.fleet}: name what is paid for with --gpus")
    if available:
        found += repeated.warnings(available, plan.tokens)
    if other := mismatch(law, plan.config):
        found.append(f"{other}: its losses and optima are not this model's; --law {DEFAULT}, or fit one to such runs")
    for name, advice in (("train.lr", plan.lr), ("train.batch_tokens", plan.batch)):
        if not advice.low / 2 <= advice.value <= 2 * advice.high:
            between = f"{advice.low:.2g} to {advice.high:.2g}"
            found.append(f"{name}={advice.value:g} is more than a factor of 2 outside of {between}")
    return found


def _plain(value: Any) -> Any:
    """Dataclasses and named tuples as dictionaries, tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
