"""What the gauntlet does to runs, and to which: the cases, and the sets that hold them against each other.

A fault has right diagnoses; a trap has none, for nothing may be done. Two sets differ in all that the orchestrator was
not made for: seeds, steps, sizes of faults, the model's size, its text. It was made on one, and is shown on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lumina.verify.gauntlet import faults
from lumina.verify.gauntlet.faults import Plant

KINDS = ("dense", "moe", "mod")
Heard = Literal["hard", "divergence", "drift"]  # how soon a fault has to be heard
WITHIN: dict[Heard, int] = {"hard": 2, "divergence": 50, "drift": 300}  # steps


@dataclass(frozen=True)
class Case:
    """What is done to a run, and what `causes` are right diagnoses of it; of a trap there are none."""

    name: str
    text: str  # `{size}` is how much
    plant: Plant | None = None
    size: float = 0.0
    other: float | None = None  # its size in the other set; None: the same
    causes: frozenset[str] = frozenset()
    heard: Heard = "hard"
    kinds: tuple[str, ...] = KINDS
    keys: Mapping[str, Any] = field(default_factory=dict)
    files: Callable[[Path, int], Mapping[str, Any]] | None = None  # keys whose data is written into a folder, by a seed
    late: bool = False  # whether it begins where routers are even by then
    against: str = "healthy"  # the case that it is held against: the same keys, and nothing is done
    undone: bool = False  # it takes itself back: what is left is the healthy run, to the bit
    stops: bool = False  # nothing mends it: to stop with a right diagnosis is what has to be done

    @property
    def fault(self) -> bool:
        return bool(self.causes)

    @property
    def forked(self) -> bool:
        """Whether it is a healthy run until it begins."""
        return self.keys == SOUND[self.against].keys and not self.files

    @property
    def sound(self) -> bool:
        """Whether it is the healthy run that it is held against, and nobody has to take that twice."""
        return self.plant is None and self.forked


def topics(folder: Path, seed: int) -> Mapping[str, Any]:
    """The reference of the Python language, prose of half a million characters: another text than the sample's."""
    from pydoc_data.topics import topics as texts

    path = folder / "topics.txt"
    path.write_text("\n\n\n".join(texts[name] for name in sorted(texts)), encoding="utf-8")
    return {"data.train": [str(path)]}


@dataclass(frozen=True)
class Suite:
    """A set of runs: what they are, and when faults begin in them."""

    name: str
    text: str
    seeds: tuple[int, ...]
    keys: Mapping[str, Any] = field(default_factory=dict)
    of_kind: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # keys of one kind alone
    first: int = 200  # a fault begins at one of `within` steps from here on, or from `late` on; the seed draws it
    late: int = 300
    within: int = 80
    others: bool = False  # whether faults have their `other` sizes
    files: Callable[[Path, int], Mapping[str, Any]] | None = None  # as a case's
    cases: tuple[tuple[str, str], ...] = ()  # with their kinds; empty: all, of all kinds
    alone: bool = True  # whether runs are taken alone, too, to be held against
    sigma: Mapping[str, float] = field(default_factory=dict)  # nats, by kind, where no more healthy runs are taken

    def begins(self, case: Case, seed: int) -> int:
        """The step at which a case begins."""
        return (self.late if case.late else self.first) + seed * 37 % self.within

    def size(self, case: Case) -> float:
        """How much is done."""
        return case.other if self.others and case.other is not None else case.size


# -- the table ---------------------------------------------------------------------------------------------------------

LONG = {"train.steps": 1900}  # what is wrong for good shows slowly, and whoever mends it has to show it, too
# An expert takes its fair share at most, as in Switch Transformers: without, `tiny` does as well on two experts.
LIMITED = LONG | {"model.moe.capacity": 1.0}
# As long as a trial and its probation take behind what is heard, and so much that it may cost: others have no room for
# one, and who cannot try cannot do harm.
ROOM = {"train.steps": 750, "orchestrator.trial.budget": 7}
HEALTHY = Case("healthy", "nothing is done")
HEALTHY_LONG = Case("healthy long", "the same for longer", keys=LONG, against="healthy long")
HEALTHY_LIMITED = Case(
    "healthy limited",
    "the same for longer, experts limited",
    kinds=("moe",),
    keys=LIMITED,
    against="healthy limited",
)
SOUND = {case.name: case for case in (HEALTHY, HEALTHY_LONG, HEALTHY_LIMITED)}


def _soon(
    name: str,
    text: str,
    plant: Plant,
    size: float,
    other: float | None,
    heard: Heard,
    *causes: str,
    stops: bool = False,
) -> Case:
    return Case(name, text, plant, size, other, frozenset(causes), heard, stops=stops)


def _slow(fault: Case, like: Case, *kinds: str) -> Case:
    """Wrong from then on, and heard by what it does: a longer run, for the way back is tried before it is gone."""
    return replace(fault, kinds=kinds or like.kinds, keys=like.keys, late=True, against=like.name)


