"""A plan as a page: a line for each thing that is asked before a run, and below it where the number is from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from lumina.telemetry.figures import count, duration, size

if TYPE_CHECKING:
    from lumina.planner.laws import Interval
    from lumina.planner.plan import Advice, Loss, Plan

COUNTS = {"total": "with the embedding", "non_embedding": "without embedding and head", "active": "without the lookup"}
BOUNDS = {
    "arithmetic": "bound by arithmetic",
    "memory": "bound by memory traffic",
    "exchange": "bound by what the devices exchange",
    "launches": "bound by launching operations one by one",
    "measured": "measured",
}
BETTER = {"params": "more parameters", "data": "more data", "epochs": "more epochs"}


def lines(plan: Plan) -> list[str]:
    """The page. Intervals are written `middle (low to high)`."""
    sections = {
        "model": _model(plan),
        "train": _train(plan),
        "memory": _memory(plan),
        "time": _time(plan),
        "cost": _cost(plan),
        "loss": _loss(plan),
        "ratio": _ratio(plan),
        "data": _data(plan),
        "lr": _advice("train.lr", plan.lr, "%.2g"),
        "batch": _advice("train.batch_tokens", plan.batch, ""),
        "warmup": _warmup(plan),
        "use": _use(plan),
    }
    page = [f"{'why' if number == 0 else '':7}{reason}" for number, reason in enumerate(plan.solved.reasons)]
    for name, said in sections.items():
        page += [f"{name if number == 0 else '':7}{line}" for number, line in enumerate(said)]
    return page + [f"! {warning}" for warning in plan.warnings]


def _model(plan: Plan) -> Iterator[str]:
    cost, kind = plan.cost, plan.config.model.kind
    mean = f", {count(cost.active_mean)} on average" if cost.active_mean != cost.active else ""
    name = plan.resolved.request["preset"]
    yield (
        f"{name}, {kind}: {count(cost.total)} parameters = {count(cost.non_embedding)} + "
        f"{count(cost.total - cost.non_embedding)} of embedding and head; {count(cost.active)} active a token{mean}"
    )
    yield (
        f"{_flop(cost.flops_per_token)} a trained token at {plan.config.model.seq_len} tokens of context, "
        f"{size(cost.kv_bytes_per_token)} of KV cache a token in fp32"
    )
    if moe := plan.moe:
        yield (
            f"{moe.expansion:.3g} experts for each one taken: a dense model needs {moe.gain:.2g} times the FLOPs "
            "for the same loss (Ludziejewski et al. 2025)"
        )
        if moe.extrapolated:
            yield f"that is extrapolated: {'; '.join(moe.extrapolated)}"


def _train(plan: Plan) -> Iterator[str]:
    batch = plan.config.train.batch_tokens
    yield (
        f"{count(plan.tokens)} tokens = {plan.steps:,} steps of {count(batch)}; "
        f"{plan.flops:.3g} FLOP with attention, 6ND {plan.flops_6nd:.3g}"
    )


def _memory(plan: Plan) -> Iterator[str]:
    fit, fleet = plan.memory, plan.fleet
    whose = "" if fleet.count == 1 else ", each"
    verdict = "fits" if fit.fits else "does not fit"
    beside = f", with {' '.join(plan.question.remedies)}; as asked {size(plan.asked.total)}" if plan.asked else ""
    yield f"{size(fit.total)} of {size(fit.capacity)} of {fleet}{whose}: {verdict}{beside}"
    parts = sorted(fit.parts.items(), key=lambda part: -part[1])
    yield ", ".join(f"{name} {size(value)}{_stored(name, plan)}" for name, value in parts if value)
    largest = fit.largest_micro_batch
    chosen = plan.config.train.micro_batch
    room = "not even one sequence at a time fits" if largest is None else f"at most {largest} fit"
    yield f"train.micro_batch {chosen} {'sequence' if chosen == 1 else 'sequences'} at once; {room}"
    if fit.corrected:
        yield f"{_interval(fit.corrected, size)} by what finished runs took here, over their forecast"
    others = [f"or: {remedy}" for remedy in plan.asked.remedies[1:]] if plan.asked else []
    yield from others or [f"to fit: {remedy}" for remedy in fit.remedies]


def _stored(part: str, plan: Plan) -> str:
    """In which format whole weights are put together: that in which they are kept, whatever products take."""
    return "" if part != "gathered" else f" in {'bf16' if plan.config.precision.mode == 'bf16_pure' else 'fp32'}"


def _time(plan: Plan) -> Iterator[str]:
    step, run = plan.step, plan.run
    yield (
        f"{_interval(run.total, _long)} on {plan.fleet}; a step {_interval(step.seconds, _seconds)}, "
        f"{BOUNDS[step.bound]}, {plan.config.train.batch_tokens / step.seconds.mid:,.0f} tok/s"
    )
    parts = [f"{name} {_long(value)}" for name, value in run.parts.items() if value >= 0.5]
    if run.uncounted:
        parts.append(f"not counted: {', '.join(run.uncounted)}")
    yield "; ".join(parts)
    yield f"{step.source}; MFU {_interval(plan.mfu, '{:.1%}'.format)}"
    if not step.measured and plan.fleet.here:
        yield "--measure times 20 real steps here instead"


def _cost(plan: Plan) -> Iterator[str]:
    if plan.price is not None:
        each = f"{plan.question.price:g} an hour of a device"
        yield f"{_interval(plan.price, '{:,.2f}'.format)} at {each}"


def _loss(plan: Plan) -> Iterator[str]:
    first, *others = plan.losses
    covers = "covers 80 % of its refits" if first.loss.low < first.loss.high else "it has no interval"
    counted = f"for {count(first.params)} parameters, {COUNTS[first.counts]}"
    yield f"{_nats(plan, first)} a token of the text of {first.law}, {covers}; {counted}"
    yield from (f"{first.law}: {note}" for note in first.notes)
    yield "; ".join(f"{loss.law} {_nats(plan, loss)}" for loss in others)
    if seen := plan.residuals:
        runs = "one finished run" if seen.runs == 1 else f"{seen.runs} finished runs"
        between = "" if seen.runs == 1 else f" ({seen.low:+.2f} to {seen.high:+.2f})"
        yield f"{runs} of this kind ended {seen.mid:+.2f} nats{between} beside the law's forecast, on your text"


def _nats(plan: Plan, loss: Loss) -> str:
    """A loss, unless it is more than that of guessing among all ids: then the law says nothing of so small a run."""
    guessing = math.log(plan.config.model.vocab)
    if loss.loss.mid > guessing:
        return f"nothing ({loss.loss.mid:.1f} nats, and guessing has {guessing:.1f})"
    return f"{_interval(loss.loss, '{:.3f}'.format)} nats"


def _ratio(plan: Plan) -> Iterator[str]:
    loss = plan.loss
    best = loss.optimum
    yield (
        f"{plan.tokens / loss.params:.3g} tokens a parameter; for this compute {loss.law} has its optimum at "
        f"{count(best.params)} on {count(best.tokens)} ({best.tokens / best.params:.3g}), for these parameters at "
        f"{count(loss.tokens_for)} ({loss.tokens_for / loss.params:.3g})"
    )
    yield "20 tokens a parameter are what Chinchilla was trained with: a rule, no constant"


def _data(plan: Plan) -> Iterator[str]:
    if plan.repeats is None or plan.data is None:
        sample = f"; the embedded sample has {count(plan.data.tokens)} tokens" if plan.data else ""
        yield f"no data is named, so nothing is known of repeats: --data PATH or --tokens-available 20B{sample}"
        return
    repeats = plan.repeats
    yield (
        f"{count(plan.data.tokens)} tokens to train on ({plan.data.how}): {repeats.epochs:.3g} epochs, worth "
        f"{count(repeats.effective)} fresh tokens; one of the next epoch {repeats.next_epoch:.0%} of a fresh one"
    )
    losses = ", ".join(f"{BETTER[name]} {loss:.3f}" for name, loss in repeats.twice._asdict().items())
    yield (
        f"twice the compute on {losses} nats of C4, now {repeats.loss:.3f}: {BETTER[repeats.better]} make most"
        f"{'' if repeats.more_data else ' of what can be had'} (Muennighoff et al. 2023)"
    )


def _advice(key: str, advice: Advice, form: str) -> Iterator[str]:
    def shown(value: float) -> str:
        return form % value if form else count(value)

    where = "inside" if advice.inside else "below" if advice.value < advice.low else "above"
    yield (
        f"{key} {shown(advice.value)}, {where} {shown(advice.low)} to {shown(advice.high)}: "
        f"{_sources(advice.sources, shown)}"
    )


def _warmup(plan: Plan) -> Iterator[str]:
    yield f"{plan.warmup.value:,.0f} steps; {_sources(plan.warmup.sources, '{:,.0f}'.format)}"
    yield from plan.extrapolated


def _use(plan: Plan) -> Iterator[str]:
    use = plan.use
    if use is None:
        return
    yield f"{count(use.tokens)} tokens read and written later take {use.flops:.3g} FLOP, training {plan.flops_6nd:.3g}"
    if use.smaller is None:
        yield "no smaller model of the same loss is cheaper in both together (Sardana et al. 2023)"
        return
    smaller = use.smaller
    yield (
        f"{count(smaller.params)} parameters trained on {count(smaller.tokens)} reach the same loss and take "
        f"{smaller.training + smaller.use:.3g} FLOP in all, not {plan.flops_6nd + use.flops:.3g}; that pays from "
        f"{count(smaller.pays_from)} tokens on (Sardana et al. 2023)"
    )


def _sources(sources: Mapping[str, float], shown: object) -> str:
    assert callable(shown)
    return ", ".join(f"{source} {shown(value)}" for source, value in sources.items())


def _interval(value: Interval, shown: object) -> str:
    assert callable(shown)
    low, mid, high = (shown(edge) for edge in value)
    return mid if low == high else f"{mid} ({low} to {high})"


def _flop(value: float) -> str:
    """14.7 MFLOP, 6.47 GFLOP."""
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TFLOP"


def _long(seconds: float) -> str:
    """A run's time: 8m20s, 35h40m, 35.7 days, 12 years."""
    days = seconds / 86400
    if days < 3:
        return duration(seconds)
    return f"{days:.3g} days" if days < 1000 else f"{days / 365.25:.3g} years"


def _seconds(value: float) -> str:
    """A step's time: 33ms, 1.69s, 2m10s."""
    if value < 1:
        return f"{1000 * value:.3g}ms"
    return f"{value:.3g}s" if value < 100 else _long(value)
