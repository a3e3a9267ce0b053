"""What to change when training does not fit: every suggestion is tried here, as somebody would who reads it."""

from __future__ import annotations

import re

import pytest
from support import KINDS

from lumina.config.resolve import resolve
from lumina.config.schema.config import Config
from lumina.planner import remedies as planner_remedies
from lumina.planner.memory import memory, micro_batches, peak
from lumina.planner.remedies import fits, largest_micro_batch, remedies

GIB = 2**30


def tried(preset: str, kind: str, said: str) -> tuple[Config, int]:
    """The configuration that a suggestion leads to, and on how many processes."""
    words = said.split()
    processes = int(words.pop(0)) if words[1:2] == ["processes"] else 1
    words = [word for word in words if "=" in word]
    return resolve(preset, [f"model.kind={kind}", *words]).config, processes


@pytest.mark.parametrize("kind", KINDS)
def test_every_suggestion_makes_it_fit(kind: str) -> None:
    config = resolve("debug_200m", {"model.kind": kind}).config
    capacity = int(0.8 * memory(config, 1, "cuda").training)
    found = remedies(config, capacity, 1, "cuda")
    assert [re.split("[= ]", said)[0] for said in found[:2]] == ["train.micro_batch", "train.recompute"]
    for said in found[:-1]:
        changed, processes = tried("debug_200m", kind, said)
        assert memory(changed, processes, "cuda").training <= capacity, said
    name, *settings = found[-1].split()
    assert fits(resolve(name, settings).config, capacity, 1, "cuda")


def test_suggestions_are_in_the_order_of_their_cost_and_none_is_needless() -> None:
    config = resolve("b1", {"model.kind": "dense"}).config
    found = remedies(config, 12 * GIB, 1, "cuda")
    order = ["train.micro_batch", "train.recompute", "precision.mode", "processes", "model.seq_len", "debug_200m"]
    first = [next(name for name in order if name in said) for said in found]
    assert first == sorted(first, key=order.index)
    assert len(first) >= 3
    assert remedies(config, 10**15, 1, "cuda")[0].startswith("train.micro_batch=")


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    config = resolve("debug_200m", {"model.kind": "dense"}).config
    sizes = micro_batches(config)
    for capacity in (6 * GIB, 12 * GIB, 40 * GIB):
        best = largest_micro_batch(config, capacity, 1, "cuda")
        assert best is not None
        changed = resolve("debug_200m", {"model.kind": "dense", "train.micro_batch": best}).config
        assert memory(changed, 1, "cuda").training <= capacity
        if best != sizes[0]:
            larger = sizes[sizes.index(best) - 1]
            changed = resolve("debug_200m", {"model.kind": "dense", "train.micro_batch": larger}).config
            assert memory(changed, 1, "cuda").training > capacity
    assert largest_micro_batch(config, 2**20) is None


@pytest.mark.parametrize("gib", [2, 3, 5, 8, 20, 60])
def test_the_largest_micro_batch_is_that_of_trying_all(gib: int) -> None:
    config = resolve("debug_200m", {"model.kind": "hybrid", "train.batch_tokens": 122880}).config
    tried = (n for n in micro_batches(config) if holds(config, n, gib * GIB))
    assert largest_micro_batch(config, gib * GIB, 1, "cuda") == next(tried, None)


def holds(config: Config, n: int, capacity: int) -> bool:
    train = config.train.model_copy(update={"micro_batch": n})
    return memory(config.model_copy(update={"train": train}), 1, "cuda").training <= capacity


def test_few_are_tried_for_what_is_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is to answer at once: trying every change at every micro-batch took three times as many."""
    asked: list[int] = []
    monkeypatch.setattr(planner_remedies, "peak", lambda *a: asked.append(1) or peak(*a))
    assert len(remedies(resolve("b7").config, 80 * GIB, 8, "cuda")) == 3
    assert len(asked) < 60


def test_where_nothing_helps_nothing_is_suggested() -> None:
    assert remedies(resolve("tiny").config, 1000) == []


def test_more_processes_are_suggested_where_one_cannot_hold_the_weights() -> None:
    config = resolve("b7").config
    (said,) = (said for said in remedies(config, 80 * GIB, 1, "cuda") if "processes" in said)
    processes = int(said.split()[0])
    changed = resolve("b7", [word for word in said.split() if "=" in word]).config
    assert memory(changed, processes, "cuda").training <= 80 * GIB
    assert not fits(config, 80 * GIB, processes // 4, "cuda")
