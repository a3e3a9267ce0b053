from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lumina.checkpoint import retention, store
from lumina.checkpoint.migrations import FORMAT
from lumina.errors import UserError

State = dict[str, Any]


def tensors(seed: int) -> dict[str, Tensor]:
    """Every dtype and layout a run saves."""
    g = torch.Generator().manual_seed(seed)
    return {
        "fp32": torch.randn(8, 12, generator=g),
        "bf16": torch.randn(5, 3, generator=g).bfloat16(),
        "fp16": torch.randn(4, generator=g).half(),
        "fp64": torch.randn(4, generator=g, dtype=torch.float64),
        "int64": torch.randint(-(2**62), 2**62, (3, 1), generator=g),
        "uint8": torch.randint(0, 255, (7,), generator=g, dtype=torch.uint8),
        "bool": torch.rand(9, generator=g) > 0.5,
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(4, 6, generator=g).T,
        "strided": torch.randn(8, 12, generator=g)[1::2, ::3],
        "expanded": torch.randn(1, 4, generator=g).expand(3, 4),
        "blocks.0.attention.w_qkv": torch.nn.Parameter(torch.randn(2, 3, 4, generator=g)).detach(),
        "extreme": torch.tensor([-0.0, 1e-45, 3.4e38, -3.4e38]),
    }


def like(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in named.items()}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert left[name].shape == right[name].shape
        assert bits(left[name]) == bits(right[name]), name


def save(root: Path, step: int, seed: int | None = None) -> store.Receipt:
    """A checkpoint with two small tensors a side."""
    model = {"w": torch.full((3, 4), float(seed or step)), "b": torch.arange(5)}
    optim = {"w.momentum": torch.full((3, 4), 0.5), "b.momentum": torch.ones(5, dtype=torch.bfloat16)}
    return store.save(root, step, model, optim, {"step": step})


def found(root: Path) -> tuple[int | None, list[tuple[str, str]]]:
    checkpoint, skipped = store.newest(root)
    return checkpoint and checkpoint.step, [(path.name, why) for path, why in skipped]


# -- round trip ---------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_to_the_bit(tmp_path: Path) -> None:
    model, optim = tensors(1), tensors(2)
    state: State = {
        "progress": {"tokens": 2**53 + 1, "loss": 0.1, "pending": [math.inf, 1e-320]},
        "name": "é",
    }
    receipt = store.save(tmp_path, 500, model, optim, state)
    checkpoint, skipped = store.newest(tmp_path)
    assert checkpoint == store.Checkpoint(tmp_path / "step-000500", 500, state)
    assert skipped == []
    targets, moments = like(model), like(optim)
    store.load(checkpoint, targets, moments)
    assert_same(targets, model)
    assert_same(moments, optim)
    assert receipt.path == checkpoint.path
    assert receipt.bytes == sum(
        f.stat().st_size for f in receipt.path.rglob("*") if f.name != "COMPLETE" and f.is_file()
    )


def test_loading_writes_into_parameters_views_and_strided_targets_in_place(tmp_path: Path) -> None:
    saved = torch.randn(4, 6)
    store.save(tmp_path, 1, {name: saved.clone() for name in "abc"}, {}, {})
    parameter, memory = torch.nn.Parameter(torch.zeros(4, 6)), torch.zeros(8, 12)
    targets = {"a": parameter, "b": memory[::2, ::2], "c": torch.zeros(6, 4).T}
    checkpoint, _ = store.newest(tmp_path)
    assert checkpoint is not None
    store.load(checkpoint, targets, {})
    assert torch.equal(parameter, saved)
    assert torch.equal(memory[::2, ::2], saved)
    assert memory[1::2].count_nonzero() == 0
    assert torch.equal(targets["c"], saved)


def test_the_optimizer_can_be_left_out(tmp_path: Path) -> None:
    save(tmp_path, 1)
    target = {"w": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.int64)}
    store.load(store.read(tmp_path / "latest"), target)
    assert target["w"].unique().tolist() == [1.0]


