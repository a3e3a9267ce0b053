"""The planner's memory beside PyTorch's own count of it: `MemTracker` on fake tensors, which have sizes and no memory.

Any preset can be walked so, on any machine. Blocks are alike, so that 2 and 4 of them are walked, and the moments of
a step extrapolated by their number to the preset's depth; the optimizer, whose portions are not proportional to it,
is walked at that depth.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from lumina.bench import report as pages
from lumina.bench.harness import circumstances
from lumina.bench.memory import MOMENTS, walk
from lumina.config.resolve import presets, resolve
from lumina.config.schema.config import Config
from lumina.config.schema.model import KINDS
from lumina.model.cost import CHUNK_ELEMENTS
from lumina.model.transformer import Transformer
from lumina.parallel.sharding import local
from lumina.parallel.world import World
from lumina.planner import memory as forecasts
from lumina.progress import Tell, silent, tracked
from lumina.training import setup
from lumina.training.optim import Optimizer
from lumina.training.precision import Precision

DEPTHS = (2, 4)
MICRO_BATCHES = 2  # the second finds gradients
RECOMPUTED = ("debug_200m", "b1")  # presets walked in every mode of recomputation, too
MODES = ("none", "selective", "full")


class _Totals(MemTracker):
    """Without its hooks on modules, which allow one iteration only; what is wanted is the sum of all storages."""

    def _ignore(self, *_: Any) -> None:
        pass

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _ignore  # type: ignore[assignment]


class TrackerMeter:
    """Reads a `MemTracker`, which begins to count when the first step does."""

    def __init__(self, tracker: MemTracker) -> None:
        self.tracker, self.device = tracker, torch.device("cpu")

    def begin(self, model: Transformer, optimizer: Optimizer) -> None:
        state = {**optimizer.tensors(), **optimizer.step_tensors()}
        parts = [local(tensor) for tensor in (*model.parameters(), *state.values())]
        self.tracker.track_external(*parts, *model.buffers())

    def now(self) -> int:
        held: int = self.tracker.get_tracker_snapshot("current").get(self.device, {}).get("Total", 0)
        return held

    def most(self) -> int:
        peak = max(self.now(), self.tracker._peak_mem.get(self.device, 0))
        self.tracker._peak_mem[self.device] = 0
        return peak


@contextmanager
def large_chunks() -> Iterator[None]:
    """The head's chunks of logits as large as on a GPU, here and for the planner: a thirtieth of them to walk."""
    before, CHUNK_ELEMENTS["cpu"] = CHUNK_ELEMENTS["cpu"], CHUNK_ELEMENTS["cuda"]
    try:
        yield
    finally:
        CHUNK_ELEMENTS["cpu"] = before


