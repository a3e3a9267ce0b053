"""What it costs to be watched: the same training with all of it, and with nothing of it, in turns.

`act` has everything: the figures of a step, invariants, what the orchestrator makes of it, looks (with what it makes of
those) and restore points. `bare` has none, but for what training tells anyway: loss, accuracy and the total norm,
copied and written to the log a step later. An arm's turn is some steps; a look and a restore point are timed apart, and
each counts for as many steps as lie between two of them.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lumina.bench import speed
from lumina.bench.harness import TOTAL, Arm, Measurement, Parts, Run
from lumina.config.names import kinds_of
from lumina.config.resolve import resolve
from lumina.config.schema.model import KINDS
from lumina.progress import Tell, silent, tracked
from lumina.run.signals import Requests
from lumina.training import machine
from lumina.training.optim import FIGURES, PARTS, Optimizer, gradient_norms
from lumina.training.session import Session
from lumina.training.trainer import stand

BARE, ACT = "bare", "act"
STEP, LOOK, POINT = "step", "look", "restore point"
TINY, SHAPE_P = "tiny", "P"
PRESETS = {TINY: "tiny", SHAPE_P: "debug"}
AT_ONCE = {TINY: 10, SHAPE_P: 1}  # steps of a turn
BARS = {TINY: 0.03, SHAPE_P: 0.01}
HEADER = ("kind", "bare, ms", "act, ms", "a look, ms", "a restore point, ms", "act over bare", "bar", "verdict")


def suite(size: str, kinds: Sequence[str] = KINDS, keys: Mapping[str, Any] | None = None) -> list[Arm]:
    """Both arms of each kind, tiny or at shape P."""
    return [_arm(size, kind, mode, keys or {}) for kind in kinds for mode in (BARE, ACT)]


def device(size: str, keys: Mapping[str, Any]) -> str:
    """What all arms run on."""
    own = {key: value for key, value in keys.items() if key == "parallel.device"}
    return machine.choose_device(resolve(PRESETS[size], own).config.parallel.device)[0]


def harm(kind: str, steps: int, own: Mapping[str, Any] | None = None, progress: Tell = silent) -> str:
    """What is another after so many tiny steps that are watched than after as many that are not; "" if nothing is."""
    keys: dict[str, Any] = {"model.kind": kind, "train.steps": steps + 1, "train.eval_every": 0, "checkpoint.every": 0}
    keys |= own or {}
    sessions = [
        _begun("tiny", keys | {"orchestrator.mode": mode, "orchestrator.probe_every": 100}) for mode in ("off", "act")
    ]
    for session in sessions:
        for _ in tracked(range(steps), f"{kind}, {session.config.orchestrator.mode}", steps, progress):
            session._step()
        if session.state.progress.step != steps or session.state.attempt:
            return "something was done"
        _require_alive(session)
    off, act = (session.state.tensors() for session in sessions)
    # The probe remembers what it saw in both.
    names = [name for name, tensor in off.items() if not torch.equal(tensor, act[name])]
    return f"not equal: {', '.join(names)}" if names else ""


def _arm(size: str, kind: str, mode: str, keys: Mapping[str, Any]) -> Arm:
    own: dict[str, Any] = {"model.kind": kind, "train.steps": 10**6, "train.eval_every": 0, "checkpoint.every": 0}
    own |= {"train.compile": "off", "orchestrator.probe_every": 0, "orchestrator.snapshot_every": 0}
    own["orchestrator.mode"] = "off" if mode == BARE else "act"
    if size == SHAPE_P:
        own |= {**speed.SHAPE, **speed.OF_KIND[kind], "model.seq_len": 512, "train.batch_tokens": 4096}
    own |= {key: value for key, value in keys.items() if kind in kinds_of(key)}
    preset = PRESETS[size]
    tokens = resolve(preset, own).config.train.batch_tokens
    return Arm(f"{kind} {mode}", lambda: _stepping(preset, own, AT_ONCE[size]), amount=tokens)


def _stepping(preset: str, keys: Mapping[str, Any], steps: int) -> Run:
    session = _begun(preset, keys)
    watched = session.config.orchestrator.mode != "off"
    usual = resolve(preset).config.orchestrator.probe_every
    every = {LOOK: usual, POINT: machine.SNAPSHOT_STEPS}

    def timed(work: Callable[[], object], times: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(times):
            work()
        if session.config.parallel.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def run() -> Parts:
        step = timed(session._step, steps) / steps
        if not watched:
            return {STEP: step, TOTAL: step}
        apart = {LOOK: timed(look), POINT: timed(session.ways.take_point)}
        _require_alive(session)
        return {STEP: step, **apart, TOTAL: step + sum(apart[part] / every[part] for part in every)}

    def look() -> None:
        session.course.seen = None  # it was heard
        session.course.look()
        session.oversight.after_step()

    return run


def _require_alive(session: Session) -> None:
    """Raises `RuntimeError` if the orchestrator ended: nothing costs nothing."""
    thinking = session.oversight.orchestrator
    if session.config.orchestrator.mode != "off" and (thinking is None or thinking.ended):
        raise RuntimeError(f"the orchestrator ended at step {session.state.progress.step}")


def _begun(preset: str, keys: Mapping[str, Any]) -> Session:
    """A session that stands before its first step; its folder goes with the process."""
    stack = ExitStack()
    atexit.register(stack.close)
    root = Path(stack.enter_context(TemporaryDirectory(prefix="lumina-bench-")))
    session = stand(preset, keys, root)
    parts = session.parts
    if session.config.orchestrator.mode == "off":
        parts.optimizer.norms = _total_alone(parts.optimizer)  # type: ignore[method-assign]
        parts.optimizer.sample = _NoSample(session.config.parallel.device)  # type: ignore[assignment]
    session.requests = Requests()  # signals are the benchmark's
    session._open_log(stack)
    stack.enter_context(session.saver.writer)
    session.course.begin()
    session.oversight.begin()
    return session


def _total_alone(optimizer: Optimizer) -> Any:
    def norms() -> Tensor:
        total = gradient_norms(optimizer.gradients(optimizer.groups.clipped))
        return torch.cat([total, total.new_zeros(len(PARTS))])

    return norms


class _NoSample:
    def __init__(self, device: str) -> None:
        self.none = torch.ones(len(FIGURES), device=device)

    def before(self) -> None:
        return None

    def figures(self, before: None) -> Tensor:
        return self.none


def rows(measured: Measurement, size: str) -> list[list[str]]:
    """One row a kind."""
    found = []
    for kind in dict.fromkeys(arm.name.split()[0] for arm in measured.arms if arm.name.endswith(ACT)):
        bare, act = f"{kind} {BARE}", f"{kind} {ACT}"
        ratio, bar = measured.ratio(act, bare), 1 + BARS[size]
        verdict = "met" if ratio.median <= bar else "missed"
        shown = f"{ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"
        parts = [(bare, TOTAL), (act, TOTAL), (act, LOOK), (act, POINT)]
        times = [f"{1e3 * measured.median(arm, part):.2f}" for arm, part in parts]
        found.append([kind, *times, shown, f"<= {bar:.2f}", verdict])
    return found
