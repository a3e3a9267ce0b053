"""The phases of a run, those that are written and those that the mode implies."""

from __future__ import annotations

from itertools import pairwise

from lumina.config.schema.base import Problem
from lumina.config.schema.data import DataConfig
from lumina.config.schema.train import Phase, TrainConfig
from lumina.config.units import span


def phases(train: TrainConfig, data: DataConfig) -> tuple[Phase, ...]:
    """`train.phases`, or one, or the two of `hybrid_sequential`: texts for `data.base_ratio` of the run, then chats."""
    if train.phases:
        return train.phases
    if data.mode == "hybrid_sequential":
        return tuple(map(Phase.model_validate, ({"data": "text"}, {"at": data.base_ratio, "data": "chat"})))
    return (Phase.model_validate({}),)


def phase_problems(train: TrainConfig, data: DataConfig) -> list[Problem]:
    """Phases follow one another inside the run, none is without a step, and they want what the mode has."""
    planned, found = phases(train, data), []
    keys = ("train.phases",) if train.phases else ("data.mode", "data.base_ratio")
    steps = train.steps or round(train.known_tokens / train.batch_tokens)  # 0: not known yet
    begins = [span(phase.at, steps) if steps else phase.at for phase in planned]
    comparable = steps or len({begin < 1 for begin in begins[1:]}) < 2  # shares with shares, steps with steps
    if begins[0] != 0 or (comparable and any(later <= earlier for earlier, later in pairwise(begins))):
        found.append(Problem(keys, "the first begins `at` 0, and each later one after the one before it"))
    elif steps and len(planned) > 1 and begins[-1] >= steps:
        found.append(Problem(keys, f"the last would begin when the run of {steps} steps is over"))
    lengths = [later - earlier for earlier, later in pairwise([*begins, steps])] if steps else []
    for phase, length in zip(planned, lengths if train.phases or len(planned) > 1 else [], strict=False):
        warmup = span(train.warmup if phase.warmup is None else phase.warmup, int(length))
        if warmup > length > 0:
            found.append(Problem(keys, f"the warm-up of the phase that begins at {phase.at:g} is longer than it is"))
    if missing := {phase.data for phase in planned} - data.kinds - {"both"}:
        found.append(Problem((*keys, "data.mode"), f"there is no {' and no '.join(sorted(missing))} in this mode"))
    return found