def test_the_folder_holds_what_the_design_says_and_no_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, 7).path
    assert {p.relative_to(path).as_posix().split("/")[0] for p in path.rglob("*")} == {
        "model",
        "optim",
        "state.json",
        "COMPLETE",
    }
    assert {p.suffix for p in (*(path / "model").iterdir(), *(path / "optim").iterdir())} == {".safetensors"}
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000007"]
    assert os.readlink(tmp_path / "latest") == "step-000007"
    seal = json.loads((path / "COMPLETE").read_text())
    assert (seal["format"], seal["step"]) == (FORMAT, 7)
    assert seal["files"]["state.json"]["size"] == (path / "state.json").stat().st_size


def test_scalars_and_values_that_json_would_change_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    root = tmp_path / "checkpoints"
    with pytest.raises(ValueError, match=r"optim tensors without a dimension belong in the state: a, b"):
        store.save(root, 1, {}, {"a": torch.tensor(1.0), "b": torch.tensor(2), "c": torch.ones(1)}, {})
    with pytest.raises(TypeError, match=r"checkpoint state, betas: builtins\.tuple"):
        store.save(root, 1, {}, {}, {"betas": (0.9, 0.95)})
    assert not root.exists()


def test_tied_tensors_are_refused_if_given_twice(tmp_path: Path) -> None:
    tied = torch.ones(3)
    with pytest.raises(RuntimeError, match="share memory"):
        store.save(tmp_path, 1, {"embed": tied, "head": tied}, {}, {})
    assert os.listdir(tmp_path) == []


# -- replacing, linking -------------------------------------------------------------------------------------


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 5, seed=1)
    save(tmp_path, 5, seed=2)
    target = {"w": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.int64)}
    store.load(store.read(store.folder(tmp_path, 5)), target)
    assert target["w"].unique().tolist() == [2.0]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000005"]


def test_a_replaced_one_counts_only_while_there_is_no_successor(tmp_path: Path) -> None:
    old = save(tmp_path, 5, seed=1).path.rename(tmp_path / "step-000005.old")  # killed before the new one came
    checkpoint, _ = store.newest(tmp_path)
    assert checkpoint == store.Checkpoint(old, 5, {"step": 5})
    new = store.Checkpoint(store.folder(tmp_path, 5), 5, {"step": 5})
    shutil.copytree(old, new.path)  # killed before the old one went
    assert store.newest(tmp_path) == (new, [])


