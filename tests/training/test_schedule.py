"""Phases of a run, and learning rates at the corners of both schedules."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lumina.config.resolve import resolve
from lumina.config.schema.model import MoDConfig
from lumina.errors import UserError
from lumina.model.cost import depth_stages
from lumina.training.schedule import Part, depth_capacity, parts, rate


def made(steps: int = 100, **keys: object) -> tuple[list[Part], str]:
    """The phases of a run with these keys below `train`, or `data` (as `data__mode`), and its schedule."""
    given = {(f"train.{k}" if "__" not in k else k.replace("__", ".")): v for k, v in keys.items()}
    config = resolve("tiny", {"train.lr": 1.0, "train.steps": steps, **given}).config
    return parts(config.train, config.data, steps), config.train.schedule


def rates(steps: int = 100, **keys: object) -> list[float]:
    phases, schedule = made(steps, **keys)
    return [rate(phases, schedule, step) for step in range(1, steps + 1)]


def test_wsd() -> None:
    lr = rates(schedule="wsd", warmup=0.1, decay=0.4)
    assert lr[0] == pytest.approx(0.1)
    assert lr[9:60] == [1.0] * 51
    assert lr[60] < 1
    assert lr[-1] == pytest.approx(1 / 41)
    falls = [a - b for a, b in pairwise(lr[9:])]
    assert falls == pytest.approx([0] * 50 + [1 / 41] * 40)


def test_lengths_in_steps_equal_shares() -> None:
    assert rates(warmup=10, decay=40) == rates(warmup=0.1, decay=0.4)
    assert rates(warmup=0, decay=0) == [1.0] * 100


def test_cosine() -> None:
    lr = rates(schedule="cosine", warmup=0.1)
    assert lr[9] == 1.0
    assert lr[10] == 1.0
    assert lr[55] == pytest.approx(0.5, abs=0.02)
    assert 0 < lr[-1] < 0.001


def test_router_biases_freeze_when_the_decay_starts() -> None:
    ((only,), _) = made(decay=0.4)
    assert only.end - only.decay == 60


# -- phases


@pytest.mark.parametrize(("mode", "data"), [
    ("base", "text"), ("finetune", "chat"), ("hybrid_interleaved", "both"),
])  # fmt: skip
def test_a_run_is_one_phase_of_what_its_mode_reads(mode: str, data: str) -> None:
    ((only,), _) = made(data__mode=mode, warmup=0.1, decay=0.4)
    assert only == Part(0, 100, data, 1.0, 10, 40)


def test_one_after_the_other_has_two_phases_by_itself() -> None:
    (first, second), _ = made(data__mode="hybrid_sequential", data__base_ratio=0.8, warmup=0.1, decay=0.5)
    assert first == Part(0, 80, "text", 1.0, 8, 40)
    assert second == Part(80, 100, "chat", 1.0, 2, 10)


PHASES = [{"at": 0, "lr": 0.5}, {"at": 0.4, "data": "text", "warmup": 5}, {"at": 90, "data": "chat", "lr": 0.2}]


def test_each_phase_has_its_own_data_peak_and_warmup() -> None:
    phases, _ = made(data__mode="hybrid_interleaved", phases=PHASES, warmup=0.1, decay=0.5)
    assert phases == [
        Part(0, 40, "both", 0.5, 4, 20),
        Part(40, 90, "text", 1.0, 5, 25),
        Part(90, 100, "chat", 0.2, 1, 5),
    ]


def test_phases_of_its_own_replace_those_of_the_mode() -> None:
    phases, _ = made(data__mode="hybrid_sequential", phases=[{}, {"at": 50, "data": "chat"}])
    assert [(part.begin, part.end, part.data) for part in phases] == [(0, 50, "both"), (50, 100, "chat")]


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_rate_of_a_phase_is_that_of_a_run_of_its_length(schedule: str) -> None:
    lr = rates(data__mode="hybrid_interleaved", phases=PHASES, warmup=0.1, decay=0.5, schedule=schedule)
    assert lr[:40] == [0.5 * r for r in rates(40, warmup=0.1, decay=0.5, schedule=schedule)]
    assert lr[40:90] == rates(50, warmup=5, decay=0.5, schedule=schedule)
    assert lr[90:] == pytest.approx([0.2 * r for r in rates(10, warmup=0.1, decay=0.5, schedule=schedule)])


def test_a_phase_begins_with_the_step_after_its_border() -> None:
    phases, schedule = made(data__mode="hybrid_interleaved", phases=[{}, {"at": 50, "lr": 9.0}], warmup=0, decay=0)
    assert [rate(phases, schedule, step) for step in (1, 50, 51, 100)] == [1.0, 1.0, 9.0, 9.0]


@given(
    st.integers(4, 300),
    st.lists(st.floats(0.02, 0.95), max_size=4),
    st.one_of(st.floats(0, 0.5), st.integers(0, 2)),
    st.one_of(st.floats(0, 0.5), st.integers(0, 2)),
    st.sampled_from(["wsd", "cosine"]),
)
def test_phases_fill_the_run_and_rates_never_jump_up(
    steps: int, borders: list[float], warmup: float, decay: float, schedule: str
) -> None:
    """Between warm-up and end a phase only falls, in small steps; it is never 0, and never above its peak."""
    begins = sorted({round(border * steps) for border in borders} - {0, steps})
    lengths = [later - earlier for earlier, later in pairwise([0, *begins, steps])]
    assume(warmup < 1 or warmup <= min(lengths))
    phases, schedule = made(
        steps, phases=[{"at": at} for at in [0, *begins]], warmup=warmup, decay=decay, schedule=schedule
    )
    assert [part.begin for part in phases] == [0, *begins]
    assert sum(part.end - part.begin for part in phases) == steps
    assert all(a.end == b.begin for a, b in pairwise(phases))
    for part in phases:
        length = part.end - part.begin
        lr = [part.rate(step, schedule) for step in range(part.begin + 1, part.end + 1)]
        assert all(0 < r <= 1 for r in lr)
        peak = min(part.warmup, length)
        assert lr[:peak] == pytest.approx([(i + 1) / part.warmup for i in range(peak)])
        after = lr[max(0, peak - 1) :]
        assert all(a >= b for a, b in pairwise(after))
        falling = part.decay + 1 if schedule == "wsd" else max(1, length - part.warmup) / 1.6
        assert all(a - b <= 1 / falling + 1e-9 for a, b in pairwise(after))


def test_a_warmup_in_steps_longer_than_a_phase_is_refused() -> None:
    with pytest.raises(UserError, match="the phase that begins at 90 is longer than it is"):
        rates(phases=[{}, {"at": 90}], warmup=20, decay=0.1)


@pytest.mark.parametrize(
    ("mod", "stages"),
    [
        (MoDConfig(capacity=0.125), [(0.125, 100)]),
        (MoDConfig(capacity=0.125, anneal=0.3), [(1.0, 10), (0.5, 10), (0.25, 10), (0.125, 70)]),
        (MoDConfig(capacity=0.125, anneal=50), [(1.0, 16), (0.5, 17), (0.25, 17), (0.125, 50)]),
        (MoDConfig(capacity=0.3, anneal=10), [(1.0, 5), (0.5, 5), (0.3, 90)]),
        (MoDConfig(capacity=0.75, anneal=10), [(1.0, 10), (0.75, 90)]),
        (MoDConfig(capacity=0.125, anneal=1), [(1.0, 0), (0.5, 0), (0.25, 1), (0.125, 99)]),
        (MoDConfig(capacity=1.0), [(1.0, 100)]),
    ],
)
def test_depth_falls_by_halves(mod: MoDConfig, stages: list[tuple[float, int]]) -> None:
    assert depth_stages(mod, 100) == stages
    each = [capacity for capacity, n in stages for _ in range(n)]
    assert [depth_capacity(mod, step, 100) for step in range(1, 101)] == each
