"""What loss N parameters reach after D tokens: L = E + A/N^α + B/D^β, in nats a token.

The form is approach 3 of Hoffmann et al. 2022 (2203.15556). Its constants depend on the text, the tokenizer, the
architecture and on how parameters are counted: those of different sources do not mix, and a loss of one law is none
of another's. So each set carries its source, the count it means, what it was fitted to, and, where there are any,
draws of all five constants together: A and α, B and β go up and down as one, and errors taken apart would be wrong.

A `Law` takes parameters as it counts them (`params_of`), tokens, and FLOPs as 6·N·D.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lumina.config.schema.model import MoEConfig
from lumina.errors import UserError
from lumina.model.cost import Cost
from lumina.planner import own

Counts = Literal["total", "non_embedding", "active"]
Draw = tuple[float, float, float, float, float]  # E, A, B, α, β

CONSTANTS = ("E", "A", "B", "alpha", "beta")
FLOPS_A_PARAMETER = 6  # of a trained token: 2 forward, 4 backward
DEFAULT = "besiroglu"
OWN = "own"
RULE = 20  # tokens a parameter: what Chinchilla, 70B on 1.4T tokens, was trained with; a rule, no constant of nature


class Interval(NamedTuple):
    """A value with what it may be as well; whoever makes one says what it covers. Without draws all three are equal."""

    low: float
    mid: float
    high: float


class Optimum(NamedTuple):
    """Parameters and tokens of the least loss for a compute budget."""

    params: float
    tokens: float


class Span(NamedTuple):
    """The smallest and the largest model and number of tokens that a law was fitted to."""

    params: tuple[float, float]
    tokens: tuple[float, float]


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A/N^α + B/D^β, with its source.

    `counts` is the count of parameters it means, `draws` are tuples (E, A, B, α, β) of refits to resampled points,
    `span` is what it was fitted to, `note` what to know before using it, `traits` what its runs had in common, where
    that is known (`planner.traits`).
    """

    name: str
    source: str
    counts: Counts
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    draws: tuple[Draw, ...] = ()
    span: Span | None = None
    note: str = ""
    traits: tuple[tuple[str, str], ...] = ()

    def loss(self, params: float, tokens: float) -> float:
        """Nats a token of `params` parameters after `tokens` tokens, none read twice."""
        return self.E + self.A * math.pow(params, -self.alpha) + self.B * math.pow(tokens, -self.beta)

    def optimum(self, flops: float) -> Optimum:
        """The split of 6·N·D = `flops` with the least loss (Hoffmann et al. 2022, equation 4)."""
        pairs = flops / FLOPS_A_PARAMETER
        both = self.alpha + self.beta
        G = math.pow(self.alpha * self.A / (self.beta * self.B), 1 / both)
        return Optimum(G * math.pow(pairs, self.beta / both), math.pow(pairs, self.alpha / both) / G)

    def tokens_for(self, params: float) -> float:
        """The tokens with which `params` parameters are the optimum of their compute."""
        return math.pow(self.beta * self.B / (self.alpha * self.A) * math.pow(params, self.alpha), 1 / self.beta)

    def params_for(self, tokens: float) -> float:
        """The parameters for which `tokens` tokens are the optimum of their compute."""
        return math.pow(self.alpha * self.A / (self.beta * self.B) * math.pow(tokens, self.beta), 1 / self.alpha)

    def tokens_to(self, params: float, loss: float) -> float:
        """The tokens after which `params` parameters reach `loss`; inf if they never do."""
        left = loss - self.E - self.A * math.pow(params, -self.alpha)
        return math.pow(self.B / left, 1 / self.beta) if left > 0 else math.inf

    def flops_to(self, loss: float) -> float:
        """The compute whose optimum reaches `loss`; inf if none does."""
        if loss <= self.E:
            return math.inf
        one = self.loss(*self.optimum(FLOPS_A_PARAMETER)) - self.E  # above E the loss is a power of the compute
        exponent = self.alpha * self.beta / (self.alpha + self.beta)
        return FLOPS_A_PARAMETER * math.pow(one / (loss - self.E), 1 / exponent)

    def interval(self, f: Callable[[Law], float], level: float = 0.8) -> Interval:
        """`f` of this law, and between which values it lies for the middle `level` of the draws.

        This covers the constants, which other runs would have fitted otherwise. Not that the form may be wrong, above
        all outside of `span`, nor how one run differs from the next.
        """
        mid = f(self)
        if len(self.draws) < 2:
            return Interval(mid, mid, mid)
        values = [f(self._at(draw)) for draw in self.draws]
        cuts = statistics.quantiles(values, n=round(2 / (1 - level)), method="inclusive")
        return Interval(cuts[0], mid, cuts[-1])

    def _at(self, draw: Draw) -> Law:
        E, A, B, alpha, beta = draw
        return replace(self, E=E, A=A, B=B, alpha=alpha, beta=beta, draws=())

    def outside(self, params: float, tokens: float) -> list[str]:
        """A sentence for each of the two that lies outside of what the law was fitted to."""
        if self.span is None:
            return []
        sides = (("parameters", params, self.span.params), ("tokens", tokens, self.span.tokens))
        return [
            f"{value:.3g} {what} lie outside of {low:.3g} to {high:.3g}, to which the law {self.name} was fitted"
            for what, value, (low, high) in sides
            if not 0.95 * low <= value <= 1.05 * high
        ]


