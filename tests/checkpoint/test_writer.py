"""A save in parts: what is on disk is what was there when it began, read back; and whatever fails is heard of."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from lumina.checkpoint import catalogue, phases, readback, retention, store, tensors
from lumina.checkpoint.writer import Way, Writer
from lumina.errors import DiskRefused, UserError

WAYS: tuple[Way, ...] = ("inline", "background")
both_ways = pytest.mark.parametrize("way", WAYS)


def model(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((300, 7), value), "b": torch.full((5,), value).bfloat16(), "n": torch.arange(3)}


def optim(value: float) -> dict[str, Tensor]:
    return {"w.m": torch.full((300, 7), value)}


def begin(writer: Writer, step: int) -> None:
    writer.save(step, model(step), optim(step), {"step": step})


def save(writer: Writer, step: int) -> store.Receipt:
    begin(writer, step)
    writer.finish()
    (receipt,) = writer.poll()
    return receipt


def content(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@both_ways
def test_both_ways_write_what_a_plain_save_writes(way: Way, tmp_path: Path) -> None:
    receipt = save(Writer(tmp_path / "parts", way=way), 7)
    whole = store.save(tmp_path / "whole", 7, model(7), optim(7), {"step": 7})
    assert content(receipt.path) == content(whole.path)
    assert (receipt.step, receipt.bytes, receipt.way, receipt.verified) == (7, whole.bytes, way, True)
    assert receipt.waited <= receipt.stall <= receipt.seconds
    assert receipt.bandwidth == receipt.bytes / receipt.seconds
    assert os.readlink(tmp_path / "parts" / "latest") == "step-000007"


def test_other_readers_of_safetensors_read_the_files(tmp_path: Path) -> None:
    path = save(Writer(tmp_path), 7).path
    read = load_file(path / "model" / tensors.file_name(0))
    assert read.keys() == model(7).keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in model(7).items())


@both_ways
def test_what_changes_after_a_save_began_is_not_in_it(way: Way, tmp_path: Path) -> None:
    writer = Writer(tmp_path, way=way)
    for step in (1, 2, 3):  # the memory that copies go to is used again
        weights = model(step)
        writer.save(step, weights, optim(step), {})
        for tensor in weights.values():
            tensor.zero_()
    writer.finish()
    assert [receipt.step for receipt in writer.poll()] == [1, 2, 3]
    for step in (1, 2, 3):
        target = model(0)
        store.load(store.read(store.folder(tmp_path, step)), target)
        assert torch.equal(target["w"], model(step)["w"])


def test_there_is_one_save_at_a_time_and_its_receipt_says_that_it_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, flush = threading.Event(), phases.flush

    def slow(*arguments: Any) -> None:
        go_on.wait()
        flush(*arguments)

    monkeypatch.setattr(phases, "flush", slow)
    writer = Writer(tmp_path)
    begin(writer, 1)
    assert writer.poll() == []
    assert writer.busy
    assert store.checkpoints(tmp_path) == []
    threading.Timer(0.05, go_on.set).start()
    begin(writer, 2)
    assert [receipt.step for receipt in writer.poll()] == [1]
    writer.finish()
    (second,) = writer.poll()
    assert not writer.busy
    assert 0 < second.waited < second.stall


# -- failures -----------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("failing", ["mkdir", "write", "fsync", "rename", "symlink"])
def test_a_disk_that_refuses_is_heard_of_at_the_next_call_and_changes_nothing(
    way: Way, failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tmp_path, way=way)
    before = content(save(writer, 10).path)
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, refuse)
        failed = "latest: link" if failing == "symlink" else "step-000020: checkpoint"
        with pytest.raises(UserError, match=f"{failed} not written: No space left on device"):
            save(writer, 20)
    assert not writer.busy
    assert not list(tmp_path.glob("*.tmp-*"))
    assert content(store.folder(tmp_path, 10)) == before
    newest, skipped = store.newest(tmp_path)
    assert newest is not None
    assert (newest.step, skipped) == (20 if failing == "symlink" else 10, [])
    assert save(writer, 30).verified


@both_ways
@pytest.mark.parametrize("phase", ["write", "flush", "seal", "publish"])
def test_a_folder_that_vanishes_is_an_error_in_any_phase(
    way: Way, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, real = Writer(tmp_path, way=way), getattr(phases, phase)
    before = content(save(writer, 10).path)

    def vanish(root: Path, aside: Path, *rest: Any) -> Any:
        shutil.rmtree(aside)
        return real(root, aside, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(phases, phase, vanish)
        with pytest.raises(UserError, match="step-000020: checkpoint not written: No such file"):
            save(writer, 20)
    assert content(store.folder(tmp_path, 10)) == before
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000010"]


@both_ways
def test_a_bug_in_the_thread_is_raised_too(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(phases, "flush", bug)
    with pytest.raises(ZeroDivisionError):
        save(Writer(tmp_path, way=way), 1)


def leave(root: Path, way: Way, step: int, error: BaseException) -> None:
    """Leaves a writer with an error while a save is under way."""
    with Writer(root, way=way) as writer:
        begin(writer, step)
        raise error


@both_ways
def test_leaving_with_an_error_lets_a_save_land_and_an_interrupt_does_not_wait(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZeroDivisionError):
        leave(tmp_path, way, 1, ZeroDivisionError())
    assert [store.step_of(path) for path in store.checkpoints(tmp_path)] == [1]
    go_on, write = threading.Event(), tensors.write

    def hanging(*arguments: Any) -> tensors.Entry:
        if way == "background":
            go_on.wait()
        return write(*arguments)

    monkeypatch.setattr(tensors, "write", hanging)
    monkeypatch.setattr(phases, "flush", lambda *_: go_on.wait())
    with pytest.raises(KeyboardInterrupt):
        leave(tmp_path, way, 2, KeyboardInterrupt())
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "checkpoint of step 2")
    go_on.set()
    thread.join()
    assert [store.step_of(path) for path in store.checkpoints(tmp_path)] == [1]


# -- reading back -------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    file = path / "optim" / tensors.file_name(0)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


@pytest.fixture
def bad_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], object]], None]:
    """A disk that harms a checkpoint the moment it is published."""
    publish = phases.publish  # as it was before the test

    def harm_with(harm: Callable[[Path], object]) -> None:
        def published(*arguments: Any) -> Path:
            path = publish(*arguments)
            harm(path)
            return path

        monkeypatch.setattr(phases, "publish", published)

    return harm_with


@both_ways
@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (flip, "optim/.* has other bytes than were saved"),
        (lambda path: (path / "state.json").unlink(), "state.json cannot be read: No such file"),
        (lambda path: (path / "COMPLETE").write_text("{}"), "COMPLETE has other bytes"),
    ],
)
def test_what_the_disk_does_not_give_back_is_set_aside(
    way: Way, harm: Callable[[Path], object], problem: str, tmp_path: Path, bad_disk: Any
) -> None:
    writer = Writer(tmp_path, way=way)
    save(writer, 10)
    bad_disk(harm)
    receipt = save(writer, 20)
    assert receipt.damaged
    assert not receipt.verified
    assert re.search(problem, "; ".join(receipt.problems or ()))
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000010", "step-000020.damaged"]
    assert os.readlink(tmp_path / "latest") == "step-000010"


@both_ways
def test_what_a_damaged_one_replaced_has_its_name_again(way: Way, tmp_path: Path, bad_disk: Any) -> None:
    """The same step twice, as after a run went back, or when a signal saved it before it was evaluated."""
    writer = Writer(tmp_path, way=way)
    before = content(save(writer, 10).path)
    bad_disk(flip)
    assert save(writer, 10).damaged
    assert content(store.folder(tmp_path, 10)) == before
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000010", "step-000010.damaged"]
    assert os.readlink(tmp_path / "latest") == "step-000010"


@both_ways
def test_a_killed_replacement_leaves_both_until_one_is_known_to_last(way: Way, tmp_path: Path, bad_disk: Any) -> None:
    writer = Writer(tmp_path, way=way)
    before = content(save(writer, 10).path)

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    bad_disk(killed)
    with pytest.raises(KeyboardInterrupt):
        save(writer, 10)
    assert content(tmp_path / "step-000010.old") == before
    retention.note_damaged(tmp_path, [store.folder(tmp_path, 10)])
    retention.prune(tmp_path, keep_last=1)
    assert content(tmp_path / "step-000010.old") == before
    bad_disk(lambda _: None)
    assert save(Writer(tmp_path, way=way), 10).verified
    assert sorted(os.listdir(tmp_path)) == ["latest", "notes.json", "step-000010"]


@both_ways
@pytest.mark.parametrize("python", ["no-python", "dies"])
def test_where_no_other_process_reads_it_back_this_one_does(
    way: Way, python: str, tmp_path: Path, bad_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nothing would ever count as verified, nothing older would go, and the disk would fill."""
    (tmp_path / "dies").write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    (tmp_path / "dies").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / python))
    writer = Writer(tmp_path / "root", way=way)
    receipt = save(writer, 1)
    assert (receipt.verified, receipt.damaged) == (True, False)
    why = {
        "no-python": "no process for it: No such file or directory",
        "dies": "its process ended with 3 and said: out of memory",
    }
    assert receipt.problems == (f"read back by the training itself: {why[python]}",)
    bad_disk(flip)
    receipt = save(writer, 2)
    assert (receipt.verified, receipt.damaged) == (False, True)
    assert "has other bytes" in receipt.problems[0]
    assert sorted(os.listdir(tmp_path / "root")) == ["latest", "step-000001", "step-000002.damaged"]