def test_links_move_as_a_whole(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
        store.point(tmp_path, "best", step)
    assert store.read(tmp_path / "best").step == store.read(tmp_path / "latest").step == 2
    store.point(tmp_path, "best", 1)
    assert store.read(tmp_path / "best").step == 1
    assert sorted(os.listdir(tmp_path)) == ["best", "latest", "step-000001", "step-000002"]


def test_newer_means_a_larger_step_also_beyond_six_digits(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 20):
        save(tmp_path, step)
    assert [store.step_of(path) for path in store.checkpoints(tmp_path)] == [1_000_000, 999_999, 20]


# -- damage -------------------------------------------------------------------------------------------------


def tensor_file(path: Path, kind: str = "model") -> Path:
    (file,) = (path / kind).glob("*.safetensors")
    return file


def truncate(path: Path) -> None:
    file = tensor_file(path)
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    file = tensor_file(path)
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x10
    file.write_bytes(content)


def swap_files(path: Path) -> None:
    model, optim = tensor_file(path), tensor_file(path, "optim")
    content = model.read_bytes()
    model.write_bytes(optim.read_bytes())
    optim.write_bytes(content)


def edit_the_state(path: Path) -> None:
    (path / "state.json").write_text((path / "state.json").read_text().replace("20", "30"))


def borrow_the_seal(path: Path) -> None:
    shutil.copy(path.parent / "step-000010" / "COMPLETE", path)


def seal(content: str) -> Callable[[Path], object]:
    return lambda path: (path / "COMPLETE").write_text(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"model/\S+ has \d+ bytes, \d+ were saved"),
    "bit flipped": (flip_a_bit, r"model/\S+ has other bytes than were saved"),
    "file deleted": (lambda path: tensor_file(path, "optim").unlink(), r"optim/\S+ is missing"),
    "folder deleted": (lambda path: shutil.rmtree(path / "model"), r"model/\S+ is missing"),
    "files swapped": (swap_files, r"model/\S+ has \d+ bytes.*; optim/\S+ has \d+ bytes"),
    "file added": (lambda path: (path / "model" / "x.safetensors").touch(), "x.safetensors does not belong"),
    "state edited": (edit_the_state, "state.json has other bytes"),
    "state deleted": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "no COMPLETE": (lambda path: (path / "COMPLETE").unlink(), "no COMPLETE: it was never finished"),
    "binary COMPLETE": (lambda path: (path / "COMPLETE").write_bytes(b"\xff\0"), "COMPLETE cannot be read"),
    "torn COMPLETE": (seal('{"format": 1, "st'), "COMPLETE cannot be read"),
    "COMPLETE without files": (seal('{"format": 1, "step": 20}'), "COMPLETE cannot be read: KeyError"),
    "files of another type": (seal('{"format": 1, "step": 20, "files": []}'), "COMPLETE cannot be read"),
    "no file listed": (seal('{"format": 1, "step": 20, "files": {}}'), "does not belong here"),
    "COMPLETE of another step": (borrow_the_seal, "belongs to step 10"),
    "a later format": (seal('{"format": 99, "step": 20, "files": {}}'), "written by a newer lumina, in format 99"),
    "no format at all": (seal('{"format": "1", "step": 20, "files": {}}'), "written by something else, in format '1'"),
}


def test_what_a_file_browser_leaves_is_no_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 20).path
    (path / ".DS_Store").touch()
    (path / "model" / ".DS_Store").touch()
    assert store.verify(path) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 10)
    path = save(tmp_path, 20).path
    hurt, reason = DAMAGES[damage]
    hurt(path)
    step, [(name, why)] = found(tmp_path)
    assert (step, name) == (10, "step-000020")
    assert re.search(reason, why), why
    with pytest.raises(UserError, match="step-000020: damaged checkpoint:\n  - "):
        store.read(path)


def test_all_damage_is_told_at_once_and_nothing_is_left_to_load(tmp_path: Path) -> None:
    path = save(tmp_path, 20).path
    truncate(path)
    edit_the_state(path)
    assert len(store.verify(path)) == 2
    step, skipped = found(tmp_path)
    assert step is None
    assert len(skipped) == 1


def test_an_unreadable_file_is_a_reason_and_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = save(tmp_path, 20).path
    monkeypatch.setattr("lumina.checkpoint.readback.fingerprint", refuse)
    assert [why for why in store.verify(path) if "cannot be read: Input/output error" in why]


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert store.newest(tmp_path / "none") == (None, [])
    with pytest.raises(UserError, match="no such checkpoint"):
        store.read(tmp_path / "latest")


# -- loading into something else ----------------------------------------------------------------------------


def test_every_difference_is_listed_at_once_and_no_target_has_changed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    model = {"w": torch.zeros(4, 3), "b": torch.zeros(5), "new": torch.zeros(1)}
    optim = {"w.momentum": torch.zeros(3, 4), "b.momentum": torch.zeros(6)}
    with pytest.raises(UserError) as error:
        store.load(store.read(tmp_path / "latest"), model, optim)
    assert error.value.message.splitlines() == [
        f"{tmp_path / 'step-000001'}: saved from another model or optimizer:",
        "  - model tensor new is not in the checkpoint",
        "  - model tensor b was saved as torch.int64, wanted is torch.float32",
        "  - model tensor w was saved with shape [3, 4], wanted is [4, 3]",
        "  - optim tensor b.momentum was saved with shape [5], wanted is [6]",
        "  - optim tensor b.momentum was saved as torch.bfloat16, wanted is torch.float32",
    ]
    assert all(tensor.count_nonzero() == 0 for tensor in (*model.values(), *optim.values()))


