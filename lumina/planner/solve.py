"""From what is known to a configuration and a number of tokens: every other quantity follows, with its reason."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lumina.config import yaml12
from lumina.config.names import known_keys
from lumina.config.resolve import Resolved, resolve
from lumina.config.schema.config import Config
from lumina.config.schema.train import LENGTHS
from lumina.errors import UserError
from lumina.model.cost import Cost, count
from lumina.planner import choices, time
from lumina.planner.hardware import Fleet
from lumina.planner.hyperparameters import Band, bands
from lumina.planner.laws import FLOPS_A_PARAMETER, Law, params_of
from lumina.planner.question import COMPUTE, Question, key_of
from lumina.planner.repeated import best_split
from lumina.planner.shape import Shape, Size, shape_of

LEAST_STEPS = 20  # of a run: the warm-up of 5 % that presets have is one of them
TURNS = 6  # of finding a size whose steps take the time there is; the size settles after two or three
CLOSE = 0.01
FITTING = 1.1  # a size that was found for a time or for FLOPs may take so much more of them, for sizes have steps
Timer = Callable[[Config], time.StepTime]
Fixed = Callable[[Config], Mapping[str, float]]


@dataclass(frozen=True)
class Solved:
    """A configuration that answers the question. `changes` are the keys over its preset that a file has to hold, with
    the reason of each; `tokens` are whole steps."""

    resolved: Resolved
    config: Config  # settled for the fleet
    tokens: int
    changes: Mapping[str, tuple[Any, str]]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Solver:
    """`step` forecasts a settled configuration's steps, `fixed` knows what was measured of it."""

    question: Question
    fleet: Fleet
    law: Law
    step: Timer
    fixed: Fixed

    def solve(self) -> Solved:
        """Raises `UserError` if no configuration answers the question."""
        solved = self._named() if self.question.source is not None else self._sized()
        self._require_steps(solved)
        return solved

    def _require_steps(self, solved: Solved) -> None:
        """Raises `UserError` if the time or the FLOPs that there are hold no run."""
        q, config = self.question, solved.config
        seconds, batch = self._seconds or solved.resolved.config.train.time, config.train.batch_tokens
        needed = max(LEAST_STEPS, time.steps_of(config))
        if seconds is not None:
            step, fixed = self.step(config).seconds.mid, self.fixed(config)
            held = time.steps_in(config, step, seconds, fixed)
            there, takes = time.lasting(seconds), time.lasting(step)
            more = f"{time.lasting(1.01 * needed * step / (1 - time.DEADLINE_RESERVE))}, or more devices: --gpus 8xH100"
        elif q.compute is not None:
            flops = count(config.model).flops_per_token * batch
            held, there, takes = round(q.compute / flops), f"{q.compute:.3g} FLOP", f"{flops:.3g} FLOP"
            more = f"{needed * flops:.2g} FLOP"
        else:
            return
        if needed <= max(LEAST_STEPS, FITTING * held) and held >= LEAST_STEPS:
            return
        steps, preset = f"{held} step{'s' * (held > 1)}" if held else "not one step", solved.resolved.request["preset"]
        hold = "holds" if there.startswith("1 ") else "hold"
        raise UserError(
            f"{there} {hold} {steps} of {preset} on {self.fleet}: one, of {batch:,} tokens, takes {takes}"
            + (f", and {needed:,} are needed" if held else ""),
            fix="; or ".join([*self._smaller(), f"give it {more}"]),
        )

    def _smaller(self) -> list[str]:
        """Instead of a named model that is too large for what there is, the one that is not."""
        q = self.question
        how = [f"--{name}" for name in COMPUTE if getattr(q, name) is not None]
        if q.source is None or not how:
            return []
        settings = tuple(setting for setting in q.settings if not setting.startswith("model."))
        try:
            found = replace(self, question=replace(q, source=None, settings=settings)).solve()
        except UserError:
            return []
        size = f"{count(found.config.model).active:.3g} active parameters, {found.tokens:.3g} tokens"
        return [f"leave {q.source} out: {how[0]} alone finds what fits ({size})"]

    # -- a model that has a name -------------------------------------------------------------------------------------

    def _named(self) -> Solved:
        q = self.question
        resolved = _resolved(q.source, self._settings())
        tokens, why = self._tokens_of(resolved.config)
        changes = {key: (value, q.why(key)) for key, value in resolved.request.items() if key != "preset"}
        if why and "train.time" not in changes:
            changes |= self._length(tokens, why)
        return self._built(str(resolved.request["preset"]), tokens, changes, (why,) if why else ())

    def _settings(self) -> tuple[str, ...]:
        return self.question.every_setting

    def _tokens_of(self, config: Config) -> tuple[int, str]:
        """The tokens of a named model, and why, where the configuration does not say."""
        q, batch = self.question, config.train.batch_tokens
        if q.tokens is not None:
            return round(q.tokens), "as asked"
        if q.compute is not None:
            flops = count(config.model).flops_per_token
            return _steps(q.compute / flops, batch), f"{q.compute:.3g} FLOP at {flops:.3g} a token"
        seconds = self._seconds or config.train.time
        if seconds is not None:
            return self._tokens_in(config, seconds), self._in_time(seconds)
        if isinstance(config.train.tokens, str):
            best = self.law.tokens_for(params_of(count(config.model), self.law))
            return _steps(best, batch), f"compute-optimal by {self.law.name}"
        return (config.train.tokens or (config.train.steps or 0) * batch), ""

    @property
    def _seconds(self) -> float | None:
        q = self.question
        if q.budget is not None and q.price is not None:
            return 3600 * q.budget / q.price / self.fleet.count
        return q.time

    def _length(self, tokens: float, why: str) -> dict[str, tuple[Any, str]]:
        """What says how long to train: where a time was asked for, that; the tokens in it are a forecast."""
        if self._seconds is None or self.question.tokens is not None:
            return {"train.tokens": (round(tokens), why)}
        return {"train.time": (round(self._seconds), f"about {tokens:.3g} tokens: {why}")}

    def _in_time(self, seconds: float) -> str:
        bought = (
            f" that {self.question.budget:g} buy at {self.question.price:g} an hour" if self.question.budget else ""
        )
        return f"what {time.lasting(seconds)}{bought} hold on {self.fleet}"

    def _tokens_in(self, config: Config, seconds: float) -> int:
        trial = self._settle(config, 1)
        step = self.step(trial)
        steps = time.steps_in(trial, step.seconds.mid, seconds, self.fixed(trial))
        return config.train.batch_tokens * max(1, steps)  # for a size may be tried that is none; `solve` refuses it

    def _settle(self, config: Config, steps: int) -> Config:
        train = config.train.model_copy(update={"steps": steps, "tokens": None, "time": None})
        return choices.settled(config.model_copy(update={"train": train}), self.fleet)

    # -- a model of a size that follows ------------------------------------------------------------------------------

    def _sized(self) -> Solved:
        q = self.question
        self._require_free(LENGTHS)
        if q.params is not None:
            shape = self._shape(q.params, lambda cost: cost.active)
            reasons = [shape.why(q.params, "active parameters")]
            tokens, why = self._tokens_for(shape)
        elif self._seconds is not None:
            shape, tokens, reasons = self._fitting(self._seconds)
            why = self._in_time(self._seconds) if q.tokens is None else "as asked"
        else:
            shape, tokens, reasons, why = self._counted()
        self._require_free(shape.changes)
        own = self._own(shape)
        changes = {key: (value, "the preset's proportions") for key, value in shape.changes.items()}
        changes |= self._hyperparameters(shape, tokens) | {key: (value, q.why(key)) for key, value in own.items()}
        whole = _steps(tokens, self._batch(shape, tokens))
        changes |= self._length(whole, why)
        return self._built(shape.preset, whole, changes, tuple(reasons))

    def _require_free(self, keys: Iterable[str]) -> None:
        """Raises `UserError` if a setting says what the question is to find."""
        given = {key_of(setting) for setting in self.question.settings}
        if both := [key for key in keys if key in given]:
            asked = ", ".join(f"--{name}" for name in ("params", "tokens", *COMPUTE) if getattr(self.question, name))
            raise UserError(f"{', '.join(both)}: follows from {asked}", fix="leave it out, or name a preset and set it")

    def _own(self, shape: Shape) -> dict[str, Any]:
        """The user's own settings, read."""
        request = _resolved(shape.preset, self._settings()).request
        return {key: value for key, value in request.items() if key != "preset"}

    def _shape(self, wanted: float, size: Size) -> Shape:
        return shape_of(wanted, size, self._settings())

    def _as_counted(self, cost: Cost) -> float:
        return params_of(cost, self.law)

    def _tokens_for(self, shape: Shape) -> tuple[float, str]:
        """The tokens of a model whose size was asked for."""
        q, cost = self.question, count(shape.model)
        if q.tokens is not None:
            return q.tokens, "as asked"
        if q.compute is not None:
            return q.compute / cost.flops_per_token, f"{q.compute:.3g} FLOP at {cost.flops_per_token:.3g} a token"
        if self._seconds is not None:
            read = self.law.tokens_for(self._as_counted(cost))
            for _ in range(TURNS):  # more tokens are read in larger batches, which are faster
                read, before = self._tokens_in(self._trial(shape, read), self._seconds), read
                if abs(math.log(read / before)) < CLOSE:
                    break
            return read, self._in_time(self._seconds)
        return self.law.tokens_for(self._as_counted(cost)), f"compute-optimal by {self.law.name}"

    def _counted(self) -> tuple[Shape, float, list[str], str]:
        """Where tokens or FLOPs say how large the model is."""
        q = self.question
        if q.compute is not None and q.tokens is not None:
            wanted = q.compute / (FLOPS_A_PARAMETER * q.tokens)
            shape = self._shape(wanted, lambda cost: cost.flops_per_token / FLOPS_A_PARAMETER)
            return shape, q.tokens, [shape.why(wanted, "parameters' worth of FLOPs a token")], "as asked"
        if q.tokens is not None:
            wanted = self.law.params_for(q.tokens)
            shape = self._shape(wanted, self._as_counted)
            return shape, q.tokens, [self._optimal(), shape.why(wanted, "parameters")], "as asked"
        assert q.compute is not None  # the question is determined
        wanted, reasons = self._params_for(q.compute)
        shape = self._shape(wanted, self._as_counted)
        flops = count(shape.model).flops_per_token
        why = f"{q.compute:.3g} FLOP at {flops:.3g} a token"
        return shape, q.compute / flops, [*reasons, shape.why(wanted, "parameters")], why

    def _params_for(self, compute: float) -> tuple[float, list[str]]:
        """Parameters, as the law counts them, for a compute budget and the text there is."""
        best, available = self.law.optimum(compute), self.question.available
        if available is None or best.tokens <= available:
            return best.params, [self._optimal()]
        split = best_split(compute, available)
        told = (
            f"the optimum of {self.law.name} reads {best.tokens:.3g} tokens, more than the {available:.3g} there are: "
            f"split by Muennighoff et al. 2023, {split.epochs:.2g} epochs"
        )
        return split.params, [told]

    def _optimal(self) -> str:
        return f"parameters and tokens as {self.law.name} finds them optimal"

    def _fitting(self, seconds: float) -> tuple[Shape, float, list[str]]:
        """The model that is optimal for what the devices do in so many seconds, or that reads all tokens asked for."""
        tokens = self.question.tokens
        wanted, reasons = self._first_guess(seconds), [self._optimal()] if tokens is None else []
        read = tokens or self.law.tokens_for(wanted)
        for _ in range(TURNS):
            shape = self._shape(wanted, self._as_counted)
            config = self._trial(shape, read)
            if tokens is None:
                read = self._tokens_in(config, seconds)
                better, reasons = self._params_for(read * count(shape.model).flops_per_token)
            else:
                better = wanted * self._tokens_in(config, seconds) / tokens
            if abs(math.log(better / wanted)) < CLOSE:
                break
            wanted = better
        return shape, read, [*reasons, shape.why(wanted, "parameters")]

    def _first_guess(self, seconds: float) -> float:
        """Parameters at half of the devices' rate."""
        rate = max(self.fleet.device.peak.values()) * self.fleet.count / 2
        if self.question.tokens is not None:
            return max(1e5, seconds * rate / (FLOPS_A_PARAMETER * self.question.tokens))
        return max(1e5, self.law.optimum(seconds * rate).params)

    def _trial(self, shape: Shape, tokens: float) -> Config:
        """The shape's configuration, with the batch that so many tokens would be read in."""
        base = _resolved(shape.preset, self._settings()).config
        train = base.train.model_copy(update={"batch_tokens": self._batch(shape, tokens)})
        return base.model_copy(update={"model": shape.model, "train": train})

    def _batch(self, shape: Shape, tokens: float) -> int:
        own, found = self._own(shape), self._hyperparameters(shape, tokens)
        return int(own.get("train.batch_tokens", found["train.batch_tokens"][0]))

    def _hyperparameters(self, shape: Shape, tokens: float) -> dict[str, tuple[Any, str]]:
        """Batch and learning rate from the middle of what the laws say; whole sequences for every device."""
        found = bands(*asked(count(shape.model), tokens))
        batch = _middle([band.batch_tokens for band in found])
        least = shape.model.seq_len * self.fleet.count
        rounded = least * 2 ** max(0, round(math.log2(min(batch, tokens) / least)))
        lr = _middle([band.lr for band in found if band.lr])
        return {
            "train.batch_tokens": (rounded, f"{_said(found, 'batch_tokens')}, to whole sequences of each device"),
            "train.lr": (float(f"{lr:.2g}"), f"{_said(found, 'lr')}; for AdamW"),
        }

    def _built(
        self, preset: str, tokens: float, changes: dict[str, tuple[Any, str]], reasons: tuple[str, ...]
    ) -> Solved:
        resolved = resolve(preset, {key: value for key, (value, _) in changes.items()})
        batch = resolved.config.train.batch_tokens
        steps = resolved.config.train.steps or _steps(tokens, batch) // batch
        return Solved(resolved, self._settle(resolved.config, steps), steps * batch, changes, reasons)


