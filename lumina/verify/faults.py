"""Faults and traps, put into a run from outside: what the orchestrator has to tell apart. It never imports this.

One is planted in a session before it trains and wraps, in memory, one thing that training uses: its loader, its steps,
its optimizer, its plan. What happens *once* is not there when a step is taken again, as a bit that flipped; what is
wrong with *data* is wrong with those batches whenever they are read, as a poisoned shard; what *sticks* stays until the
part that it sits in is built anew; what is wrong with the *plan* acts as it was planned, so that only an overlay on top
makes it another. Numbers and names are those of the gauntlet's design: F are faults, H are healthy.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lumina.config.overlay import Block
from lumina.data.loader import Batch, Loader
from lumina.data.mixture import Blend, Draw, Ids
from lumina.data.windows import NOT_COUNTED
from lumina.model.router import Router
from lumina.training.session import Session

Plant = Callable[[Session, int, int], None]  # session, step at which it begins, seed
KINDS = ("dense", "moe", "mod")
BYTES = 256  # of the byte vocabulary that junk is drawn from
STALE = 4  # batches that a stuck loader repeats
DOMAIN = 4  # batches of one domain, then as many of the other
USUAL_BALANCE, OVER = 0.01, 1000  # Switch Transformers' coefficient (2101.03961), and what it becomes
BIASED, DEAD = 20.0, 2
COPIED, LETTERS, LINES = 6, 16, 20_000  # of the copy task: a line has so many letters twice, of so many


@dataclass(frozen=True)
class Case:
    """What is done to a run. `causes` are right diagnoses of a fault; a trap has none, for nothing may be done."""

    name: str
    text: str
    plant: Plant | None = None
    causes: frozenset[str] = frozenset()
    kinds: tuple[str, ...] = KINDS
    keys: Mapping[str, Any] = field(default_factory=dict)
    files: Callable[[Path, int], Mapping[str, Any]] | None = None  # keys whose data is written into a folder, by a seed
    first: int = 0  # step from which on the fault may begin; 0: as most (`gauntlet.FIRST`)
    against: str = "healthy"  # the case that a fault is held against: the same keys, and nothing is done

    @property
    def fault(self) -> bool:
        return bool(self.causes)


# -- what happens once -------------------------------------------------------------------------------------------------


@contextmanager
def _hooked(parameters: Sequence[Tensor], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block gradients arrive changed."""
    handles = [parameter.register_hook(change) for parameter in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _once(session: Session, step: int, around: Callable[[Callable[[], Tensor]], Tensor]) -> None:
    """`around` has this step to take, the first time that it comes."""
    fitting, left = session.course.fitting, [step]
    inner = fitting.step

    def stepping(batch: Batch, lr: float, plan: Any, number: int) -> Tensor:
        def take() -> Tensor:
            return inner(batch, lr, plan, number)

        if left != [number]:
            return take()
        left.clear()
        return around(take)

    fitting.step = stepping  # type: ignore[method-assign, assignment]


def _gradients(session: Session, step: int, change: Callable[[Tensor], Tensor], some: slice) -> None:
    parameters = list(session.parts.model.parameters())[some]

    def around(take: Callable[[], Tensor]) -> Tensor:
        with _hooked(parameters, change):
            return take()

    _once(session, step, around)


def nan_gradient(session: Session, step: int, seed: int) -> None:
    """F4a: one element of one gradient is NaN, in one step."""

    def change(gradient: Tensor) -> Tensor:
        changed = gradient.clone()
        changed.view(-1)[seed % changed.numel()] = float("nan")
        return changed

    number = seed % len(list(session.parts.model.parameters()))
    _gradients(session, step, change, slice(number, number + 1))


def large_gradient(session: Session, step: int, seed: int) -> None:
    """H6: all gradients are 1,000 times what they are, in one step; they are clipped."""
    _gradients(session, step, lambda gradient: 1000 * gradient, slice(None))


def inf_weight(session: Session, step: int, seed: int) -> None:
    """F4b: one weight of the middle of the model is infinite from then on."""
    matrices = [p for name, p in session.parts.model.named_parameters() if p.ndim > 1 and "embed" not in name]

    def around(take: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            weight = matrices[seed % len(matrices)]
            weight.view(-1)[seed % weight.numel()] = float("inf")
        return take()

    _once(session, step, around)


def _burst(factor: float) -> Plant:
    def plant(session: Session, step: int, seed: int) -> None:
        optimizer = session.parts.optimizer
        inner = optimizer.step

        def around(take: Callable[[], Tensor]) -> Tensor:
            optimizer.step = lambda lr, skip: inner(factor * lr, skip)  # type: ignore[method-assign]
            try:
                return take()
            finally:
                optimizer.step = inner  # type: ignore[method-assign]

        _once(session, step, around)

    return plant


def zero_moments(session: Session, step: int, seed: int) -> None:
    """H8: the optimizer's moments are zero; it still counts its steps."""

    def around(take: Callable[[], Tensor]) -> Tensor:
        for name, tensor in session.parts.optimizer.tensors().items():
            if name.endswith(("momentum", "exp_avg", "exp_avg_sq")):
                tensor.zero_()
        return take()

    _once(session, step, around)


# -- what is wrong with data -------------------------------------------------------------------------------------------


def _junk(count: int) -> Plant:
    """F3, and H6 with few: so many batches in a row are random bytes."""

    def plant(session: Session, step: int, seed: int) -> None:
        parts = session.parts
        reseat, first = parts.reseat, parts.loader.planned(step - 1)

        def poison(loader: Loader) -> None:
            inner = loader.batch

            def batch(i: int, skipped: Sequence[Block] = (), order: int = 0) -> Batch:
                number, found = loader.planned(i, skipped), inner(i, skipped, order)
                return _random(found, seed + number) if first <= number < first + count else found

            loader.batch = batch  # type: ignore[method-assign]

        def again() -> None:  # it is the data: another loader reads the same
            reseat()
            poison(parts.loader)

        poison(parts.loader)
        parts.reseat = again  # type: ignore[method-assign]

    return plant


def _random(batch: Batch, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    rows, length = batch.ids_BS.shape
    text = torch.randint(BYTES, (rows, length + 1), generator=generator)
    targets_BS = torch.where(batch.targets_BS == NOT_COUNTED, NOT_COUNTED, text[:, 1:])
    return Batch(text[:, :-1].contiguous(), targets_BS, batch.segments_BS, batch.sample_ids_B)


class _Domains:
    """A draw that takes a few batches of one part of a blend, then as many of the other."""

    def __init__(self, parts: Sequence[Draw], sequences: int) -> None:
        self.parts, self.sequences = parts, sequences

    def __call__(self, n: Ids) -> tuple[Ids, Ids]:
        turn = n // self.sequences // DOMAIN % len(self.parts)
        shards, windows = np.empty_like(n), np.empty_like(n)
        for number, draw in enumerate(self.parts):
            if (here := turn == number).any():
                shards[here], windows[here] = draw(n[here])
        return shards, windows


def domains(session: Session, step: int, seed: int) -> None:
    """H9: batches come from one domain at a time, from the start."""
    loader = session.parts.loader
    blend = loader.draws[0]
    assert isinstance(blend, Blend)
    loader.draws[0] = _Domains(blend.parts, loader.sequences)


def copy_task(folder: Path, seed: int) -> Mapping[str, Any]:
    """H7: lines of random letters, each written twice: a long plateau, until the second half is looked up."""
    letters = np.random.default_rng(seed).integers(ord("a"), ord("a") + LETTERS, (LINES, COPIED), dtype=np.uint8)
    lines = [row.tobytes().decode() for row in letters]
    path = folder / f"copies-{seed}.txt"
    path.write_text("\n\n".join(f"{line} {line}" for line in lines))
    return {"data.train": [str(path)]}


# -- what sticks -------------------------------------------------------------------------------------------------------


def stuck_loader(session: Session, step: int, seed: int) -> None:
    """F6: the loader gives the same four batches again and again, as those that were asked for."""
    loader = session.parts.loader
    inner, stuck = loader.batch, list[int]()

    def batch(i: int, skipped: Sequence[Block] = (), order: int = 0) -> Batch:
        if i == step - 1:
            stuck.append(i)
        if not stuck:
            return inner(i, skipped, order)
        stale, asked = inner(step - STALE + i % STALE), inner(i, skipped, order)
        return Batch(stale.ids_BS, stale.targets_BS, stale.segments_BS, asked.sample_ids_B)

    loader.batch = batch  # type: ignore[method-assign]


# -- what is wrong with the plan ---------------------------------------------------------------------------------------


def _planned(session: Session, step: int, change: Callable[[dict[str, float]], dict[str, float]]) -> None:
    """From `step` on the plan's numbers are `change`d."""
    course = session.course
    inner = course.planned

    def planned(number: int) -> dict[str, float]:
        values = inner(number)
        return values | change(values) if number >= step else values

    course.planned = planned  # type: ignore[method-assign, assignment]


def _rate(factor: float) -> Plant:
    """F1 and F8: the planned learning rate is so many times what it should be."""

    def plant(session: Session, step: int, seed: int) -> None:
        _planned(session, step, lambda values: {"lr": factor * values["lr"]})

    return plant


def over_balance(session: Session, step: int, seed: int) -> None:
    """F12: the balance loss weighs `OVER` times what is usual; the plan of `tiny` has none, and balances by biases."""
    _planned(session, step, lambda values: {"balance": OVER * USUAL_BALANCE})


def frozen_predictor(session: Session, step: int, seed: int) -> None:
    """F15: the depth predictors learn no more, and want what they did not want.

    Frozen alone they cost 0.004 nats from step 200 on and 0.015 from step 60 on, which is within noise: routers settle
    early.
    """
    _planned(session, step, lambda values: {"predictor": 0.0})

    def around(take: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            for router in session.parts.model.routers:
                router.predictor.w_out.neg_()
        return take()

    _once(session, step, around)


def unbalanced(session: Session, step: int, seed: int) -> None:
    """F10: nothing balances any more, and every token wants expert 0: its row of each router is 20 times as large, and
    points to what its tokens have in common.

    As it points, 20 times as large, it does no harm: half of the tokens like it less for it. Two such rows leave two
    experts to learn nothing for as long as it lasts, of which a third remains after they are drawn anew. The loss that
    balances within a sequence is no number of a step; its weight in `tiny`, 1e-4, balances little.
    """
    _planned(session, step, lambda values: {"bias_rate": 0.0, "balance": 0.0})
    routers = [moe.router for moe in session.parts.model.moes]
    handles: dict[Router, RemovableHandle] = {}

    @torch.no_grad()
    def bias(router: Router, inputs: tuple[Tensor, ...]) -> None:
        handles.pop(router).remove()
        common = inputs[0].mean((0, 1))
        router.weight[0] = BIASED * router.weight[0].norm() * common / common.norm()

    def around(take: Callable[[], Tensor]) -> Tensor:
        handles.update((router, router.register_forward_pre_hook(bias)) for router in routers)
        return take()

    _once(session, step, around)


def dead_experts(session: Session, step: int, seed: int) -> None:
    """F11: the router rows of the two most loaded experts of each layer are zero, and their biases beyond reach."""

    def around(take: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            for router in (moe.router for moe in session.parts.model.moes):
                dead = router.fraction_E.topk(DEAD).indices  # of the last step
                router.weight[dead] = 0.0
                router.bias_E[dead] = -5.0
        return take()

    _once(session, step, around)


# -- the table ---------------------------------------------------------------------------------------------------------

LONG = {"train.steps": 1900}  # what is wrong for good shows slowly, and whoever mends it has to show it, too
# An expert takes its fair share at most, as in Switch Transformers: without, `tiny` does as well on two experts.
LIMITED = LONG | {"model.moe.capacity": 1.0}
LATER = 300  # routers are even by then
HEALTHY = Case("healthy", "nothing is done")
HEALTHY_LONG = Case("healthy long", "the same for longer", keys=LONG)
HEALTHY_LIMITED = Case("healthy limited", "the same for longer, experts limited", kinds=("moe",), keys=LIMITED)
SOUND = {case.name: case for case in (HEALTHY, HEALTHY_LONG, HEALTHY_LIMITED)}


def _slow(name: str, text: str, plant: Plant, cause: str, against: Case, *kinds: str) -> Case:
    """Wrong from then on, and heard by what it does: a longer run, for the way back is tried before it is gone."""
    of = kinds or against.kinds
    return Case(name, text, plant, frozenset({cause}), of, against.keys, first=LATER, against=against.name)


BOTH = {"data.train": ["sample", "sample_chat"]}
FAULTS = (
    Case("nan gradient", "F4a: one gradient is NaN once", nan_gradient, frozenset({"numerics", "hardware"})),
    Case("inf weight", "F4b: one weight becomes infinite", inf_weight, frozenset({"numerics", "hardware"})),
    Case("junk", "F3: 150 batches of random bytes", _junk(150), frozenset({"data"})),
    Case("lr burst", "F2: one step at 100 times the learning rate", _burst(100.0), frozenset({"learning rate"})),
    Case("stuck loader", "F6: the same four batches again and again", stuck_loader, frozenset({"data"})),
    _slow("lr high", "F1: ten times the learning rate is planned", _rate(10.0), "learning rate", HEALTHY_LONG),
    _slow("lr low", "F8: a fiftieth of the learning rate is planned", _rate(0.02), "learning rate", HEALTHY_LONG),
    _slow(
        "unbalanced",
        "F10: nothing balances, and a router row 20 times as large wants every token",
        unbalanced,
        "router",
        HEALTHY_LIMITED,
    ),
    _slow(
        "dead experts",
        "F11: two experts' router rows are zero, their biases -5",
        dead_experts,
        "router",
        HEALTHY_LIMITED,
    ),
    _slow(
        "over-balance",
        "F12: the balance loss weighs 10, a thousand times the usual",
        over_balance,
        "router",
        HEALTHY_LIMITED,
    ),
    _slow(
        "frozen predictor",
        "F15: the depth predictors are turned around, and learn no more",
        frozen_predictor,
        "depth",
        HEALTHY_LONG,
        "mod",
    ),
)
TRAPS = (
    Case("cosine", "H1: a plain cosine", keys={"train.schedule": "cosine"}),
    Case("sharp decay", "H2: the rate falls to zero in the last 5 %", keys={"train.decay": 0.05}),
    Case("two sequences", "H3: batches of two sequences", keys={"train.batch_tokens": 128}),
    Case("rate doubled", "H4, but for the batch, which no phase can change: a planned change to twice the rate", keys={
        "train.phases": [{"at": 0}, {"at": 0.5, "lr": 6e-3, "warmup": 0.05}]}),
    Case("other text", "H5: a planned change from texts to conversations", keys={
        "data.mode": "hybrid_sequential", "data.base_ratio": 0.5} | BOTH),
    Case("one junk batch", "H6: one batch of random bytes", _junk(1)),
    Case("five junk batches", "H6: five batches of random bytes", _junk(5)),
    Case("large gradient", "H6: gradients 1,000 times in one step, clipped", large_gradient),
    Case("small lr burst", "H6: one step at 10 times the learning rate", _burst(10.0)),
    Case("copies", "H7: nothing is learned for long, then much at once", files=copy_task),
    Case("moments lost", "H8: the optimizer's moments are zero once", zero_moments),
    Case("domains", "H9: batches of one domain at a time", domains, kinds=("moe",), keys={
        "data.mode": "hybrid_interleaved"} | BOTH),
)  # fmt: skip
CASES = {case.name: case for case in (*SOUND.values(), *FAULTS, *TRAPS)}