@both_ways
def test_what_has_to_be_done_around_a_save_is_done_in_its_order(way: Way, tmp_path: Path, bad_disk: Any) -> None:
    done: list[str] = []

    def before() -> None:
        done.append(f"before {len(store.checkpoints(tmp_path))}")
        assert threading.current_thread() is not threading.main_thread()

    def after(path: Path) -> None:
        done.append(f"after {path.name}")
        assert threading.current_thread() is not threading.main_thread()
        if path.name == "step-000002":
            raise DiskRefused("step-000001: not deleted", "mend the disk")

    writer = Writer(tmp_path, way=way, before=before, after=after)
    assert save(writer, 1).refused is None
    receipt = save(writer, 2)
    assert receipt.verified  # it lasts; what did not go is another matter
    assert str(receipt.refused).startswith("step-000001: not deleted")
    bad_disk(flip)
    save(writer, 3)  # then nothing else goes
    assert done == ["before 0", "after step-000001", "before 1", "after step-000002", "before 2"]


@both_ways
def test_what_has_to_be_on_the_disk_before_and_is_not_fails_the_save(way: Way, tmp_path: Path) -> None:
    def refused() -> None:
        raise DiskRefused("events.jsonl: not flushed", "mend the disk")

    with pytest.raises(DiskRefused, match="not flushed"):
        save(Writer(tmp_path, way=way, before=refused), 1)
    assert os.listdir(tmp_path) == []


