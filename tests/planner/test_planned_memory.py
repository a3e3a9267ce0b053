"""The planner's memory beside PyTorch's own count, on fake tensors, and what must hold of it by itself."""

from __future__ import annotations

from typing import Any

import pytest
from support import KINDS

from lumina.bench import memory as walks
from lumina.bench import tracker
from lumina.bench.memory import MOMENTS
from lumina.config.names import kinds_of
from lumina.config.resolve import presets, resolve
from lumina.config.schema.config import Config
from lumina.model.cost import count, state_bytes
from lumina.planner import memory as planned
from lumina.planner.memory import LIBRARIES, Memory, attention_kernel, memory, micro_batch, micro_batches

SMALL: dict[str, Any] = {
    "model.width": 128, "model.layers": 2, "model.heads": 4, "model.kv_heads": 2, "model.head_dim": 32,
    "model.ffn": 352, "model.vocab": 512, "model.seq_len": 64, "model.moe.ffn": 176, "model.moe.kernel": "grouped",
    "train.micro_batch": 4,
    "train.batch_tokens": 512, "precision.mode": "fp32", "train.steps": 9,
}  # fmt: skip


def config(kind: str = "dense", preset: str = "tiny", **keys: Any) -> Config:
    """`keys` with `__` for the dot, over a small shape."""
    own = SMALL | {key.replace("__", "."): value for key, value in keys.items()}
    own = {key: value for key, value in own.items() if kind in kinds_of(key)}
    return resolve(preset, {"model.kind": kind, "precision.eval": own["precision.mode"][:4]} | own).config


COUNTED: list[tuple[str, dict[str, Any]]] = [
    ("dense", {"precision__mode": "bf16", "train__recompute": "selective"}),
    ("dense", {"train__lora__rank": 8, "train__batch_tokens": 256}),
    ("moe", {"model__moe__shared": 1, "model__moe__score": "softmax", "model__moe__balance": 0.01}),
    ("mod", {"precision__mode": "bf16_pure", "train__optimizer": "adamw"}),
    ("hybrid", {"precision__mode": "bf16", "train__recompute": "full", "model__tied": False}),
]


@pytest.mark.parametrize(("kind", "keys"), COUNTED)
def test_every_moment_is_what_pytorch_counts(kind: str, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (walks, planned):
        monkeypatch.setattr(module, "EVAL_TOKENS", 512)
    asked = config(kind, **keys)
    counted, said = tracker.moments(asked), memory(asked).moments
    for moment in MOMENTS:
        assert said[moment] - LIBRARIES["cpu"] == pytest.approx(counted[moment], rel=0.04), moment
    assert max(said.values()) - LIBRARIES["cpu"] == pytest.approx(max(counted.values()), rel=0.01)


def test_the_peak_is_the_largest_moment_and_the_sum_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        found = memory(config(kind))
        assert found.total == max(found.moments.values()) == found.moments[found.moment] == sum(found.parts.values())
        assert ("experts" in found.parts) == (kind in ("moe", "hybrid"))
    monkeypatch.setattr(planned, "EVAL_TOKENS", 64)
    optimizer = memory(config(train__micro_batch=1, model__width=1024, model__ffn=4096))
    assert optimizer.moment == "optimizer"
    assert optimizer.training == optimizer.total


def test_a_longer_batch_and_less_recomputation_take_more() -> None:
    def taken(**keys: Any) -> int:
        found = memory(config("hybrid", **keys)).moments
        return max(found["forward"], found["backward"])

    assert taken(train__micro_batch=1) < taken(train__micro_batch=2) < taken(train__micro_batch=4)
    modes = [taken(train__recompute=mode, train__batch_tokens=256) for mode in ("full", "selective", "none")]
    assert modes == sorted(modes)
    assert modes[0] < modes[2]
    one, two = (memory(config("hybrid", train__batch_tokens=tokens)).moments["forward"] for tokens in (256, 512))
    assert two - one >= 4 * count(config("hybrid").model).total  # gradients of the micro-batch before


def test_a_capacity_that_falls_takes_what_it_begins_with() -> None:
    falling, whole = (
        memory(config("mod", **{f"model__mod__{key}": value})) for key, value in (("anneal", 4), ("capacity", 1))
    )
    assert falling.moments["forward"] == whole.moments["forward"] > memory(config("mod")).moments["forward"]


def test_every_gradient_and_moment_is_there_and_shared_out() -> None:
    asked = config("moe", train__optimizer="adamw")
    state = state_bytes(asked.model, "adamw", "fp32")
    alone, shared = memory(asked), memory(asked, processes=4)
    at_optimizer = alone.moments["optimizer"] - LIBRARIES["cpu"]
    assert at_optimizer == pytest.approx(state.total, rel=0.01)
    assert shared.moments["optimizer"] - LIBRARIES["cpu"] == pytest.approx(at_optimizer / 4, rel=0.02)
    assert shared.parts["gathered"] > 0
    assert "gathered" not in alone.parts


def test_adapters_leave_weights_without_gradient() -> None:
    whole, adapted = memory(config()), memory(config(train__lora__rank=4))
    small, large = (found.moments["optimizer"] - LIBRARIES["cpu"] for found in (adapted, whole))
    assert small < large / 3
    assert adapted.parts["weights"] > whole.parts["weights"]


def test_spare_slots_are_told_apart() -> None:
    plain, spare = memory(config("moe")), memory(config("moe", model__moe__spare=4))  # as many again
    assert "spare slots" not in plain.parts
    experts = 2 * 4 * 3 * 128 * 176  # layers, slots, matrices
    assert spare.parts["spare slots"] == pytest.approx(4 * 3 * experts, rel=0.05)  # weights, gradients, momentum
    assert spare.parts["weights"] == plain.parts["weights"]


def test_a_gpu_gets_what_a_cpu_does_not() -> None:
    half, wide = config(precision__mode="bf16"), config()
    assert attention_kernel(half, "cpu") == "flash"
    assert attention_kernel(half, "cuda") == "cudnn"
    assert attention_kernel(wide, "cuda") == "math"
    assert attention_kernel(config(model__kv_heads=4), "cuda") == "efficient"
    long = config(model__seq_len=256, train__batch_tokens=2048)
    square = 4 * 4 * 256**2 * 4  # sequences, heads, positions, bytes: what each of two blocks keeps
    plain, fused = (memory(long, device="cuda", attention=kernel).training for kernel in ("math", "efficient"))
    assert plain > fused + 1.5 * square
    state = state_bytes(half.model, "muon", "bf16")
    copy = state.weights + state.moments
    assert memory(half, device="cuda").host == 4 * copy  # two restore points, that of a replay, that of a save
    assert memory(half).host == 3 * copy  # a CPU's run writes from where it stands
    assert memory(config(orchestrator__mode="off")).host == 0


def test_what_is_left_to_the_machine_is_filled_in_as_it_does() -> None:
    for preset in presets():
        asked = resolve(preset).config
        sizes = micro_batches(asked)
        chosen = micro_batch(asked)
        assert sizes == sorted(sizes, reverse=True)
        assert asked.train.batch_tokens // asked.model.seq_len % chosen == 0
        assert chosen == 1 or chosen * asked.model.seq_len <= planned.MICRO_TOKENS
        assert isinstance(memory(asked, device="cuda"), Memory)
    assert micro_batch(config(train__micro_batch=2)) == 2