def asked(cost: Cost, tokens: float) -> tuple[float, float, float]:
    """What laws of hyperparameters are asked: parameters without embedding and head, of which a token meets the active,
    tokens, FLOPs."""
    return max(1, cost.active - cost.embedding), tokens, cost.flops_per_token * tokens


def as_yaml(solved: Solved, command: str) -> str:
    """A file that `lumina train` takes: the preset it extends and what differs, each with its reason."""
    lines = [f"# {command}", f"extends: {solved.resolved.request['preset']}"]
    above: list[str] = []
    for key, (value, why) in sorted(solved.changes.items(), key=lambda item: _order(item[0])):
        *sections, name = key.split(".")
        for depth, section in enumerate(sections):
            if above[: depth + 1] != sections[: depth + 1]:
                lines.append(f"{'  ' * depth}{section}:")
        above = sections
        lines.append(f"{'  ' * len(sections)}{name}: {yaml12.dump_value(value)}  # {why}")
    return "\n".join(lines) + "\n"


@functools.cache
def _resolved(source: str | None, settings: tuple[str, ...]) -> Resolved:
    return resolve(source, settings)


@functools.cache
def _keys() -> dict[str, int]:
    return {key: number for number, key in enumerate(known_keys())}


def _order(key: str) -> tuple[str, int]:
    """Sections stay together, a section's own keys before those of the sections inside it."""
    return key.rpartition(".")[0], _keys()[key]


def _steps(tokens: float, batch: int) -> int:
    """So many tokens as whole steps, at least one."""
    if not tokens < 10**18:
        raise UserError(f"{tokens:.3g} tokens are more than anybody has", fix="ask for less")
    return max(1, round(tokens / batch)) * batch


def _middle(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _said(found: list[Band], what: str) -> str:
    """`StepLaw 9.9e-4, DeepSeek LLM 9.6e-4`."""
    values = ((band.source, getattr(band, what)) for band in found)
    return ", ".join(f"{source} {value:.2g}" for source, value in values if value is not None)