def law(name: str | None = None) -> Law:
    """The law of this name; None is the user's own, if one was fitted, and else the default.

    Raises `UserError` for a name that is not known, and if the user's own is asked for and damaged or not there.
    """
    if name is not None and name in LAWS:
        return LAWS[name]
    if name not in (None, OWN):
        known = ", ".join([*LAWS, OWN])
        raise UserError(f"{name}: no such scaling law", f"use one of {known}")
    saved = own.read()
    if saved is not None:
        return from_values(saved)
    if name == OWN:
        raise UserError("there is no scaling law of your own yet", "fit one: lumina fit-laws runs/*")
    return LAWS[DEFAULT]


def params_of(cost: Cost, law: Law) -> int:
    """The parameters of a model as `law` counts them.

    Laws know dense models. Of a sparse one counts what a token meets on average, so that 6·N·D is what it computes: a
    MoE of 1B active among 8B is taken for a dense model of 1B, below which it does not fall (`moe_gain`).
    """
    return round(
        {
            "total": cost.active_mean + cost.lookup,
            "active": cost.active_mean,
            "non_embedding": cost.active_mean - cost.embedding,
        }[law.counts]
    )


def by_rule(flops: float) -> Optimum:
    """The split of 6·N·D = `flops` at 20 tokens a parameter.

    That is a rule: what Chinchilla was trained with, near the optimum of the default law between 1e20 and 1e24 FLOPs,
    and of no law everywhere.
    """
    params = math.sqrt(flops / (FLOPS_A_PARAMETER * RULE))
    return Optimum(params, RULE * params)


# -- mixtures of experts ---------------------------------------------------------------------------------------------


def expansion(moe: MoEConfig) -> float:
    """The joint law's E of a mixture: parameters of its experts over those of them that a token meets.

    The law compares models of equal active size and calls a dense one E = 1. A mixture that takes all of its experts
    is dense, whatever their number; shared ones are always taken.
    """
    return (moe.experts + moe.shared) / (moe.top_k + moe.shared)


def moe_law(experts: float) -> Law:
    """The joint law of dense and MoE models (Ludziejewski et al. 2025, 2502.05172, table 3) at this `expansion`.

    N counts active parameters, 1 is dense. Fitted to an E of up to 32, 2.7B active and 5B total parameters, at a
    constant learning rate. Its dense side asks for 5.6 tokens a parameter where Chinchilla's laws ask for 20: it is
    for what a MoE gains over a dense model only (`moe_gain`).
    """
    if experts < 1:
        raise UserError(f"{experts:g} experts: a model has at least one", "1 is a dense model")
    start, most = 2.0732, 290.4521
    effective = 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)
    log = math.log(effective)
    return Law(
        "ludziejewski",
        "Ludziejewski et al. 2025 (2502.05172), table 3",
        "active",
        E=1.3637,
        A=35.91 * effective**-0.2285,
        B=35.98 * effective**0.5529,
        alpha=0.1889 - 0.0098 * log,
        beta=0.1775 + 0.0259 * log,
        note="for what a MoE gains over a dense model, not for losses",
    )


def moe_loss(active: float, tokens: float, experts: float) -> float:
    """Nats a token by the joint MoE law: to compare numbers of experts, not with another law's losses."""
    return moe_law(experts).loss(active, tokens)


