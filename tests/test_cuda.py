"""What only a CUDA device can show: a step that never waits, its kernels, its memory, runs that change devices."""

from __future__ import annotations

import gc
import math
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import KINDS, history, model_config, same_tensors, settings, tensors

from lumina.checkpoint.phases import Buffers
from lumina.config.resolve import read, resolve
from lumina.data.loader import Batch
from lumina.events import read_events
from lumina.model.transformer import Transformer
from lumina.orchestrator.ledger import entries
from lumina.run.folder import Run
from lumina.training.endings import Stopped
from lumina.training.optim import Optimizer
from lumina.training.precision import LossScale, Precision
from lumina.training.step import METRICS, Step, train_step
from lumina.training.trainer import Trainer, resume, stand
from lumina.verify.gauntlet.faults import inf_weight

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="runs where there is a CUDA device: docs/hardware.md says where and when"
)
FP32 = {"precision__mode": "fp32", "parallel__device": "cuda"}
PLAIN, WIDER = ("dense", "mod"), ("fp32", "fp16")  # kinds without experts, formats beside bf16
EXACT = {"train__deterministic": True, "parallel__device": "cuda"}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Determinism and the memory that may be used are the process's."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_per_process_memory_fraction(1.0)


def losses(run: Run) -> list[float]:
    return [event["loss"] for event in run.events() if event["t"] == "step"]


def trained(folder: Path, kind: str, name: str = "run", **keys: Any) -> Run:
    return Trainer("tiny", root=folder / name, **settings(folder, kind, **keys)).fit()


def stop_at(step: int) -> Callable[[dict[str, Any]], None]:
    """A listener that asks for a stop after this step."""

    def stop(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    return stop


def stopped(folder: Path, keys: dict[str, Any], at: int) -> Run:
    """A run that was asked to stop after step `at`."""
    with pytest.raises(Stopped) as stopping:
        Trainer("tiny", root=folder, listeners=[stop_at(at)], **keys).fit()
    return stopping.value.run


def emptied() -> int:
    """Bytes that this process holds on the device after all that nobody needs was given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def parts(kind: str, mode: str, seed: int = 0, **options: Any) -> tuple[Transformer, Optimizer, Precision]:
    precision = Precision(mode, mode.removesuffix("_pure"), "cuda")
    with torch.device("meta"):
        model = Transformer(model_config(kind, **options))
    model.cast(precision.weights)
    model.to_empty(device="cuda")
    model.initialize(seed)
    train = resolve("tiny").config.train
    return model, Optimizer(model, train, loss_scale=LossScale("cuda") if mode == "fp16" else None), precision


def batch(sequences: int = 8, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 260, (sequences, 64), generator=generator)
    segments = (torch.arange(64) > 20).int().expand(sequences, 64).contiguous()
    return Batch(ids, ids.roll(-1, 1), segments, torch.arange(sequences))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16", "bf16_pure"])
def test_every_kind_learns_in_every_format(kind: str, mode: str, tmp_path: Path) -> None:
    run = trained(
        tmp_path, kind, parallel__device="cuda", precision__mode=mode, train__steps=60, checkpoint__every=0,
        train__lr=0.01,
    )  # fmt: skip
    seen = losses(run)
    assert all(map(math.isfinite, seen))
    assert sum(seen[-5:]) / 5 < seen[0] - 1.0


@pytest.mark.parametrize(
    ("kind", "mode"), [*((kind, "bf16") for kind in KINDS), *((kind, mode) for kind in PLAIN for mode in WIDER)]
)
def test_a_step_waits_for_nothing(kind: str, mode: str) -> None:
    """Torch raises at each call that would make the host wait; the first step may, for what it makes once.

    Its grouped product is a kernel in bf16 only; in other formats it loops, and waits to learn where the rows lie.
    """
    model, optimizer, precision = parts(kind, mode)
    plan = Step(2, clip=1.0, z_loss=1e-4, bias_rate=0.001)
    take = lambda i: train_step(model, optimizer, batch(seed=i), 1e-3, plan, precision, False, i)  # noqa: E731
    take(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        metrics = [take(i) for i in (2, 3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert dict(zip(METRICS, metrics[-1].tolist(), strict=False))["count"] == 8 * 64


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_losses_are_those_of_a_cpu(kind: str, tmp_path: Path) -> None:
    here, there = (
        losses(trained(tmp_path, kind, device, precision__mode="fp32", parallel__device=device, checkpoint__every=0))
        for device in ("cuda", "cpu")
    )
    assert here[:4] == pytest.approx(there[:4], abs=1e-3)


def test_grouped_and_loop_kernels_agree(tmp_path: Path) -> None:
    grouped, loop = (
        losses(
            trained(tmp_path, "moe", kernel, model__moe__kernel=kernel, parallel__device="cuda", checkpoint__every=0)
        )
        for kernel in ("grouped", "loop")
    )
    assert grouped == pytest.approx(loop, abs=0.02)


@pytest.mark.filterwarnings("default")  # torch's compiler gives some itself
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_run_is_near_one_that_is_not(kind: str, tmp_path: Path) -> None:
    eager, compiled = (
        losses(trained(tmp_path, kind, how, train__compile=how, checkpoint__every=0, **FP32)) for how in ("off", "on")
    )
    assert compiled == pytest.approx(eager, abs=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_changes_no_bit(kind: str, tmp_path: Path) -> None:
    none, selective, full = (
        trained(tmp_path, kind, how, train__recompute=how, **EXACT) for how in ("none", "selective", "full")
    )
    assert history(none) == history(selective) == history(full)
    assert same_tensors(none, full)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_interrupted_equals_uninterrupted(kind: str, mode: str, tmp_path: Path) -> None:
    keys = {"precision__mode": mode, "train__eval_every": 3, **EXACT}
    whole = trained(tmp_path, kind, "whole", **keys)
    run = stopped(tmp_path / "stopped", settings(tmp_path, kind, **keys), 3)
    assert resume(run).finished
    assert history(run) == history(whole)
    assert same_tensors(run, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_from_one_device_to_the_other_and_back(kind: str, tmp_path: Path) -> None:
    whole = trained(tmp_path, kind, "whole", train__steps=8, **FP32)
    run = stopped(tmp_path / "moved", settings(tmp_path, kind, train__steps=8, **FP32), 3)
    with pytest.raises(Stopped):
        resume(run, [stop_at(5)], settings={"parallel.device": "cpu"})
    assert read(run.config).config.parallel.device == "cpu"
    assert resume(run, settings={"parallel.device": "cuda"}).finished
    assert losses(run) == pytest.approx(losses(whole), abs=5e-3)


def test_both_ways_to_write_leave_the_same_run(tmp_path: Path) -> None:
    """In the background, what is staged in page-locked memory."""
    inline, background = (
        trained(tmp_path, "hybrid", way, checkpoint__write=way, **EXACT) for way in ("inline", "background")
    )
    assert history(inline) == history(background)
    assert same_tensors(inline, background)
    assert {event["verified"] for event in background.events() if event["t"] == "checkpoint"} == {True}
    assert all(tensor.isfinite().all() for tensor in tensors(background).values())


def test_memory_for_copies_is_locked_where_it_lies_and_takes_no_more_than_they() -> None:
    named = {"w": torch.ones(5_000_000, device="cuda"), "b": torch.ones(3, device="cuda")}
    copies = Buffers().copy("model", named)
    assert all(copy.is_pinned() for copy in copies.values())
    assert torch.equal(copies["w"], named["w"].cpu())
    assert copies["w"].untyped_storage().nbytes() == 4 * 5_000_003


def test_memory_that_runs_out_splits_the_batch_and_changes_nothing_else(tmp_path: Path) -> None:
    """The allocator's own error: the process may use less than the largest micro-batch takes."""
    keys = {
        "model.seq_len": 512, "model.layers": 8, "model.width": 256, "model.ffn": 768,
        "train.batch_tokens": 512 * 64, "train.micro_batch": 64, "train.steps": 4,
        "checkpoint.every": 0, "parallel.device": "cuda", "precision.mode": "fp32",
    }  # fmt: skip
    plain = settings(tmp_path, "dense") | keys
    held = emptied()
    torch.cuda.reset_peak_memory_stats()
    whole = Trainer("tiny", root=tmp_path / "whole", **plain).fit()
    peak, total = torch.cuda.max_memory_allocated() - held, torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((emptied() + 0.7 * peak) / total)
    run = Trainer("tiny", root=tmp_path / "scarce", **plain).fit()
    incidents = [event for event in run.events() if event["t"] == "incident"]
    assert incidents[0]["micro_batch"] == [64, 32]
    assert "out of memory" in incidents[0]["said"]
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)  # sums of other parts are rounded otherwise
    assert read(run.config).config.train.micro_batch in (16, 32)