def moments(config: Config) -> dict[str, int]:
    """Bytes at the most in each moment of a step of `config` on a CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _model(config)
        with _Totals() as tracker:
            took = walk(config, model, TrackerMeter(tracker), steps=1)
    return {moment: took.most[moment] for moment in MOMENTS}


def shared_moments(config: Config, processes: int) -> dict[str, int]:
    """The same in one of several processes, which has nobody to talk to (torch's fake backend): with real tensors."""
    store = FakeStore()
    torch.distributed.init_process_group("fake", rank=0, world_size=processes, store=store)
    try:
        world = World(size=processes, local_size=processes)
        model = setup.build_model(config, Precision.of(config.precision, "cpu"), world)
        with _Totals() as tracker:
            took = walk(config, model, TrackerMeter(tracker), steps=1, world=world)
    finally:
        torch.distributed.destroy_process_group()
    return {moment: took.most[moment] for moment in MOMENTS}


def optimizer_step(config: Config) -> int:
    """Bytes at the most in an optimizer step alone."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _model(config)
        optimizer = Optimizer(model, config.train)
        with _Totals() as tracker:
            meter = TrackerMeter(tracker)
            meter.begin(model, optimizer)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
            meter.most()
            optimizer.step(1e-4, torch.zeros(()))
            return meter.most()


def _model(config: Config) -> Transformer:
    model = Transformer(config.model, lora=config.train.lora)
    model.cast(Precision.of(config.precision, "cpu").weights)
    for block in model.units:
        block.recompute = config.train.recompute
    return model


# -- every preset ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A preset as a kind, in a number format, recomputed in some way."""

    preset: str
    kind: str
    precision: str
    recompute: str

    def config(self, **keys: Any) -> Config:
        """With two micro-batches of the size that `lumina train` chooses."""
        chosen = self.settings() | keys
        config = resolve(self.preset, chosen).config
        micro = min(forecasts.micro_batch(config), max(1, config.train.batch_tokens // config.model.seq_len // 2))
        sizes = {"train.micro_batch": micro, "train.batch_tokens": MICRO_BATCHES * micro * config.model.seq_len}
        return resolve(self.preset, chosen | sizes).config

    def settings(self) -> dict[str, Any]:
        """Its keys, and nothing left to the machine."""
        kernel = {"model.moe.kernel": "grouped"} if self.kind in ("moe", "hybrid") else {}
        return {
            "model.kind": self.kind,
            "precision.mode": self.precision,
            "precision.eval": self.precision.removesuffix("_pure"),
            "train.recompute": self.recompute,
            "train.compile": "off",
            "train.steps": 10**6,
            "parallel.device": "cpu",
            "parallel.threads": 1,
            **kernel,
        }


def cases(names: Sequence[str]) -> list[Case]:
    """These presets as every kind in fp32 and bf16, as their files recompute; some in every way."""
    found = [
        Case(preset, kind, precision, resolve(preset).config.train.recompute)
        for preset, kind, precision in itertools.product(names, KINDS, ("fp32", "bf16"))
    ]
    several = [name for name in RECOMPUTED if name in names]
    found += [Case(*one) for one in itertools.product(several, KINDS, ("fp32", "bf16", "bf16_pure"), MODES)]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Shared:
    """A small preset, shared out among processes."""

    kind: str
    precision: str
    recompute: str
    preset: str = "debug"
    processes: int = 4

    def config(self) -> Config:
        tokens = MICRO_BATCHES * 2 * self.processes * resolve(self.preset).config.model.seq_len
        sizes = {"train.micro_batch": 2, "train.batch_tokens": tokens}
        case = Case(self.preset, self.kind, self.precision, self.recompute)
        return resolve(self.preset, case.settings() | sizes).config


SHARED = [
    Shared(kind, precision, recompute)
    for kind in KINDS
    for precision, recompute in (("fp32", "none"), ("bf16", "full"))
]


def measure_shared(case: Shared) -> dict[str, Any]:
    """Bytes by moment in one process."""
    return {**vars(case), "walked": shared_moments(case.config(), case.processes)}


def measure(case: Case) -> dict[str, Any]:
    """Bytes by moment: walked at both depths, and extrapolated to the preset's."""
    whole = case.config()
    with large_chunks():
        at = {depth: moments(case.config(**{"model.layers": depth})) for depth in DEPTHS}
        step = optimizer_step(whole)
    few, more = DEPTHS
    slope = {moment: (at[more][moment] - at[few][moment]) / (more - few) for moment in MOMENTS}
    walked = {moment: round(at[more][moment] + (whole.model.layers - more) * slope[moment]) for moment in MOMENTS}
    return {
        **vars(case),
        "layers": whole.model.layers,
        "micro_batch": whole.train.micro_batch,
        "seq_len": whole.model.seq_len,
        "at": {str(depth): found for depth, found in at.items()},
        "walked": walked | {"optimizer": step},
    }


def _compared(walked: Mapping[str, int], forecast: forecasts.Memory) -> dict[str, Any]:
    """What was counted beside what was said of the tensors, which is all that there is to count here."""
    said = {moment: held - forecasts.LIBRARIES["cpu"] for moment, held in forecast.moments.items()}
    peak = max(walked.values())
    return {"walked": walked, "forecast": said, "peak": peak, "error": max(said.values()) / peak - 1}


NAMES = tuple(presets())
HEADER = ("preset", "kind", "precision", "recompute", *MOMENTS, "peak, GiB", "error")


def report(names: Sequence[str] = NAMES, progress: Tell = silent) -> tuple[str, dict[str, Any]]:
    """The page of these presets, and every number of it."""
    chosen = cases(names)
    found = [measure(case) for case in tracked(chosen, "walking", len(chosen), progress)]
    parted = [measure_shared(case) for case in tracked(SHARED, "sharing", len(SHARED), progress)]
    return beside({"about": circumstances("cpu"), "cases": found, "shared": parted})


def beside(measured: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The page of what was counted, whenever that was, and what the planner says of it today."""
    with large_chunks():
        found = [_judged(one, Case) for one in measured["cases"]]
    parted = [_judged(one, Shared) for one in measured["shared"]]
    about = measured["about"]
    return page(found, parted, about), {"about": about, "cases": found, "shared": parted}


def _judged(one: Mapping[str, Any], sort: type[Case] | type[Shared]) -> dict[str, Any]:
    case = sort(**{field.name: one[field.name] for field in fields(sort)})
    return {**one, **_compared(one["walked"], forecasts.memory(case.config(), one.get("processes", 1), "cpu"))}


def page(found: Sequence[Mapping[str, Any]], parted: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """One table of every preset, one of a small one that several processes share."""
    errors = [abs(one["error"]) for one in found]
    said = (
        f"{about['date']}, lumina at {about['commit'] or 'no commit'}, torch {about['torch']}; the forecast over "
        f"MemTracker's count, by moment and of the peak. The largest error of a peak is {max(errors):.1%}, the median "
        f"{statistics.median(errors):.1%}, of {len(found)}."
    )
    whole = pages.table("Memory of every preset beside MemTracker", HEADER, [row(one) for one in found], said)
    several = "In one of four processes that share the model (FSDP2); real tensors."
    return whole.lstrip() + pages.table("Shared out", HEADER, [row(one) for one in parted], several)


def row(one: Mapping[str, Any]) -> list[str]:
    """The errors of each moment and of the peak."""
    errors = [f"{one['forecast'][moment] / one['walked'][moment] - 1:+.1%}" for moment in MOMENTS]
    names = [one[name] for name in HEADER[:4]]
    return [*names, *errors, f"{one['peak'] / 2**30:.2f}", f"{one['error']:+.1%}"]
