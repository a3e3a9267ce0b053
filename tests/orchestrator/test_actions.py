"""The table of actions: every one is bounded, of the kinds that have it, and does one thing through `Controls`."""

from __future__ import annotations

from typing import Any

import pytest

from lumina.config.overlay import KEYS, SKIP, Overlay
from lumina.config.resolve import resolve
from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.orchestrator.actions import ACTIONS, Request, asks, checked, perform, read
from lumina.orchestrator.protocol import Decision


def config(kind: str = "hybrid") -> Config:
    return resolve("tiny", {"model.kind": kind, "data.train": "x", "train.steps": 100, "train.decay": 0.2}).config


class Seen:
    """Controls that note what is asked of them."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.step = 50
        self.overlays = (Overlay("lr.scale=0.5@3", "lr.scale", 0.5, 3), Overlay("clip=0.1@5", "clip", 0.1, 5))

    def points(self) -> tuple[int, ...]:
        return 10, 20, 40

    def __getattr__(self, name: str) -> Any:
        def called(*given: Any) -> None:
            self.calls.append((name, *(value for value in given if not isinstance(value, Decision))))

        return called


def done(text: str, **more: Any) -> tuple[Any, ...]:
    seen = Seen()
    perform(seen, checked(read(text, **more), config()), Decision("hand", text))  # type: ignore[arg-type]
    (call,) = seen.calls
    return call


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("lr.scale=0.5", ("overlay", "lr.scale", 0.5, None)),
        ("skip", ("overlay", "skip", 1, 1)),
        ("data.skip=60,4", ("overlay", SKIP, [60, 4], None)),
        ("qk_clip", ("overlay", "qk_clip", 100.0, None)),
        ("optimizer.reset", ("overlay", "optimizer.reset", 1, None)),
        ("router.reset=[1, 3]", ("overlay", "router.reset", [1, 3], None)),
        ("rebalance", ("overlay", "bias_rate", 1e-3, None)),
        ("resume_predictor", ("overlay", "predictor", 1.0, None)),
        ("predictor=0", ("overlay", "predictor", 0, None)),
        ("recompute=full", ("overlay", "recompute", 2, None)),
        ("decay", ("overlay", "decay", 20, None)),
        ("decay=7", ("overlay", "decay", 7, None)),
        ("rewind=39", ("rollback", 20, "replay")),
        ("rewind=-10", ("rollback", 40, "replay")),
        ("save", ("save",)),
        ("stop", ("stop",)),
        ("undo=lr", ("undo", "lr.scale=0.5@3")),
        ("undo=clip lr", ("undo", "clip=0.1@5", "lr.scale=0.5@3")),
        ("lift=clip=0.1@5", ("lift", "clip=0.1@5")),
    ],
)
def test_each_does_one_thing(text: str, call: tuple[Any, ...]) -> None:
    assert done(text) == call


def test_for_how_long_and_what_is_left_out() -> None:
    assert done("lr.scale=0.5", steps=20) == ("overlay", "lr.scale", 0.5, 20)
    assert done("rewind=40", skip=True) == ("rollback", 40, "skip")


@pytest.mark.parametrize(
    ("text", "more", "says"),
    [
        ("lr.scal=0.5", {}, "did you mean lr.scale"),
        ("nothing", {}, "known: rewind, skip"),
        ("lr.scale=fast", {}, "X is from 0.01 to 100"),
        ("lr.scale", {}, "needs a value"),
        ("lr.scale=300", {}, "a number from 0.01 to 100"),
        ("resume_predictor=0", {}, "X is above 0 to 1, default 1"),
        ("rebalance=0", {}, "X is above 0 to 0.01, default 0.001"),
        ("rebalance=0,1", {}, "a number from 0 to 0.01"),
        ("rebalance=1", {}, "a number from 0 to 0.01"),
        ("lr.scale=0.5,1", {}, "X is from 0.01 to 100"),
        ("lr.scale=nan", {}, "a number from 0.01 to 100"),
        ("lr.scale=0.5", {"steps": 0}, "give 1 or more"),
        ("lr.scale=0.5", {"skip": True}, "leave --skip out"),
        ("qk_clip", {"steps": 3}, "leave --steps out"),
        ("save=3", {}, "write save alone"),
        ("rewind", {}, "a step, or minus so many"),
        ("rewind=0.5", {}, "a step, or minus so many"),
        ("rewind=5", {}, "possible are steps 10 to 49; restore points: 10, 20, 40"),
        ("rewind=50", {}, "possible are steps 0 to 49, or -1 to -50"),
        ("rewind=99999", {}, "has come to step 50"),
        ("rewind=-51", {}, "has come to step 50"),
        ("router.reset=9,1", {}, "layers are 0 to 3, experts 0 to 3"),
        ("expert.reseed=1", {}, "its layer and its number"),
        ("undo=clap", {}, "there are: lr.scale=0.5@3, clip=0.1@5"),
        ("undo", {}, "the name of what lies over the plan"),
        ("recompute=some", {}, "none, selective, full"),
        ("data.skip=3", {}, "how many"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is(text: str, more: dict[str, Any], says: str) -> None:
    seen = Seen()
    with pytest.raises(UserError, match=says.replace("[", r"\[")):
        perform(seen, checked(read(text, **more), config()), Decision("hand", text))  # type: ignore[arg-type]
    assert seen.calls == []


def test_an_action_of_another_kind_is_refused() -> None:
    for action in ACTIONS.values():
        needs = KEYS[action.key].needs if action.key in KEYS else ""
        if needs:
            lacks = "mod" if needs == "experts" else "moe"
            with pytest.raises(UserError, match=f"a {lacks} model has no"):
                checked(Request(action.name, action.default), config(lacks))


def test_every_key_of_a_run_has_an_action_and_every_action_its_words() -> None:
    for_probes = {"lr.decay"}  # what a trial ends with; a run that decays ends: `decay`
    laid = {action.key for action in ACTIONS.values() if action.key}
    assert laid == {key for key, row in KEYS.items() if not row.forks_only} - for_probes | {SKIP}
    for action in ACTIONS.values():
        assert action.does
        assert action.undone
        assert ("default" in asks(action)) == (action.name in ("qk_clip", "rebalance", "resume_predictor", "decay"))
        assert asks(action) or action.default is not None or action.name in ("save", "stop")


def test_a_request_is_written_and_read() -> None:
    zero = Request("predictor", 0.0), Request("rewind", 0)  # a zero is a value
    for request in (
        Request("lr.scale", 0.5, 20),
        Request("rewind", 40, skip=True),
        Request("router.reset", [0]),
        *zero,
    ):
        assert Request.unpack(request.pack()) == request
    assert Request("router.reset", [0, 3]).text == "router.reset=[0,3]"
    for wrong in ({}, {"name": 3}, {"name": "save", "more": 1}, {"name": "lr.scale", "value": True}):
        with pytest.raises(UserError, match=r"no part of a request|without a name"):
            Request.unpack(wrong)
