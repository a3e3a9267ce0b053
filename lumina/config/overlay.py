"""Overlays: how a run may deviate from its plan. The plan itself is never edited.

An overlay changes one number of the plan for some steps, within bounds. What acts in a step is a pure function of the
step and of the list of overlays: to end one is to give it an end, so that a step taken again sees what it saw before.

An *edit* changes the state once, before the step that it begins at, as a pure function of that state: a run that goes
on from before it makes it again, to the bit. `data.skip` leaves batches out, and `decay` shortens the run.

To add a key: a row in `KEYS`, and the place that asks for it (`training.course`, or `training.edits`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, NamedTuple

from lumina.errors import UserError

Value = float | list[int]


@dataclass(frozen=True)
class Overlay:
    """`key` is `value` in steps `begin` to `end`, counted from 1; without an end, to the end of the run."""

    id: str
    key: str
    value: Value
    begin: int
    end: int | None = None

    def holds(self, step: int) -> bool:
        return self.begin <= step and (self.end is None or step <= self.end)


class Block(NamedTuple):
    """Batches that are left out: `length` from batch `start` on, as planned, of the phase of batch `at`.

    `at` is the first batch that would have been one of them: those before it are as they were.
    """

    start: int
    length: int
    at: int


Needs = Literal["", "experts", "depth"]


class Key(NamedTuple):
    """What an overlay with this key acts on, what value it may have, and what it makes of the planned value.

    `act` is None for an edit of the state and for the decay, which is a matter of the whole schedule.
    """

    acts_on: str
    low: float
    high: float
    act: Callable[[float, Overlay, int], float] | None = None
    whole: bool = False
    forks_only: bool = False  # a run itself would read batches twice
    needs: Needs = ""  # what a model must have
    once: bool = False  # an edit: it acts before the step at which it begins, and ends with that
    pair: bool = False  # the value is [layer, expert], each from 0; layers as `moe` events number them


def _scaled(planned: float, overlay: Overlay, step: int) -> float:
    return planned * _number(overlay)


def _replaced(planned: float, overlay: Overlay, step: int) -> float:
    return _number(overlay)


def _decayed(planned: float, overlay: Overlay, step: int) -> float:
    """Linear to 0, as the decay of `wsd`: the first of n steps takes n / (n + 1), the one after the last 0."""
    steps = _number(overlay)
    return planned * max(0.0, (steps + 1 - (step - overlay.begin + 1)) / (steps + 1))


def _warmed(planned: float, overlay: Overlay, step: int) -> float:
    """Linear from 0, as `train.warmup`."""
    return planned * min(1.0, (step - overlay.begin + 1) / _number(overlay))


LARGEST = 2.0**31
SKIP, DECAY = "data.skip", "decay"
EXPERTS: Final = "experts"
DEPTH: Final = "depth"
RECOMPUTE = ("none", "selective", "full")  # what the numbers of `recompute` stand for
# Where a bound is "our choice", no measurement says where harm begins.
KEYS = {
    # Our choice: the plan itself may be off, by a misplaced point or two. What published laws for the peak lie apart
    # is 1.03 to 2.1 times (docs/planning.md).
    "lr.scale": Key("lr", 0.01, 100.0, _scaled),
    "lr.decay": Key("lr", 1, LARGEST, _decayed, whole=True),  # steps
    "lr.warmup": Key("lr", 1, LARGEST, _warmed, whole=True),  # steps
    "clip": Key("clip", 0.1, 10.0, _replaced),  # ten times below and above the usual 1
    # Our choice: none, to ten times the usual 0.1. That a change in mid-run helps was never shown.
    "weight_decay": Key("weight_decay", 0.0, 1.0, _replaced),
    "z_loss": Key("z_loss", 0.0, 1e-2, _replaced),  # a hundred times PaLM's
    "skip": Key("skip", 1, 1, _replaced, whole=True),  # the step moves nothing, as where the guard says so
    "bias_rate": Key("bias_rate", 0.0, 1e-2, _replaced, needs=EXPERTS),  # above it biases oscillate (2408.15664)
    "balance": Key("balance", 0.0, 0.1, _replaced, needs=EXPERTS),  # ten times Switch Transformers' (2101.03961)
    # Our choice: twice as sharp, twice as flat. Evaluation keeps the planned one, and further off they would part.
    "temperature": Key("temperature", 0.5, 2.0, _replaced, needs=EXPERTS),
    # Our choice: at half the fair share half of an even load is dropped; a factor of as many as there are
    # experts drops nothing, so that 64 lifts the limit of up to 64 of them. Usual are 1 to 1.25 (OpenMoE).
    "capacity_factor": Key("capacity_factor", 0.5, 64.0, _replaced, needs=EXPERTS),
    # Our choice: beyond a half a token would rather not meet the expert that its router wants.
    "expert_dropout": Key("expert_dropout", 0.0, 0.5, _replaced, needs=EXPERTS),
    # 1 is the block without routing. Our choice: 0.05 is below half of Raposo et al.'s best, 0.125 (2404.02258), at
    # which realised capacity no longer counts as comparable.
    "mod_capacity": Key("mod_capacity", 0.05, 1.0, _replaced, needs=DEPTH),
    "predictor": Key("predictor", 0.0, 1.0, _replaced, needs=DEPTH),  # of the learning rate; 0 is frozen
    "micro_batch": Key("micro_batch", 1, LARGEST, _replaced, whole=True),  # sequences each process computes at once
    "recompute": Key("recompute", 0, len(RECOMPUTE) - 1, _replaced, whole=True),
    "data.order": Key("data.order", 1, LARGEST, _replaced, whole=True, forks_only=True),
    DECAY: Key("schedule", 1, LARGEST, whole=True),  # steps, with which the run ends
    "optimizer.reset": Key("state", 1, 1, whole=True, once=True),
    # The largest logit; 100 is Kimi K2's (2507.20534). Our choice: a hundredth and ten times of it.
    "qk_clip": Key("state", 1.0, 1000.0, once=True),
    "router.reset": Key("state", 0, 2**16, needs=EXPERTS, once=True, pair=True),
    "expert.reseed": Key("state", 0, 2**16, needs=EXPERTS, once=True, pair=True),
}


def check(overlay: Overlay, fork: bool = False) -> Overlay:
    """The overlay itself. Raises `UserError` if its key is unknown, its value out of bounds or its steps are none.

    `fork`: it is for an arm, not for the run.
    """
    if overlay.begin < 1 or (overlay.end is not None and overlay.end < overlay.begin):
        raise UserError(f"{overlay.key}: no steps from {overlay.begin} to {overlay.end}", "count them from 1")
    if overlay.key == SKIP:
        if not _is_block(overlay.value):
            wrong = f"{SKIP}={overlay.value}: not a block of batches"
            raise UserError(wrong, fix="give the number of the first batch, from 0, and how many: [120, 4]")
        return overlay
    key = KEYS.get(overlay.key)
    if key is None or (key.forks_only and not fork):
        known = [name for name, key in KEYS.items() if fork or not key.forks_only]
        raise UserError(f"{overlay.key}: nothing that a run can deviate in", fix=f"known: {', '.join(known)}, {SKIP}")
    value = overlay.value
    if key.once and overlay.end != overlay.begin:
        raise UserError(f"{overlay.key}: acts once, not for several steps", fix="leave out how many")
    if key.pair:
        if not _is_pair(value):
            raise UserError(
                f"{overlay.key}={value}: not an expert", fix="give its layer and its number, from 0: [0, 3]"
            )
        return overlay
    plain = type(value) is int or (type(value) is float and (not key.whole or value.is_integer()))
    if not plain or not key.low <= _number(overlay) <= key.high:
        what = "a whole number" if key.whole else "a number"
        raise UserError(f"{overlay.key}={value}: out of bounds", fix=f"{what} {bounds(key)}")
    return overlay


def bounds(key: Key) -> str:
    """What values a key takes, as words."""
    if key.low == key.high:
        return f"that is {key.low:g}"
    return f"from {key.low:g} on" if key.high == LARGEST else f"from {key.low:g} to {key.high:g}"


def require_kind(key: str, kind: str) -> None:
    """Raises `UserError` if a model of this kind has nothing that the key acts on."""
    needs = KEYS[key].needs if key in KEYS else ""
    if needs == EXPERTS and kind not in ("moe", "hybrid"):
        raise UserError(f"{key}: a {kind} model has no experts", fix="leave it out")
    if needs == DEPTH and kind not in ("mod", "hybrid"):
        raise UserError(f"{key}: a {kind} model has no depth routing", fix="leave it out")


def acting(overlays: Iterable[Overlay], step: int, planned: Mapping[str, float]) -> dict[str, float]:
    """What the planned numbers of `step` become: each overlay that holds acts on what those before it left."""
    values = dict(planned)
    for overlay in overlays:
        key = KEYS.get(overlay.key)
        if key and key.act and overlay.holds(step):
            values[key.acts_on] = key.act(values[key.acts_on], overlay, step)
    return values


def edits(overlays: Iterable[Overlay], step: int) -> list[Overlay]:
    """What changes the state before this step, in order."""
    return [one for one in overlays if one.begin == step and one.key in KEYS and KEYS[one.key].once]


def shortened(overlays: Iterable[Overlay]) -> tuple[int, int] | None:
    """The step at which the decay was started, and how many steps it takes, with which the run ends."""
    return next(((one.begin, int(_number(one))) for one in overlays if one.key == DECAY), None)


def skipped(overlays: Iterable[Overlay]) -> tuple[Block, ...]:
    """The quarantined batches."""
    blocks = []
    for overlay in overlays:
        if overlay.key == SKIP:
            assert isinstance(overlay.value, list)
            start, length = overlay.value
            blocks.append(Block(start, length, overlay.begin - 1))
    return tuple(blocks)


def added(overlays: Sequence[Overlay], new: Overlay, fork: bool = False) -> tuple[Overlay, ...]:
    """The overlays and a new one. One that is there already is not added again.

    Raises `UserError` as `check` does, if another has its name, and if factors together leave the bounds of one.
    """
    check(new, fork)
    if same := [overlay for overlay in overlays if overlay.id == new.id]:
        if same == [new]:
            return tuple(overlays)
        raise UserError(f"{new.id}: an overlay of this name is there already", fix="give it another")
    if new.key == DECAY and shortened(overlays):
        raise UserError(f"{DECAY}: it was started before", fix="undo that one first")
    together = [new, *(overlay for overlay in overlays if overlay.key == new.key and _meet(overlay, new))]
    if new.key in KEYS and KEYS[new.key].act is _scaled:
        total, key = math.prod(map(_number, together)), KEYS[new.key]
        if not key.low <= total <= key.high:
            others = f"{len(together) - 1} in force make it {total:g} of the plan"
            raise UserError(
                f"{new.key}={new.value}: {others}", fix=f"stay within {key.low:g} to {key.high:g}, or end one"
            )
    return (*overlays, new)


def lifted(overlays: Sequence[Overlay], id: str, step: int) -> tuple[Overlay, ...]:
    """The overlays when `id` has no effect after `step` any more; what it did until then stays part of the history.

    Raises `UserError` if there is none of this name, and if it is a quarantine: batches once left out are not read.
    """
    found = next((overlay for overlay in overlays if overlay.id == id), None)
    if found is None:
        raise UserError(f"{id}: no such overlay", fix=f"there are: {', '.join(o.id for o in overlays) or 'none'}")
    if found.begin <= step and (found.key in (SKIP, DECAY) or KEYS[found.key].once):
        why = "its batches would be read late" if found.key == SKIP else "it has acted"
        raise UserError(f"{id}: cannot end, for {why}", fix="undo it, which goes back before it")
    rest = [overlay for overlay in overlays if overlay is not found]
    if found.begin > step:
        return tuple(rest)
    ended = replace(found, end=step if found.end is None else min(step, found.end))
    return tuple(ended if overlay is found else overlay for overlay in overlays)


def pack(overlays: Iterable[Overlay]) -> list[dict[str, Any]]:
    """As plain values, for events and `state.json`."""
    return [asdict(overlay) for overlay in overlays]


def unpack(values: Sequence[Mapping[str, Any]], where: str) -> tuple[Overlay, ...]:
    """The inverse. Raises `UserError`, naming `where` they stood, if they are not what `pack` gives."""
    try:
        return tuple(check(Overlay(**value)) for value in values)
    except (TypeError, UserError) as error:
        what = error.message if isinstance(error, UserError) else error
        raise UserError(f"{where}: damaged overlays: {what}", fix="restore the file") from None


def _number(overlay: Overlay) -> float:
    assert not isinstance(overlay.value, list)
    return overlay.value


def _meet(one: Overlay, other: Overlay) -> bool:
    """Whether both hold in some step."""
    end = min(math.inf if overlay.end is None else overlay.end for overlay in (one, other))
    return max(one.begin, other.begin) <= end


def _is_pair(value: Any) -> bool:
    two = isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
    return two and min(value) >= 0


def _is_block(value: Any) -> bool:
    two = isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
    return two and value[0] >= 0 and value[1] >= 1 and sum(value) <= LARGEST