def moe_gain(flops: float, experts: float) -> float:
    """How many times the compute a dense model needs for the loss of a MoE, both at their optimum, by the joint law.

    It counts FLOPs alone: not that a MoE makes less of a device's FLOPs, nor the memory of its experts.
    """
    moe = moe_law(experts)
    return moe_law(1).flops_to(moe.loss(*moe.optimum(flops))) / flops


def beyond_moe(cost: Cost, experts: float) -> list[str]:
    """What of a mixture is larger than all that the joint law was fitted to."""
    sizes = (
        ("experts for each one taken", experts, 32),
        ("active", cost.active_mean, 2.7e9),
        ("in all", cost.total, 5e9),
    )
    return [f"{value:.3g} {what}, beyond {most:.2g}" for what, value, most in sizes if value > most]


# -- the sets ---------------------------------------------------------------------------------------------------------


def from_values(values: dict[str, Any]) -> Law:
    """The inverse of `to_values`. Raises `UserError` unless all of it is there and a law."""
    try:
        span = values["span"]
        found = Law(
            str(values["name"]),
            str(values["source"]),
            values["counts"],
            *_draw([values[key] for key in CONSTANTS]),
            draws=tuple(map(_draw, values["draws"])),
            span=span and Span(_pair(span["params"]), _pair(span["tokens"])),
            note=str(values["note"]),
            traits=tuple((str(name), str(value)) for name, value in values.get("traits", ())),
        )
        if found.counts not in ("total", "non_embedding", "active"):
            raise ValueError(f"counts {found.counts!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{own.path()}: damaged: {type(error).__name__}: {error}", own.FIX) from None
    return found


def to_values(law: Law) -> dict[str, Any]:
    """The law as plain JSON values."""
    return asdict(law) | {"span": law.span and law.span._asdict()}


def _draw(values: Sequence[Any]) -> Draw:
    """E, A, B, α, β; raises `ValueError` unless all are finite and positive; E may be 0."""
    E, A, B, alpha, beta = map(float, values)
    if not (0 <= E < math.inf and all(0 < value < math.inf for value in (A, B, alpha, beta))):
        raise ValueError(f"no law has the constants {values}")
    return E, A, B, alpha, beta


def _pair(values: Sequence[Any]) -> tuple[float, float]:
    low, high = map(float, values)
    return low, high


def _draws(name: str) -> tuple[Draw, ...]:
    """Draws that are shipped: lines of E, A, B, α, β below a header; what begins with # says where they come from."""
    with Path(__file__).with_name(name).open(encoding="utf-8") as file:
        rows = list(csv.reader(line for line in file if not line.startswith("#")))
    return tuple(map(_draw, rows[1:]))


LAWS = {
    law.name: law
    for law in (
        Law(
            "besiroglu",
            "Besiroglu et al. 2024 (2404.10102): Hoffmann's runs, read off a figure, fitted again",
            "total",
            E=1.8172,
            A=482.01,
            B=2085.43,
            alpha=0.3478,
            beta=0.3658,
            draws=_draws("besiroglu.csv"),
            span=Span((5.73e7, 1.62e10), (8.19e8, 3.18e11)),  # of the 240 points that it was fitted to
        ),
        Law(
            "hoffmann",
            "Hoffmann et al. 2022 (2203.15556), approach 3, digits of its TeX source",
            "total",
            E=1.6934,
            A=406.4,
            B=410.7,
            alpha=0.33917084,
            beta=0.2849083,
            note="its fit had not converged (Besiroglu et al. 2024)",
        ),
        Law(
            "hoffmann-rounded",
            "Hoffmann et al. 2022 (2203.15556), approach 3, as printed in its body",
            "total",
            E=1.69,
            A=406.4,
            B=410.7,
            alpha=0.34,
            beta=0.28,
            note="exponents of two digits are too few: at Chinchilla's own 5.76e23 FLOPs they ask for 93 tokens a "
            "parameter, 32B on 3T tokens, where 70B were trained on 1.4T",
        ),
        Law(
            "muennighoff",
            "Muennighoff et al. 2023 (2305.16264), C4, one exponent for both",
            "total",
            E=1.8691,
            A=520.8,
            B=1487.7,
            alpha=0.35266,
            beta=0.35266,
            note="the law that repeated data is judged by",
        ),
    )
}