BOTH = {"data.train": ["sample", "sample_chat"]}
FAULTS = (
    _slow(_soon("lr high", "F1: {size:g} times the learning rate is planned", faults.rate, 10, 6, "divergence",
          "learning rate"), HEALTHY_LONG),
    _soon("lr burst", "F2: one step at {size:g} times the learning rate", faults.rate_burst, 100, 150, "divergence",
          "learning rate"),
    _soon("junk", "F3: {size:g} batches of random bytes", faults.junk, 150, 110, "divergence", "data"),
    _soon("nan gradient", "F4a: one gradient is NaN once", faults.nan_gradient, 1, None, "hard", "numerics",
          "hardware"),
    _soon("inf weight", "F4b: one weight becomes infinite", faults.inf_weight, 1, None, "hard", "numerics", "hardware"),
    _soon("shifted targets", "F5: all targets lie {size:g} further on", faults.shifted_targets, 1, 2, "drift", "data",
          stops=True),
    _soon("stuck loader", "F6: the same four batches again and again", faults.stuck_loader, 4, None, "divergence",
          "data"),
    _soon("sharp attention", "F7: gains of queries and keys of one layer {size:g} times as large",
          faults.sharp_attention, 6, 12, "drift", "hardware", "numerics"),
    _slow(_soon("lr low", "F8: a fraction of {size:g} of the learning rate is planned", faults.rate, 0.02, 0.05,
                "drift", "learning rate"), HEALTHY_LONG),
    _soon("wrong decay", "F9: weights decay {size:g} times as much as planned", faults.wrong_decay, 300, 200, "drift",
          "config"),
    _soon("wrong eps", "F9: AdamW's epsilon is {size:g}", faults.wrong_eps, 1.0, 3.0, "drift", "config"),
    _slow(_soon("unbalanced", "F10: nothing balances, and a router row {size:g} times as large wants every token",
          faults.unbalanced, 20, 30, "drift", "router"), HEALTHY_LIMITED),
    _slow(_soon("dead experts", "F11: router rows of {size:g} experts are zero, their biases -5", faults.dead_experts,
                2, None, "drift", "router"), HEALTHY_LIMITED),
    _slow(_soon("over-balance", "F12: the balance loss weighs {size:g} times the usual", faults.over_balance, 1000,
                2000, "drift", "router"), HEALTHY_LIMITED),
    _slow(_soon("frozen predictor", "F15: the depth predictors are turned around, and learn no more",
                faults.frozen_predictor, 1, None, "drift", "depth"), HEALTHY_LONG, "mod"),
)  # fmt: skip
TRAPS = (
    Case("cosine", "H1: a plain cosine", keys={"train.schedule": "cosine"}),
    Case("sharp decay", "H2: the rate falls to zero in the last 5 %", keys={"train.decay": 0.05}),
    Case("two sequences", "H3: batches of two sequences", keys={"train.batch_tokens": 128}),
    Case("rate doubled", "H4, but for the batch, which no phase can change: a planned change to twice the rate", keys={
        "train.phases": [{"at": 0}, {"at": 0.5, "lr": 6e-3, "warmup": 0.05}]}),
    Case("other text", "H5: a planned change from texts to conversations", keys={
        "data.mode": "hybrid_sequential", "data.base_ratio": 0.5} | BOTH),
    Case("one junk batch", "H6: one batch of random bytes", faults.junk, 1),
    Case("five junk batches", "H6: {size:g} batches of random bytes", faults.junk, 5, 3),
    Case("large gradient", "H6: gradients {size:g} times in one step, clipped", faults.large_gradient, 1000, 300),
    Case("small lr burst", "H6: one step at {size:g} times the learning rate", faults.rate_burst, 10, 6),
    Case("copies", "H7: nothing is learned for long, then much at once", files=faults.copy_task),
    Case("moments lost", "H8: the optimizer's moments are zero once", faults.zero_moments),
    Case("undone", "by hand: half the rate for {size:g} steps, then undone", faults.undone, 40, 55, undone=True),
    Case("nothing", "nothing is done, for longer", keys=LONG, against="healthy long"),
    Case("copies, longer", "H7, where trials have room", kinds=("dense", "moe"), keys=ROOM, files=faults.copy_task),
    Case("five junk batches, longer", "H6, where trials have room: {size:g} batches of random bytes", faults.junk, 5, 3,
         kinds=("moe",), keys=ROOM),
    Case("domains", "H9: batches of one domain at a time", faults.domains, kinds=("moe",), keys={
        "data.mode": "hybrid_interleaved"} | BOTH),
)  # fmt: skip
CASES = {case.name: case for case in (*SOUND.values(), *FAULTS, *TRAPS)}

TUNED = Suite("tuned", "the runs that the orchestrator was made on", (30, 31, 32))
HELD_OUT = Suite(
    "held-out",
    "a model half as wide again, another text (the reference of the Python language), other seeds, steps and sizes",
    (500, 501, 502),
    {"model.width": 96},
    {"dense": {"model.ffn": 192}, "moe": {"model.moe.ffn": 96}, "mod": {"model.ffn": 192}},
    first=285,
    late=400,
    within=50,
    others=True,
    files=topics,
)
# Small enough for every change of the code: what goes back is the healthy run to the bit, whatever the machine.
CI = Suite(
    "ci",
    "a few cases in short runs",
    (7,),
    {"train.steps": 330},
    first=210,
    within=80,
    cases=(
        ("inf weight", "dense"), ("lr burst", "moe"), ("stuck loader", "mod"), ("one junk batch", "dense"),
        ("moments lost", "moe"),
    ),
    files=topics,  # of which little is held out: to evaluate all of the sample's takes as long as 130 steps
    sigma={"dense": 0.010, "moe": 0.012, "mod": 0.009},  # of the held-out set: wider, 600 steps
)  # fmt: skip
# What interventions cost of a run that can afford them: a trial and its probation take 1,870 steps' worth.
LONG_RUNS = Suite(
    "long",
    "runs in which a trial takes the share that it may",
    (1,),
    {"train.steps": 40_000, "orchestrator.trial.budget": 0.05},
    late=10_000,
    within=500,
    alone=False,
    cases=tuple((name, kind) for name in ("lr high", "healthy") for kind in KINDS),
)
SUITES = {suite.name: suite for suite in (TUNED, HELD_OUT, CI, LONG_RUNS)}
