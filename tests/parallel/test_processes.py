"""Several processes against one: the same gradients, the same run, each other's checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worker
from safetensors.torch import load_file
from several import all_well, several
from support import ended, until, write_text

from lumina.checkpoint import store
from lumina.config.resolve import read
from lumina.data.loader import Loader
from lumina.errors import UserError
from lumina.events import read_events
from lumina.parallel.world import World, join
from lumina.run.folder import Run
from lumina.training.endings import Stopped
from lumina.training.trainer import Trainer, resume
from lumina.verify.comparison import differences

TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes", "1", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node"]


@pytest.mark.parametrize("processes", [2, 4])
def test_one_step_of_several_processes_is_that_of_one(processes: int, tmp_path: Path) -> None:
    out = tmp_path / "gradients.safetensors"
    cases = worker.CASES if processes == 2 else worker.CASES[-2:]
    all_well(processes, worker.write_gradients, out, folder=tmp_path)
    found, one = load_file(out), worker.gradients(cases)
    assert found.keys() == one.keys()
    for name, want in one.items():
        # Muon orthogonalises in bf16: where a sum rounds differently, an update differs in a bf16 digit.
        # In fp16 every product is rounded to it, and the micro-batches have other sizes.
        rounded = " fp16 " in name or (" muon " in name and "grad" not in name)
        tolerance = 3e-3 if rounded else 1e-5
        off = (found[name].double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)
        assert off <= tolerance, f"{name}: {off:.2e}"


def losses(run: Run, kind: str = "step") -> list[float]:
    return [event["loss"] for event in run.events() if event["t"] == kind]


def cut(run: Run, step: int, to: Path) -> Run:
    """A copy of the run as if it had been killed after its checkpoint of `step`."""
    shutil.copytree(run.path, to, symlinks=True)
    copy = Run(to)
    for path in store.checkpoints(copy.checkpoints):
        if store.step_of(path) > step:
            shutil.rmtree(path)
    lines = copy.event_log.read_text().splitlines()
    copy.event_log.write_text("\n".join(lines[:-1]) + "\n")
    return copy


def test_two_processes_train_as_one_does_and_each_goes_on_with_the_others_checkpoints(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    all_well(2, worker.train, tmp_path / "2", text, folder=tmp_path)
    by_two = [Run(path) for kind in worker.KINDS for path in (tmp_path / "2" / kind).iterdir()]
    by_one = worker.train(tmp_path / "1", text)
    for one, two in zip(by_one, by_two, strict=True):
        assert len(losses(one)) == len(losses(two)) == 20
        # On the machines where this was written they are equal to the bit; another's kernels may round otherwise.
        assert losses(two) == pytest.approx(losses(one), abs=1e-4), one.path
        assert losses(two, "eval") == pytest.approx(losses(one, "eval"), abs=1e-4)
        for want, got in zip(*([e for e in run.events() if e["t"] == "eval"] for run in (one, two)), strict=True):
            assert got["heldout_tokens"] == want["heldout_tokens"]
            assert got["bpb"] == pytest.approx(want["bpb"], rel=2e-4)
            assert got["mod_capacity"] == pytest.approx(want["mod_capacity"], abs=5e-3)
        (started,) = [event for event in two.events() if event["t"] == "run"]
        assert started["processes"] == 2

    back = [cut(run, 10, tmp_path / "back" / run.path.name) for run in by_two]
    for run in back:
        resume(run)
    there = [cut(run, 10, tmp_path / "there" / run.path.name) for run in by_one]
    all_well(2, worker.go_on, [run.path for run in there], folder=tmp_path)
    for resumed, whole in zip([*back, *there], [*by_two, *by_one], strict=True):
        assert losses(resumed) == pytest.approx(losses(whole), abs=1e-4)
        last = [event for event in resumed.events() if event["t"] == "run"][-1]
        assert last["parent_step"] == 10


def test_four_processes_some_without_an_expert_and_one_go_on_with_each_others_checkpoints(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    all_well(4, worker.train, tmp_path / "4", text, ["hybrid"], 6, 2, folder=tmp_path)
    (by_four,) = (Run(path) for path in (tmp_path / "4" / "hybrid").iterdir())
    (by_one,) = worker.train(tmp_path / "1", text, ["hybrid"], steps=6)  # in micro-batches of four
    assert losses(by_four) == pytest.approx(losses(by_one), abs=1e-4)
    back, there = (cut(run, 3, tmp_path / name) for run, name in ((by_four, "back"), (by_one, "there")))
    resume(back)
    all_well(4, worker.go_on, [there.path], folder=tmp_path)
    for resumed in (back, there):
        assert losses(resumed) == pytest.approx(losses(by_one), abs=1e-4)
    starts = [event for run in (back, there) for event in run.events() if event["t"] == "run"]
    assert [event["processes"] for event in starts] == [4, 1, 1, 4]
    assert [event["micro_batch"] for event in starts] == [2, 2, 4, 2]  # of four, two is a process's part


def test_two_one_two_and_one_two_processes_train_on_the_same_batches_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, ids = write_text(tmp_path), tmp_path / "ids.txt"
    all_well(2, worker.interrupt_one_of_two, tmp_path, text, ids, folder=tmp_path)
    (whole,), (parts,) = ([Run(path) for path in (tmp_path / name).iterdir()] for name in ("whole", "parts"))
    monkeypatch.setattr(Loader, "ids", worker.noted(ids))
    with pytest.raises(Stopped):
        resume(parts, [worker.stop_at(2 * worker.CUT)])
    worker.interrupt(tmp_path / "one", text, [worker.stop_at(worker.CUT)])
    (one,) = (Run(path) for path in (tmp_path / "one").iterdir())
    all_well(2, worker.go_on, [parts.path, one.path], ids, folder=tmp_path)
    starts = [[e["processes"] for e in run.events() if e["t"] == "run"] for run in (parts, one)]
    assert starts == [[2, 1, 2], [1, 2]]
    for run in (parts, one):
        assert run.finished
        # On the machine where this was written they are equal to the bit; another's kernels may round otherwise.
        assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
        assert losses(run, "eval") == pytest.approx(losses(whole, "eval"), rel=1e-5)
    assert read(parts.config).config == read(whole.config).config
    batches = {tuple(line.split(maxsplit=1)) for line in ids.read_text().splitlines()}
    assert len({i for i, _ in batches}) == len(batches) >= worker.LENGTH


def test_a_process_without_memory_ends_all_and_the_next_start_takes_half_the_micro_batch(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    assert all(several(2, worker.scarce, tmp_path / "two", text, folder=tmp_path))
    said = "".join(path.read_text() for path in tmp_path.glob("said-*.txt"))
    assert "process 1: step 3: DefaultCPUAllocator: can't allocate memory" in said
    (run,) = (Run(path) for path in (tmp_path / "two").iterdir())
    assert not run.finished
    assert json.loads(run.retry.read_text())["micro_batch"] == 2
    all_well(2, worker.scarce, tmp_path / "two", text, folder=tmp_path)
    assert run.finished
    assert not run.retry.exists()
    first, second = (event for event in read_events(run.event_log) if event["t"] == "run")
    assert [(e["micro_batch"], e["processes"]) for e in (first, second)] == [(4, 2), (2, 2)]
    assert second["parent_step"] in (0, 2)  # the save of step 2 was under way, or published
    (told,) = (event for event in run.events() if event["t"] == "incident")
    assert (told["kind"], told["micro_batch"]) == ("out of memory", [4, 2])
    keys = worker.keys_of("moe", text, 6, 4) | {"checkpoint.every": 2}
    alone = Trainer("tiny", keys, root=tmp_path / "one").fit()
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)


def test_a_process_of_two_that_is_killed_in_a_save_costs_one_interval_and_no_bit(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    for how in worker.DEATHS:
        rank, _ = worker.DEATHS[how]
        assert several(2, worker.killed, tmp_path, text, how, folder=tmp_path)[rank] == -signal.SIGKILL
    killed = [Run(path) for how in worker.DEATHS for path in (tmp_path / how).iterdir()]
    for run in killed:
        assert [store.step_of(path) for path in store.checkpoints(run.checkpoints)] == [2]
    beside = [run.path for run in killed]
    all_well(2, worker.go_on_beside_one_left_alone, tmp_path / "whole", text, beside, folder=tmp_path)
    (whole,) = (Run(path) for path in (tmp_path / "whole").iterdir())
    for run in killed:
        assert differences(whole, run) == []
        starts = [event for event in read_events(run.event_log) if event["t"] == "run"]
        assert [(event["parent_step"], event["processes"]) for event in starts] == [(None, 2), (2, 2)]
        assert not [*run.path.rglob("*.tmp-*")]


def test_the_example_runs_and_a_signal_saves_in_all_and_is_said_once(tmp_path: Path) -> None:
    write_text(tmp_path)
    keys = ["data.train=text.txt", "train.steps=100000", "checkpoint.every=0"]
    script = Path(__file__).parents[2] / "examples" / "two_processes.sh"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        ["sh", str(script), "tiny", *keys],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PATH": path},
    )  # fmt: skip
    until(lambda: any('"t":"step"' in log.read_text() for log in tmp_path.glob("runs/*/events.jsonl")), process)
    process.send_signal(signal.SIGTERM)
    out, err = ended(process)
    (path,) = tmp_path.glob("runs/*")
    assert store.verify((path / "checkpoints" / "latest").resolve()) == []
    assert json.loads((path / "events.jsonl").read_text().splitlines()[-1])["reason"] == "stopped", err
    assert out.count("lumina resume") == 1
    assert out.count("[Step 1]") == 1


def test_a_batch_that_does_not_divide_is_said_once_and_leaves_nothing(tmp_path: Path) -> None:
    write_text(tmp_path)
    command = ["-m", "lumina", "train", "tiny", "data.train=text.txt", "train.batch_tokens=192"]
    done = subprocess.run(
        [*TORCHRUN, "2", *command], capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env=os.environ | {"PYTHONWARNINGS": "error"},
    )  # fmt: skip
    assert done.stderr.count("3 sequences do not divide among 2 processes") == 1
    assert "start 1 or 3 processes" in done.stderr
    assert list((tmp_path / "runs").glob("*")) == []


def test_half_of_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    join.cache_clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR"):
        join()
    join.cache_clear()


def test_a_world_of_one_waits_for_nobody() -> None:
    alone = World()
    assert alone.main
    assert alone.decide(lambda: 7) == 7
    assert alone.each(lambda: 7) == 7
    assert alone.max(15) == 15
    assert torch.equal(alone.sum(torch.ones(2)), torch.ones(2))
