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
from lumina.model.attention import Attention
from lumina.model.router import Router
from lumina.orchestrator.protocol import Decision
from lumina.training.controls import SessionControls
from lumina.training.session import Session

Plant = Callable[[Session, int, int, float], None]  # session, step at which it begins, seed, how much
BYTES = 256  # of the byte vocabulary that junk is drawn from
STALE = 4  # batches that a stuck loader repeats
DOMAIN = 4  # batches of one domain, then as many of the other
USUAL_BALANCE = 0.01  # Switch Transformers' coefficient (2101.03961)
DEAD_BIAS = -5.0
COPIED, LETTERS, LINES = 6, 16, 20_000  # of the copy task: a line has so many letters twice, of so many


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


def nan_gradient(session: Session, step: int, seed: int, size: float) -> None:
    """F4a: one element of one gradient is NaN, in one step."""

    def change(gradient: Tensor) -> Tensor:
        changed = gradient.clone()
        changed.view(-1)[seed % changed.numel()] = float("nan")
        return changed

    number = seed % len(list(session.parts.model.parameters()))
    _gradients(session, step, change, slice(number, number + 1))


def large_gradient(session: Session, step: int, seed: int, size: float) -> None:
    """H6: all gradients are `size` times what they are, in one step; they are clipped."""
    _gradients(session, step, lambda gradient: size * gradient, slice(None))


