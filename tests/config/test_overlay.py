"""Overlays: bounded, reversible, pure functions of the step."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from typing import Any

import pytest

from lumina.config.overlay import (
    KEYS,
    SKIP,
    Block,
    Overlay,
    acting,
    added,
    check,
    edits,
    lifted,
    pack,
    require_kind,
    shortened,
    skipped,
    unpack,
)  # fmt: skip
from lumina.errors import UserError

PLAN = {key.acts_on: 0.123 for key in KEYS.values() if key.act} | {"lr": 1.0, "clip": 1.0}


def test_every_key_acts_in_its_steps_and_only_there() -> None:
    for name, key in KEYS.items():
        if key.act is None:
            continue
        value = min(4, int(key.high)) if key.whole else key.high
        one = [check(Overlay("a", name, value, begin=5, end=7), fork=True)]
        assert [acting(one, step, PLAN) != PLAN for step in range(1, 10)] == [
            step in (5, 6, 7) for step in range(1, 10)
        ]
        changed = acting(one, 6, PLAN)
        assert {what for what in PLAN if changed[what] != PLAN[what]} == {key.acts_on}


def test_what_an_overlay_makes_of_the_plan() -> None:
    def rates(*overlays: Overlay) -> list[float]:
        return [acting(overlays, step, PLAN)["lr"] for step in range(1, 8)]

    half, decay = Overlay("a", "lr.scale", 0.5, begin=2), Overlay("b", "lr.decay", 3, begin=4)
    assert rates(half) == [1, *[0.5] * 6]
    assert rates(decay) == [1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert rates(half, decay) == [1, 0.5, 0.5, 0.375, 0.25, 0.125, 0]
    assert rates(Overlay("c", "lr.warmup", 4, begin=3)) == [1, 1, 0.25, 0.5, 0.75, 1, 1]
    late = Overlay("d", "clip", 0.5, begin=1), Overlay("e", "clip", 2.0, begin=3)
    assert [acting(late, step, PLAN)["clip"] for step in (2, 3)] == [0.5, 2.0]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("lr.scale", 101, "0.01 to 100"), ("lr.scale", 0.009, "0.01 to 100"), ("lr.scale", math.nan, "0.01 to 100"),
        ("lr.scale", True, "a number"), ("lr.scale", "0.5", "a number"), ("lr.scale", [1, 2], "a number"),
        ("lr.decay", 2.5, "a whole number"), ("lr.decay", math.inf, "a whole number"), ("clip", 0, "0.1 to 10"),
        ("bias_rate", 0.1, "0 to 0.01"), ("lr", 1.0, "known: lr.scale"), ("data.order", 1, "known: lr.scale"),
        ("skip", 2, "that is 1"), ("recompute", 3, "0 to 2"), ("qk_clip", 0.5, "1 to 1000"), ("decay", 0, "from 1 on"),
        ("router.reset", 3, "layer and its number"), ("expert.reseed", [0, -1], "layer and its number"),
        (SKIP, 3, "how many"), (SKIP, [3, 0], "how many"), (SKIP, [-1, 2], "how many"), (SKIP, [1.0, 2], "how many"),
    ],
)  # fmt: skip
def test_what_is_out_of_bounds_is_refused(key: str, value: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(Overlay("a", key, value, begin=1, end=1))


def test_an_edit_acts_once_and_a_decay_is_started_once() -> None:
    once = [key for key in KEYS if KEYS[key].once]
    assert len(once) == 4
    for key in once:
        with pytest.raises(UserError, match="acts once"):
            check(Overlay("a", key, [0, 1] if KEYS[key].pair else 1, begin=3, end=4))
    clip, decay = Overlay("c", "qk_clip", 100.0, begin=3, end=3), Overlay("d", "decay", 4, begin=3)
    overlays = added(added((), clip), decay)
    assert [edits(overlays, step) for step in (2, 3, 4)] == [[], [clip], []]
    assert (shortened(overlays), shortened([clip])) == ((3, 4), None)
    with pytest.raises(UserError, match="started before"):
        added(overlays, Overlay("e", "decay", 4, begin=5))
    for id in ("c", "d"):
        with pytest.raises(UserError, match="it has acted"):
            lifted(overlays, id, 5)
        assert id not in [one.id for one in lifted(overlays, id, 2)]


def test_what_a_model_must_have() -> None:
    for name, key in KEYS.items():
        for kind in ("dense", "moe", "mod", "hybrid"):
            lacks = {"experts": kind in ("dense", "mod"), "depth": kind in ("dense", "moe")}.get(key.needs, False)
            with pytest.raises(UserError, match=f"a {kind} model has no") if lacks else nullcontext():
                require_kind(name, kind)


@pytest.mark.parametrize(("begin", "end"), [(0, None), (5, 4)])
def test_steps_that_are_none_are_refused(begin: int, end: int | None) -> None:
    with pytest.raises(UserError, match="no steps"):
        check(Overlay("a", "clip", 1.0, begin, end))


def test_factors_together_stay_within_the_bounds_of_one() -> None:
    first = added((), Overlay("a", "lr.scale", 0.1, begin=3, end=8))
    with pytest.raises(UserError, match=r"make it 0\.005 of the plan"):
        added(first, Overlay("b", "lr.scale", 0.05, begin=8))
    assert len(added(first, Overlay("b", "lr.scale", 0.05, begin=9))) == 2


def test_a_name_means_one_overlay() -> None:
    first = added((), Overlay("a", "clip", 0.5, begin=3))
    assert added(first, Overlay("a", "clip", 0.5, begin=3)) == first
    with pytest.raises(UserError, match="there already"):
        added(first, Overlay("a", "clip", 0.6, begin=3))


def test_to_lift_one_leaves_what_it_did() -> None:
    overlays = Overlay("a", "lr.scale", 0.5, begin=3), Overlay("b", "clip", 0.5, begin=9), Overlay("c", SKIP, [4, 1], 5)
    after = lifted(overlays, "a", 6)
    assert [acting(after, step, PLAN)["lr"] for step in (2, 3, 6, 7)] == [1, 0.5, 0.5, 1]
    assert [one.id for one in lifted(overlays, "b", 6)] == ["a", "c"]  # it never held
    with pytest.raises(UserError, match="cannot end, for its batches"):
        lifted(overlays, "c", 6)
    with pytest.raises(UserError, match="there are: a, b, c"):
        lifted(overlays, "d", 6)


def test_as_plain_values_and_back() -> None:
    overlays = Overlay("a", "lr.scale", 0.5, begin=3, end=4), Overlay("c", SKIP, [4, 2], begin=5)
    assert unpack(json.loads(json.dumps(pack(overlays))), "here") == overlays
    assert skipped(overlays) == (Block(4, 2, 4),)
    for damage in ({"value": 900.0}, {"begin": "x"}, {"key": "nothing"}, {"more": 1}):
        with pytest.raises(UserError, match=r"state\.json: damaged overlays"):
            unpack([pack(overlays)[0] | damage], "state.json")