WATCHED = {
    "orchestrator__mode": "act", "orchestrator__snapshot_every": 8, "orchestrator__probe_every": 10,
    "train__steps": 40, "checkpoint__every": 0,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_who_is_watched_is_who_is_not(kind: str, tmp_path: Path) -> None:
    """Looks, invariants and restore points change no bit of training."""
    alone = {"orchestrator__mode": "off", "orchestrator__probe_every": 0}
    act, off = (trained(tmp_path, kind, name, **WATCHED | EXACT | own) for name, own in (("act", {}), ("off", alone)))
    assert [event["loss"] for event in act.events() if event["t"] == "step"] == losses(off)
    weights = [{name: one for name, one in tensors(run).items() if "probe" not in name} for run in (act, off)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_weight_is_taken_back(kind: str, deterministic: bool, tmp_path: Path) -> None:
    """The steps again are the same to the bit where the device's are, and as good where they are not."""
    keys = settings(tmp_path, kind, **WATCHED | EXACT | {"train__deterministic": deterministic})
    healthy = stand("tiny", keys, tmp_path / "healthy")
    healthy.train()
    broken = stand("tiny", keys, tmp_path / "broken")
    inf_weight(broken, 28, 0, 1)
    broken.train()
    acted = [one.action for one in entries(list(read_events(broken.run.event_log))) if one.kind == "act"]
    assert acted[-1] == "rewind_replay"  # the guard left some steps out before it
    assert losses(broken.run) == pytest.approx(losses(healthy.run), abs=0.0 if deterministic else 0.05)