@both_ways
def test_a_damaged_one_that_cannot_be_set_aside_is_said_to_be_damaged(
    way: Way, tmp_path: Path, bad_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tmp_path, way=way)
    save(writer, 10)

    def harm(path: Path) -> None:
        flip(path)
        monkeypatch.setattr(os, "rename", refuse)

    bad_disk(harm)
    receipt = save(writer, 20)
    assert (receipt.verified, receipt.damaged) == (False, True)
    assert "damaged, and not set aside: No space left" in str(receipt.refused)


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("refused", ["open", "readv"])
def test_a_file_system_that_reads_only_through_memory_is_no_damage(
    refused: str, refusal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some refuse when the file is opened, others at the first read or a later one."""
    path, direct, tries = tmp_path / "file", set[int](), 0
    path.write_bytes(bytes(readback.CHUNK + 7))
    open_file, read = os.open, os.readv

    def opened(name: Any, flags: int, *rest: Any) -> int:
        if refused == "open" and flags & os.O_DIRECT:
            raise OSError(refusal, os.strerror(refusal))
        descriptor = open_file(name, flags & ~os.O_DIRECT, *rest)
        direct.discard(descriptor)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def readv(descriptor: int, buffers: Any) -> int:
        nonlocal tries
        tries += descriptor in direct
        if descriptor in direct and tries == 2:
            raise OSError(refusal, os.strerror(refusal))
        return read(descriptor, buffers)

    monkeypatch.setattr(os, "O_DIRECT", getattr(os, "O_DIRECT", 1 << 14), raising=False)
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "readv", readv)
    assert readback.fingerprint_on_disk(path) == readback.fingerprint(path)
    assert tries == (2 if refused == "readv" else 0)


def test_a_disk_that_cannot_be_read_is_not_read_through_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"some")
    tries = 0

    def broken(*_: object) -> int:
        nonlocal tries
        tries += 1
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "readv", broken)
    assert list(readback.damage(tmp_path / "file", "file", 4, "", look=readback.fingerprint_on_disk)) == [
        "file cannot be read: Input/output error"
    ]
    assert tries == 1


def test_reading_back_needs_little_and_ends_with_who_asked(tmp_path: Path) -> None:
    path = save(Writer(tmp_path), 1).path
    seal = catalogue.seal(path)
    code = f"import sys; sys.path[:] = {[p for p in sys.path if 'site-packages' not in p]}; import runpy; "
    library = str(Path(xxhash.__file__).parents[1])
    code += f"sys.argv = ['readback', {str(path)!r}, {seal!r}, sys.argv[1], {library!r}]; "
    code += f"runpy.run_path({readback.__file__!r}, run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run([*command, str(os.getpid())], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
    orphan = subprocess.run([*command, str(os.getpid() + 1)], capture_output=True, text=True)
    assert (orphan.returncode, orphan.stdout) == (1, "")