def test_a_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError) as error:
        store.load(store.read(tmp_path / "latest"), {f"new.{i}": torch.zeros(1) for i in range(30)})
    assert len(error.value.message.splitlines()) == 12
    assert error.value.message.endswith("more")


def test_a_saved_tensor_that_nobody_wants_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match="model tensor b is in the checkpoint only"):
        store.load(store.read(tmp_path / "latest"), {"w": torch.zeros(3, 4)})


def test_a_checkpoint_without_tensors_does_not_fit_a_model_with_some(tmp_path: Path) -> None:
    store.save(tmp_path, 1, {}, {}, {"step": 1})
    checkpoint = store.read(tmp_path / "latest")
    store.load(checkpoint, {}, {})
    with pytest.raises(UserError, match="optim tensor m is not in the checkpoint"):
        store.load(checkpoint, {}, {"m": torch.zeros(1)})


# -- failures and crashes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["mkdir", "rename", "symlink", "fsync"])
def test_a_disk_that_refuses_is_a_user_error_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save(tmp_path, 10)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, refuse)
        failed = "latest: link" if failing == "symlink" else "step-000020: checkpoint"  # the link comes last
        with pytest.raises(UserError, match=f"{failed} not written: No space left on device"):
            save(tmp_path, 20)
    assert not list(tmp_path.glob("*.tmp-*"))
    step, skipped = found(tmp_path)
    assert (step, skipped) == (20 if failing == "symlink" else 10, [])
    assert save(tmp_path, 20).step == 20


def test_a_disk_that_refuses_a_link_or_a_deletion_is_a_user_error_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", refuse)
        patch.setattr(os, "rename", refuse)
        with pytest.raises(UserError, match="best: link not written: Read-only"):
            store.point(tmp_path, "best", 10)
        with pytest.raises(UserError, match="step-000010: not deleted: Read-only"):
            store.discard(store.folder(tmp_path, 10))
    assert found(tmp_path) == (10, [])


def test_an_interrupt_is_still_an_interrupt_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lumina.checkpoint.tensors.write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1)
    assert os.listdir(tmp_path) == []


# Saves step 20 in copies of a folder, killed before the first change to the disk, before the second, …
KILLS = """
import os, shutil, sys
from itertools import count
from pathlib import Path
import torch
from lumina.checkpoint import store

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"}

def save(root, tag):
    store.save(root, 20, {"w": torch.full((2,), 3.0)}, {"w.m": torch.ones(2)}, {"tag": tag})

def kill_at(n, root):
    seen = count(1)
    def hook(event, args):
        if event in CHANGES and str(root) in str(args[:2]) and next(seen) == n:
            os._exit(9)
    sys.addaudithook(hook)

base, replace = Path(sys.argv[1]), sys.argv[2] == "replace"
store.save(base / "0", 10, {"w": torch.zeros(2)}, {}, {"tag": "before"})
if replace:
    save(base / "0", "old")
for n in count(1):
    root = base / str(n)
    shutil.copytree(base / "0", root, symlinks=True)
    child = os.fork()
    if child == 0:
        kill_at(n, root)
        save(root, "new")
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
"""


@pytest.mark.parametrize(("mode", "allowed"), [("add", {"before", "new"}), ("replace", {"old", "new"})])
def test_a_kill_at_any_instant_leaves_the_one_before_or_the_new_one(
    tmp_path: Path, mode: str, allowed: set[str]
) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", KILLS, str(tmp_path), mode], check=True)
    roots = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))[1:]
    assert len(roots) > 15
    seen = []
    for root in roots:
        checkpoint, skipped = store.newest(root)
        assert checkpoint is not None
        assert skipped == []
        seen.append(checkpoint.state["tag"])
        retention.sweep(root)
        assert store.newest(root)[0] is not None
        save(root, 20)
        assert sorted(os.listdir(root)) == ["latest", "step-000010", "step-000020"]
    assert set(seen) == allowed
    assert seen == sorted(seen, key="new".__eq__)  # once it is published it stays
