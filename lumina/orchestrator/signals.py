"""What the detectors look at: the last observation and look, and bounded windows of those before.

Everything is plain values, so that it is part of a checkpoint and comes back to the bit: a run that goes on judges as
it would have judged. Nothing here depends on a clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from lumina.config.phases import phases
from lumina.config.schema.config import Config
from lumina.config.units import span
from lumina.orchestrator import windows
from lumina.orchestrator.protocol import Look, Observation
from lumina.orchestrator.robust import Baseline, median
from lumina.orchestrator.windows import Contents, Level, Loads, Pace, Usual

KEPT = 256  # steps of plain windows: divergence is heard 112 after it began, and is held against what was before
LOOKS = 32
FORECASTS = 8
BROKEN = 32
LEAST_SCALE = 1.0  # of fp16: gradients that overflow without any scale are not the scale's
SETTLE = 100  # steps after a planned change in which only hard rules hold: it is the window of the baselines


class Facts(NamedTuple):
    """What of the plan decides how signals are read."""

    vocab: int
    batch_tokens: int
    beta2: float = 0.95
    top_k: int = 0  # 0: no experts
    bias_rate: float = 0.0
    routed: float = 1.0  # share of the tokens that meet every expert layer, at least
    capacity: float | None = None  # of depth routing
    settles: int = 0  # steps until that is the capacity
    steps: int = 0  # planned
    budget: float = 0.0  # of trials, over the planned compute
    decay: int = 0  # first step of the last decay; 0 without
    exact: bool = True  # the same step comes to the same bits
    paced: int = 0  # last step of a curriculum: until then batches become harder
    copies: bool = True  # memory holds copies of the state
    adopted: bool = False  # it began with the weights of another run, which may have decayed

    @classmethod
    def of(cls, config: Config) -> Facts:
        moe, mod, steps = config.model.moe, config.model.mod, config.train.steps or 0
        last = steps - span(phases(config.train, config.data)[-1].at, steps)
        decay = span(config.train.decay, last) if config.train.schedule == "wsd" else 0
        return cls(
            vocab=config.model.vocab,
            batch_tokens=config.train.batch_tokens,
            beta2=config.train.betas[1],
            top_k=moe.top_k if moe else 0,
            bias_rate=moe.bias_rate if moe else 0.0,
            routed=mod.capacity if mod else 1.0,
            capacity=mod.capacity if mod else None,
            settles=span(mod.anneal, steps) if mod else 0,
            steps=steps,
            decay=steps - decay + 1 if decay else 0,
            budget=config.orchestrator.trial.budget,
            exact=config.parallel.device == "cpu" or config.train.deterministic,
            paced=span(config.data.curriculum.until, steps),
            copies=config.orchestrator.snapshot_every != 0,
            adopted=bool(config.train.init_from),
        )

    @property
    def uniform(self) -> float:
        """Nats a token that a uniform guess costs."""
        return math.log(self.vocab)

    @property
    def assignments(self) -> float:
        """Of tokens to experts, a step and layer, at least."""
        return self.batch_tokens * self.top_k * self.routed


class Deviation(NamedTuple):
    """What a `forecast` event says of the newest losses: nats above what was expected, in standard deviations `z`."""

    step: int
    nats: float
    z: float
    lr: float  # that acted then


class Judged(NamedTuple):
    """A step's robust deviations: None where too little was known."""

    loss: float | None
    grad: float | None


NAMES = ("loss", "grad_norm", "lr", "update_ratio", "adam_rms", "log_z", "clipped", "agreement")


