"""What may be done to a run, by decision or by hand: one row each, with what it does and how it is undone.

    text or file -> request -> checked (name, kind, bounds) -> performed through `Controls`

Values have the bounds of `lumina.config.overlay`. What depends on where the run stands (batches that are still to come,
a restore point, the schedule's stage) is for `Controls` to refuse, with nothing done.

To add one: a row in `ACTIONS`; where it lays something new over the plan, a key there.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lumina.config.overlay import DECAY, KEYS, RECOMPUTE, SKIP, Key, Overlay, bounds, check, require_kind
from lumina.config.schema.config import Config
from lumina.config.units import span
from lumina.errors import UserError
from lumina.orchestrator.protocol import Controls, Decision

How = Literal["holds", "once", "moves"]
Asked = float | list[int] | str | None

BACK = "undo: back to before it, and on without"
NOTHING = "nothing: no step is another for it"
SAME = "nothing: the same batches are read again"
RESUME = "lumina resume RUN"


@dataclass(frozen=True)
class Action:
    """`holds`: a value over the plan; `once`: before the next step alone; `moves`: where the run stands."""

    name: str
    how: How
    does: str  # one sentence
    key: str = ""  # what it lays over the plan
    default: Asked = None  # its value if none is given; a name without either needs one
    undone: str = BACK
    positive: bool = False  # 0, which its key may have, would be the opposite of what it does


def _laid(name: str, does: str, default: Asked = None, key: str = "", positive: bool = False) -> Action:
    key = key or name
    once = key in (SKIP, DECAY) or KEYS[key].once
    return Action(name, "once" if once else "holds", does, key, default, positive=positive)


ACTIONS = {
    action.name: action
    for action in (
        Action("rewind", "moves", "goes back to the newest restore point at or before that step (or so many steps, "
               "if negative) and takes the steps again; with skip it leaves out the batches read since",
               undone=f"with skip: undo of its data.skip, which reads them after all; without, {SAME}"),
        _laid("skip", "the next step moves nothing; so many steps, if given", 1),
        _laid(SKIP, "leaves out batches: the first one's number, from 0, and how many"),
        _laid("lr.scale", "multiplies the planned learning rate"),
        _laid("lr.warmup", "warms up again: the rate rises from 0 to the planned one in so many steps"),
        _laid("clip", "clips gradients to another norm"),
        _laid("weight_decay", "another weight decay"),
        _laid("z_loss", "another weight of the head's squared log-partition"),
        _laid("qk_clip", "scales the gains of query and key norms where an attention logit exceeds the value", 100.0),
        _laid("optimizer.reset", "forgets all moments; a re-warm beside it is advised", 1),
        _laid("bias_rate", "moves selection biases faster or slower"),
        _laid("rebalance", "moves selection biases as usual, where that was switched off", 1e-3, "bias_rate",
              positive=True),
        _laid("balance", "another weight of the balance loss"),
        _laid("temperature", "divides the routers' logits in training; evaluation keeps the planned temperature"),
        _laid("capacity_factor", "the most of a sequence's fair share that an expert takes in training"),
        _laid("expert_dropout", "hides experts from tokens in training, with this probability"),
        _laid("router.reset", "draws an expert's router row anew and sets its bias to 0: its layer and number"),
        _laid("expert.reseed", "makes an expert a noisy copy of the most loaded one: its layer and number"),
        _laid("mod_capacity", "another share of a sequence that routed blocks compute"),
        _laid("predictor", "multiplies the learning rate of the depth predictors; 0 freezes them"),
        _laid("resume_predictor", "trains the depth predictors as planned, where they were frozen", 1.0, "predictor",
              positive=True),
        _laid("micro_batch", "computes so many sequences at once; the global batch is the plan's"),
        _laid("recompute", f"recomputes activations: {', '.join(RECOMPUTE)}"),
        _laid(DECAY, "starts the decay: the run ends with so many steps of it"),
        Action("lift", "moves", "ends what lies over the plan, by its name; what it did until then stays",
               undone="lay it down again"),
        Action("save", "moves", "saves a checkpoint of this step", undone=NOTHING),
        Action("stop", "moves", "saves and ends the attempt", undone=RESUME),
        Action("undo", "moves", "goes back to before what was laid over the plan, by its name, and on without it",
               undone="ask for it again"),
    )
}  # fmt: skip
NAMED = ("lift", "undo")  # their value is the name of an overlay


@dataclass(frozen=True)
class Request:
    """An action with its value; `steps` is for how many it holds, `skip` of a rewind."""

    name: str
    value: Asked = None
    steps: int | None = None
    skip: bool = False

    @property
    def text(self) -> str:
        """As a person would write it."""
        value = "" if self.value is None else f"={self.value}".replace(" ", "")
        steps = "" if self.steps is None else f" for {self.steps} step{'s' if self.steps > 1 else ''}"
        return f"{self.name}{value}{steps}{' skipping what was read' if self.skip else ''}"

    def pack(self) -> dict[str, Any]:
        """As plain values."""
        return {name: value for name, value in vars(self).items() if value is not None and value is not False}

    @classmethod
    def unpack(cls, content: Mapping[str, Any]) -> Request:
        """The inverse. Raises `UserError` for what `pack` does not give."""
        kinds = {"name": (str,), "value": (int, float, list, str), "steps": (int,), "skip": (bool,)}
        for name, value in content.items():
            if name not in kinds or type(value) not in kinds[name]:
                raise UserError(f"{str(name)[:50]}={str(value)[:50]}: no part of a request", "ask with lumina act")
        if "name" not in content:
            raise UserError("a request without a name", "ask with lumina act")
        return cls(**content)


def read(text: str, steps: int | None = None, skip: bool = False) -> Request:
    """The request that `name=value` means. Raises `UserError` if the value is none."""
    name, equals, value = text.partition("=")
    if not equals:
        return Request(name, None, steps, skip)
    if name in NAMED or (name == "recompute" and value in RECOMPUTE):
        return Request(name, value, steps, skip)
    return Request(name, _numbers(name, value), steps, skip)


def _numbers(name: str, text: str) -> Asked:
    """A number, or several whole ones: 0.5, 3, 0,3 or [0, 3]."""
    inner = text.strip().removeprefix("[").removesuffix("]")
    try:
        parts = [int(part) for part in inner.split(",")]
        return parts if "," in text else parts[0]
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{name}={text}: not a number", fix=_asks(name)) from None


def checked(request: Request, config: Config) -> Request:
    """The request, complete, if a run of this configuration may be asked so. Raises `UserError` if it may not."""
    action = ACTIONS.get(request.name)
    if action is None:
        near = difflib.get_close_matches(request.name, ACTIONS, n=2, cutoff=0.6)
        known = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(ACTIONS)}"
        raise UserError(f"{request.name}: nothing that can be done to a run", fix=known)
    if request.steps is not None and (action.how != "holds" or request.steps < 1):
        wrong = f"{request.name}: does not hold for {request.steps} steps"
        raise UserError(wrong, fix="leave --steps out" if action.how != "holds" else "give 1 or more")
    if request.skip and request.name != "rewind":
        raise UserError(f"{request.name}: does not go back, so that there is nothing to skip", fix="leave --skip out")
    require_kind(action.key, config.model.kind)
    request = replace(request, value=_completed(action, request, config))
    if action.name == "skip" and request.steps is None:
        request = replace(request, steps=1)
    if action.key:
        _require_bounds(action, request, config)
    elif action.name not in NAMED and type(request.value) is not (int if action.name == "rewind" else type(None)):
        raise UserError(f"{request.name}={request.value}: not a value of it", fix=_asks(action.name))
    return request


def _completed(action: Action, request: Request, config: Config) -> Asked:
    """The value, or the usual one."""
    value = action.default if request.value is None else request.value
    if action.name == DECAY and value is None:
        value = max(1, span(config.train.decay, config.train.steps or 0))
    if action.name == "recompute" and isinstance(value, str) and value in RECOMPUTE:
        value = RECOMPUTE.index(value)
    if value is None and action.name not in ("save", "stop"):
        raise UserError(f"{action.name}: needs a value", fix=_asks(action.name))
    if isinstance(value, str) != (action.name in NAMED and value is not None):
        raise UserError(f"{action.name}={value}: not a value of it", fix=_asks(action.name))
    return value


def _require_bounds(action: Action, request: Request, config: Config) -> None:
    assert isinstance(request.value, int | float | list)
    once = action.key in KEYS and KEYS[action.key].once
    check(Overlay("", action.key, request.value, 1, 1 if once else request.steps))
    if action.positive and not isinstance(request.value, list) and not request.value > 0:
        raise UserError(f"{request.text}: out of bounds", fix=_asks(action.name))
    if action.key in KEYS and KEYS[action.key].pair:
        assert isinstance(request.value, list)
        assert config.model.moe is not None
        layers, experts = config.model.layers - config.model.moe.dense_layers, config.model.moe.experts
        if request.value[0] >= layers or request.value[1] >= experts:
            fix = f"layers are 0 to {layers - 1}, experts 0 to {experts - 1}"
            raise UserError(f"{request.text}: no such expert", fix)


def asks(action: Action) -> str:
    """What values an action takes, as words."""
    if action.name in NAMED:
        return "the name of what lies over the plan"
    if action.name == "rewind":
        return "a step, or minus so many"
    if action.key == SKIP:
        return "the first batch and how many: 120,4"
    if action.name == "recompute":
        return ", ".join(RECOMPUTE)
    key: Key | None = KEYS.get(action.key)
    if key is None or key.low == key.high:
        return ""
    if key.pair:
        return "a layer and an expert: 0,3"
    usual = "as planned" if action.key == DECAY else action.default
    default = "" if usual is None else f", default {usual if isinstance(usual, str) else f'{usual:g}'}"
    within = bounds(key).replace("from", "above") if action.positive else bounds(key)
    return f"{'whole, ' if key.whole else ''}{within}{default}"


def _asks(name: str) -> str:
    """What to write instead."""
    if name not in ACTIONS:
        return f"known: {', '.join(ACTIONS)}"
    wanted = asks(ACTIONS[name])
    return f"{name}=X, where X is {wanted}" if wanted else f"write {name} alone"


def perform(controls: Controls, request: Request, why: Decision) -> None:
    """Does what was asked and checked, between two steps. Raises `UserError`, with nothing done, if it cannot be."""
    action, value = ACTIONS[request.name], request.value
    if action.key:
        assert isinstance(value, int | float | list)
        controls.overlay(why, action.key, value, request.steps)
    elif action.name in NAMED:
        ids = named(controls.overlays, str(value))
        if action.name == "undo":
            controls.undo(why, *ids)
        else:
            for id in ids:
                controls.lift(why, id)
    elif action.name == "rewind":
        controls.rollback(why, _point(controls, request), "skip" if request.skip else "replay")
    elif action.name == "save":
        controls.save()
    else:
        controls.stop(why)


def named(overlays: Sequence[Overlay], asked: str) -> list[str]:
    """The overlays that have these names, with spaces between. Raises `UserError` if one of them means none."""
    return [_named([one.id for one in overlays], one) for one in asked.split()]


def _named(ids: Sequence[str], asked: str) -> str:
    """The one with this name, or the only one whose name begins so."""
    meant = [asked] if asked in ids else [id for id in ids if id.startswith(asked)]
    if len(meant) == 1:
        return meant[0]
    wrong = "no such overlay" if not meant else f"means {len(meant)} of them"
    raise UserError(f"{asked}: {wrong}", fix=f"there are: {', '.join(meant or ids) or 'none'}")


def require_before(rewind: Request, stands: int) -> int:
    """The step that is meant. Raises `UserError` if a run that stands there has not taken it, or nobody ever will."""
    assert isinstance(rewind.value, int | float)
    wanted = int(rewind.value) + (stands if rewind.value < 0 else 0)
    if 0 <= wanted < stands:
        return wanted
    possible = f"possible are steps 0 to {stands - 1}, or -1 to -{stands}: so many back" if stands else "train it first"
    raise UserError(f"rewind={rewind.value}: the run has come to step {stands}", fix=possible)


def _point(controls: Controls, rewind: Request) -> int:
    """The newest restore point at or before the step that is meant."""
    wanted, points = require_before(rewind, controls.step), controls.points()
    if before := [point for point in points if point <= wanted]:
        return max(before)
    possible = f"possible are steps {points[0]} to {controls.step - 1}" if points else "none is possible yet"
    there = ", ".join(map(str, points)) or "none"
    wrong = f"rewind={rewind.value}: no restore point at or before step {wanted}"
    raise UserError(wrong, fix=f"{possible}; restore points: {there}")