def inf_weight(session: Session, step: int, seed: int, size: float) -> None:
    """F4b: one weight of the middle of the model is infinite from then on."""
    matrices = [p for name, p in session.parts.model.named_parameters() if p.ndim > 1 and "embed" not in name]

    def around(take: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            weight = matrices[seed % len(matrices)]
            weight.view(-1)[seed % weight.numel()] = float("inf")
        return take()

    _once(session, step, around)


def rate_burst(session: Session, step: int, seed: int, size: float) -> None:
    """F2, and H6 with little: one step at `size` times the learning rate."""
    optimizer = session.parts.optimizer

    def around(take: Callable[[], Tensor]) -> Tensor:
        inner = optimizer.step  # as whoever else watches has it by then
        optimizer.step = lambda lr, skip: inner(size * lr, skip)  # type: ignore[method-assign]
        try:
            return take()
        finally:
            optimizer.step = inner  # type: ignore[method-assign]

    _once(session, step, around)


def sharp_attention(session: Session, step: int, seed: int, size: float) -> None:
    """F7: the gains of queries and keys of one layer are `size` times as large. Their weights' scale would change
    nothing: both are normalised."""

    def around(take: Callable[[], Tensor]) -> Tensor:
        layers = [module for module in session.parts.model.modules() if isinstance(module, Attention)]
        attention = layers[seed % len(layers)]
        with torch.no_grad():
            for norm in (attention.q_norm, attention.k_norm):
                norm.weight.mul_(size)
        return take()

    _once(session, step, around)


def zero_moments(session: Session, step: int, seed: int, size: float) -> None:
    """H8: the optimizer's moments are zero; it still counts its steps."""

    def around(take: Callable[[], Tensor]) -> Tensor:
        for name, tensor in session.parts.optimizer.tensors().items():
            if name.endswith(("momentum", "exp_avg", "exp_avg_sq")):
                tensor.zero_()
        return take()

    _once(session, step, around)


def undone(session: Session, step: int, seed: int, size: float) -> None:
    """What a person lays over the plan, and takes back `size` steps later: the rate is halved in between."""
    inner, laid = session.oversight.after_step, list[str]()

    def after_step() -> None:
        inner()
        controls = SessionControls(session)
        if controls.step == step and not laid:
            laid.append(controls.overlay(Decision("hand", "lr.scale=0.5"), "lr.scale", 0.5).id)
        elif controls.step == step + size and len(laid) == 1:
            laid.append("")
            controls.undo(Decision("hand", f"undo {laid[0]}"), laid[0])

    session.oversight.after_step = after_step  # type: ignore[method-assign]


# -- what is wrong with data -------------------------------------------------------------------------------------------


def _read(session: Session, change: Callable[[int, int, Batch], Batch]) -> None:
    """What is read arrives changed, by the index that was asked for and the number of the batch.

    It is the data, or the code that reads it: another loader reads the same.
    """
    parts = session.parts
    reseat = parts.reseat

    def wrap(loader: Loader) -> None:
        inner = loader.batch

        def batch(i: int, skipped: Sequence[Block] = (), order: int = 0) -> Batch:
            return change(i, loader.planned(i, skipped), inner(i, skipped, order))

        loader.batch = batch  # type: ignore[method-assign]

    def again() -> None:
        reseat()
        wrap(parts.loader)

    wrap(parts.loader)
    parts.reseat = again  # type: ignore[method-assign]


def junk(session: Session, step: int, seed: int, size: float) -> None:
    """F3, and H6 with few: `size` batches in a row are random bytes."""
    first = session.parts.loader.planned(step - 1)

    def change(i: int, number: int, found: Batch) -> Batch:
        return _random(found, seed + number) if first <= number < first + size else found

    _read(session, change)


def shifted_targets(session: Session, step: int, seed: int, size: float) -> None:
    """F5: from then on whatever is read has targets that lie `size` tokens further on, also what was read before."""
    reached = list[int]()

    def change(i: int, number: int, found: Batch) -> Batch:
        if i == step - 1:
            reached.append(i)
        if not reached:
            return found
        targets_BS = found.targets_BS.roll(-int(size), dims=1)
        targets_BS[:, -int(size) :] = NOT_COUNTED
        return Batch(found.ids_BS, targets_BS, found.segments_BS, found.sample_ids_B)

    _read(session, change)


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


def domains(session: Session, step: int, seed: int, size: float) -> None:
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


def stuck_loader(session: Session, step: int, seed: int, size: float) -> None:
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


def wrong_decay(session: Session, step: int, seed: int, size: float) -> None:
    """F9, of weight decay: the optimizer decays `size` times as much as it is told to, until it is set to the plan."""
    optimizer, begun = session.parts.optimizer, list[int]()
    inner, replan = optimizer.step, optimizer.replan

    def stepping(lr: float, skip: Tensor) -> None:
        if begun:
            optimizer.weight_decay *= size
        inner(lr, skip)

    def planned(train: Any) -> None:
        replan(train)
        begun.clear()

    def around(take: Callable[[], Tensor]) -> Tensor:
        begun.append(step)
        return take()

    optimizer.step, optimizer.replan = stepping, planned  # type: ignore[method-assign]
    _once(session, step, around)


def wrong_eps(session: Session, step: int, seed: int, size: float) -> None:
    """F9, of AdamW's epsilon: it is `size` until the optimizer is set to the plan."""

    def around(take: Callable[[], Tensor]) -> Tensor:
        for group in session.parts.optimizer.adamw.param_groups:
            group["eps"] = size
        return take()

    _once(session, step, around)


# -- what is wrong with the plan ---------------------------------------------------------------------------------------


def _planned(session: Session, step: int, change: Callable[[dict[str, float]], dict[str, float]]) -> None:
    """From `step` on the plan's numbers are `change`d."""
    course = session.course
    inner = course.planned

    def planned(number: int) -> dict[str, float]:
        values = inner(number)
        return values | change(values) if number >= step else values

    course.planned = planned  # type: ignore[method-assign, assignment]


def rate(session: Session, step: int, seed: int, size: float) -> None:
    """F1 and F8: the planned learning rate is `size` times what it should be."""
    _planned(session, step, lambda values: {"lr": size * values["lr"]})


def over_balance(session: Session, step: int, seed: int, size: float) -> None:
    """F12: the balance loss weighs `size` times what is usual; the plan of `tiny` has none, and balances by biases."""
    _planned(session, step, lambda values: {"balance": size * USUAL_BALANCE})


def frozen_predictor(session: Session, step: int, seed: int, size: float) -> None:
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


def unbalanced(session: Session, step: int, seed: int, size: float) -> None:
    """F10: nothing balances any more, and every token wants expert 0: its row of each router is `size` times as large,
    and points to what its tokens have in common.

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
        router.weight[0] = size * router.weight[0].norm() * common / common.norm()

    def around(take: Callable[[], Tensor]) -> Tensor:
        handles.update((router, router.register_forward_pre_hook(bias)) for router in routers)
        return take()

    _once(session, step, around)


def dead_experts(session: Session, step: int, seed: int, size: float) -> None:
    """F11: the router rows of the `size` most loaded experts of each layer are zero, and their biases beyond reach."""

    def around(take: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            for router in (moe.router for moe in session.parts.model.moes):
                dead = router.fraction_E.topk(int(size)).indices  # of the last step
                router.weight[dead] = 0.0
                router.bias_E[dead] = DEAD_BIAS
        return take()

    _once(session, step, around)