@dataclass
class Signals:
    """Of one run; `observe`, `looked` and `forecast` feed it."""

    facts: Facts
    seen: Observation | None = None
    look: Look | None = None
    loss: Baseline = field(default_factory=Baseline)
    grad: Baseline = field(default_factory=Baseline)
    judged: list[Judged] = field(default_factory=list)
    series: dict[str, list[float | None]] = field(default_factory=lambda: {name: [] for name in NAMES})
    refused: list[int] = field(default_factory=list)  # steps that the guard did not take, or whose loss is not finite
    level: Level = field(default_factory=Level)
    pace: Pace = field(default_factory=Pace)
    push: Usual = field(default_factory=Usual)  # gradient norm of the routers
    contents: Contents = field(default_factory=Contents)
    loads: Loads = field(default_factory=Loads)
    taken: list[list[float]] = field(default_factory=list)  # realised depth capacity, each step's layers
    agreed: float | None = None  # best smoothed agreement
    look_before: int = 0  # step of the look before the last
    apart: list[tuple[int, float]] = field(default_factory=list)  # step of a look, golden less held-out loss
    logits: list[float] = field(default_factory=list)  # largest of attention, at each look
    deviations: list[Deviation] = field(default_factory=list)
    broken: list[tuple[int, str]] = field(default_factory=list)  # invariants that did not hold, and in which step
    changed: int = 0  # step of the last planned change
    first: int = 0  # step of the first observation
    step: int = 0  # the last that was observed

    def observe(self, seen: Observation) -> None:
        """The next step's."""
        self.first = self.first or seen.step
        if seen.changed:
            self._forget(seen.step)
        z = Judged(self.loss.z(seen.loss), self.grad.z(seen.grad_norm))
        self.loss.take(seen.loss, z.loss)
        self.grad.take(seen.grad_norm, z.grad)
        self.judged = [*self.judged[1 - KEPT :], z]
        for name, window in self.series.items():
            value = getattr(seen, name)
            window.append(value if value is not None and math.isfinite(value) else None)
            del window[:-KEPT]
        if not_finite(seen):
            self.refused = [*self.refused[1 - KEPT :], seen.step]
        again = seen.stage == "warmup" and (self.changed > 0 or self.facts.adopted)
        rising = again or seen.step <= self.facts.paced
        self.level.take(seen.loss, self.loss.spread, self.facts.uniform, rising)
        self.pace.take(seen.lr, seen.stage == "stable")
        self.push.take(seen.grad_router if seen.stage != "warmup" else None)
        self.contents.take(seen.content)
        self.loads.take(seen.load, self.facts.assignments, self.facts.top_k)
        if seen.capacity and all(map(math.isfinite, seen.capacity)):
            self.taken = [*self.taken[1 - KEPT :], list(seen.capacity)]
            agreed = self.smoothed("agreement")
            if agreed is not None:
                self.agreed = agreed if self.agreed is None else max(agreed, self.agreed)
        self._remember(seen.step, seen.broken)
        self.seen, self.step = seen, seen.step

    def _remember(self, step: int, broken: Sequence[str]) -> None:
        self.broken = [*self.broken, *((step, sentence) for sentence in broken)][-BROKEN:]

    def looked(self, look: Look) -> None:
        """What the probe saw."""
        self.look_before = self.look.step if self.look else 0
        self.look = look
        self._remember(look.step, look.broken)
        self.logits = [*self.logits[1 - LOOKS :], look.attention]
        apart = look.golden - look.loss
        if math.isfinite(apart):
            self.apart = [*self.apart[1 - LOOKS :], (look.step, apart)]

    def forecast(self, event: Mapping[str, Any]) -> None:
        """A `forecast` event: its deviation, if it has one."""
        found = event.get("deviation")
        if found and math.isfinite(found["z"]):
            lr = self.seen.lr if self.seen else 0.0
            new = Deviation(event["step"], found["nats"], found["z"], lr)
            self.deviations = [*self.deviations[1 - FORECASTS :], new]

    def _forget(self, step: int) -> None:
        """From `step` on the plan is another."""
        self.changed = step
        for baseline in (self.loss, self.grad):
            baseline.forget()
        self.level.forget()
        self.pace.forget()
        self.push.forget()
        self.taken, self.agreed, self.deviations, self.apart = [], None, [], []
        self.series["agreement"] = []

    # -- what detectors ask -----------------------------------------------------------------------------------------

    @property
    def settling(self) -> bool:
        """Whether a planned change is so near that only hard rules hold; the warm-up of a phase is part of it."""
        soon = self.changed > 0 and self.step - self.changed < SETTLE
        return soon or self.seen is None or self.seen.stage == "warmup"

    def smoothed(self, name: str, steps: int = 50) -> float | None:
        """Median of the last finite values of a series; None if there are fewer."""
        known = [value for value in self.series[name][-steps:] if value is not None]
        return median(known) if len(known) == steps else None

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def pack(self) -> dict[str, Any]:
        """As plain values that JSON keeps."""
        packed = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("facts", *_PARTS)}
        packed |= {name: windows.pack(getattr(self, name)) for name in _PARTS}
        packed["seen"] = asdict(self.seen) if self.seen else None
        packed["look"] = asdict(self.look) if self.look else None
        plain: dict[str, Any] = _plain(packed)
        return plain

    @classmethod
    def unpack(cls, packed: Mapping[str, Any], facts: Facts) -> Signals:
        """The inverse. Raises `TypeError`, `KeyError` or `ValueError` for what `pack` does not give."""
        values = dict(_tupled(packed))
        parts = {name: kind(**values.pop(name)) for name, kind in _PARTS.items()}
        seen, look = values.pop("seen"), values.pop("look")
        judged = [Judged(*one) for one in values.pop("judged")]
        broken = [(step, sentence) for step, sentence in values.pop("broken")]
        apart = [(step, value) for step, value in values.pop("apart")]
        deviations = [Deviation(*one) for one in values.pop("deviations")]
        frozen = {name: _frozen(seen[name]) for name in TUPLES} if seen else {}
        stilled = {name: _frozen(look[name]) for name in STILL} if look else {}
        return cls(
            facts,
            Observation(**(seen | frozen)) if seen else None,
            Look(**(look | stilled)) if look else None,
            judged=judged,
            deviations=deviations,
            broken=broken,
            apart=apart,
            **parts,
            **values,
        )


TUPLES = [one.name for one in fields(Observation) if str(one.type).startswith("tuple")]
STILL = [one.name for one in fields(Look) if str(one.type).startswith("tuple")]
_PARTS: dict[str, Any] = {
    "loss": Baseline, "grad": Baseline, "level": Level, "pace": Pace, "push": Usual, "contents": Contents,
    "loads": Loads,
}  # fmt: skip


def not_finite(seen: Observation) -> bool:
    """Whether something is not finite that is no overflow of fp16, which a smaller loss scale answers."""
    overflow = seen.loss_scale is not None and seen.loss_scale >= LEAST_SCALE and math.isfinite(seen.loss)
    return not math.isfinite(seen.loss) or (seen.skipped and not overflow)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become `{"float": "nan"}`."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _tupled(value: Any) -> Any:
    """The inverse of `_plain`; tuples stay lists."""
    if isinstance(value, Mapping):
        return float(value["float"]) if set(value) == {"float"} else {key: _tupled(v) for key, v in value.items()}
    return [_tupled(item) for item in value] if isinstance(value, list) else value


def _frozen(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
