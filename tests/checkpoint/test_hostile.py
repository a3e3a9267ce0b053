"""Checkpoints made to hurt, each with a COMPLETE that vouches for it: whoever wrote the files could write that too."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina.checkpoint import store, tensors
from lumina.checkpoint.migrations import FORMAT
from lumina.checkpoint.readback import fingerprint
from lumina.errors import UserError

FIRST = "model/" + tensors.file_name(0)
SECOND = "model/" + tensors.file_name(1)
Harm = Callable[[Path], object]


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def seal(path: Path, **more: dict[str, Any]) -> None:
    """Recomputes COMPLETE for whatever is there; `more` are entries that it lists besides."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "COMPLETE"]
    entries = {
        file.relative_to(path).as_posix(): dict(zip(("size", "xxh3_128"), fingerprint(file), strict=True))
        for file in files
    }
    (path / "COMPLETE").write_text(json.dumps({"format": FORMAT, "step": 20, "files": entries | more}))


def pickled(name: str) -> Harm:
    return lambda path: (path / name).write_bytes(pickle.dumps(Bomb(path.parent / "exploded")))


def head(content: dict[str, Any] | bytes, data: int = 4, length: int | None = None, name: str = FIRST) -> Harm:
    """A file with this header, which says it is `length` long, before so many bytes of data."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    made = struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data)
    return lambda path: (path / name).write_bytes(made)


def one(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32", sharding: Any = None) -> dict[str, Any]:
    """The header of one tensor."""
    meta = {} if sharding is None else {"__metadata__": {"DCP_SHARDING_INFO": json.dumps(sharding)}}
    return meta | {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def rows(begin: int) -> dict[str, Any]:
    return one(sharding={"w": {"saved_offsets": [begin]}})


def both(first: Harm, second: Harm) -> Harm:
    return lambda path: (first(path), second(path))


def lists(name: str) -> Harm:
    """COMPLETE lists a file that is not ours to read, with its true size and hash."""

    def harm(path: Path) -> None:
        outside = path.parent / "outside.safetensors"
        shutil.copy(path / FIRST, outside)
        size, digest = fingerprint(outside)
        seal(path, **{name.replace("ROOT", str(path.parent)): {"size": size, "xxh3_128": digest}})

    return harm


def linked(name: str) -> Harm:
    """What has this name is moved out, and a link left that leads there."""

    def harm(path: Path) -> None:
        (path / name).rename(path.parent / "moved")
        (path / name).symlink_to(path.parent / "moved")

    return harm


def pipe(path: Path) -> None:
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")


def text(name: str, content: str) -> Harm:
    return lambda path: (path / name).write_text(content)


DEEP = "[" * 100_000
TWICE = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
TWO = one() | {"v": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}
HARMS: dict[str, tuple[Harm, str]] = {
    "pickle for a tensor file": (pickled(FIRST), "a header of .* bytes in a file of"),
    "pickle for the state": (pickled("state.json"), "state.json cannot be read: UnicodeDecodeError"),
    "pickle beside": (pickled("model/.metadata"), r"lists 'model/\.metadata', which no checkpoint has"),
    "pickle named as tensors": (pickled("optim/data.safetensors"), "a header of .* bytes in a file of"),
    "upwards": (lists("../outside.safetensors"), "lists '../outside.safetensors', which no"),
    "upwards below a kind": (lists("model/../../outside.safetensors"), "which no checkpoint has"),
    "absolute": (lists("ROOT/outside.safetensors"), "which no checkpoint has"),
    "absolute below a kind": (lists("model/ROOT/outside.safetensors"), "which no checkpoint has"),
    "no name": (lists(""), "lists '', which no"),
    "linked file": (linked(FIRST), f"{FIRST} is a link"),
    "linked state": (linked("state.json"), "state.json is a link"),
    "linked folder": (linked("model"), "model is a link"),
    "linked seal": (linked("COMPLETE"), "COMPLETE cannot be read"),
    "pipe": (pipe, "state.json is not a plain file"),
    "empty file": (text(FIRST, ""), "a header of 0 bytes in a file of 0"),
    "giant header": (head(one(), length=2**62), f"a header of {2**62} bytes"),
    "header past the end": (head(one(), length=500), "a header of 500 bytes"),
    "no JSON": (head(b"{"), "model/.*Expecting"),
    "deep JSON": (head(DEEP.encode()), "RecursionError"),
    "a list": (head(b"[1]"), "its header is not that of a safetensors file"),
    "twice": (head(TWICE), "its header gives a name twice"),
    "other fields": (head({"w": {"dtype": "F32"}}), "not that of a safetensors file: KeyError"),
    "a field of another type": (head({"w": 3}), "not that of a safetensors file: TypeError"),
    "unknown dtype": (head(one(dtype="OBJECT")), "unknown dtype 'OBJECT'"),
    "dtype of another type": (head(one(dtype=["F32"])), "not that of a safetensors file: TypeError"),
    "larger shape": (head(one(shape=[1000, 1000])), r"shape \[1000, 1000\] and dtype torch.float32 has 4 bytes"),
    "negative shape": (head(one(shape=[-1, -1])), "has -1 where a size belongs"),
    "boolean shape": (head(one(shape=[True])), "has True where a size belongs"),
    "no dimension": (head(one(shape=[])), "tensor w has no dimension"),
    "past the end": (head(one(shape=[2], offsets=[0, 8])), "its tensors take 8 bytes, 4 are there"),
    "backwards": (head(one(offsets=[4, 0])), "has -4 bytes"),
    "gap": (head(one(offsets=[4, 8]), data=8), "tensor w begins at byte 4, where 0"),
    "overlap": (head(TWO, data=6), "tensor v begins at byte 2, where 4"),
    "rest": (head(one(), data=64), "its tensors take 4 bytes, 64 are there"),
    "rows of others": (head(one(sharding={"x": {"saved_offsets": [0]}})), "DCP_SHARDING_INFO speaks of other"),
    "negative rows": (head(rows(-1)), "has -1 where a size belongs"),
    "too many offsets": (head(one(sharding={"w": {"saved_offsets": [0, 0]}})), "cannot begin at"),
    "rows that are missing": (head(rows(2**40)), f"has rows from {2**40} on, where row 0"),
    "rows twice": (both(head(rows(0)), head(rows(0), name=SECOND)), "has rows from 0 on, where row 1"),
    "rows of two dtypes": (
        both(head(rows(0)), head(rows(1) | {"w": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}, name=SECOND)),
        "has rows of different shapes or dtypes",
    ),
    "state of another type": (text("state.json", "[]"), "not a mapping"),
    "deep state": (text("state.json", DEEP), "state.json cannot be read: RecursionError"),
    "giant state": (lambda path: os.truncate(path / "state.json", 2**27), f"state.json cannot be read.*{2**27} bytes"),
}  # fmt: skip
SEALS = {
    "deep": (DEEP, "RecursionError"),
    "sizes as text": ('{"format":2,"step":20,"files":{"state.json":{"size":"9","xxh3_128":""}}}', "without a size"),
    "a later format": ('{"format":{},"step":20,"files":{}}', "written by something else, in format {}"),
}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A sound checkpoint of step 20, after one of step 10."""
    for step in (10, 20):
        made = store.save(tmp_path, step, {"w": torch.ones(1)}, {"w.m": torch.ones(3)}, {"step": step})
    return made.path


def require_passed_over(path: Path, reason: str) -> None:
    found, skipped = store.newest(path.parent)
    assert found is not None
    assert found.step == 10
    assert [where for where, _ in skipped] == [path]
    with pytest.raises(UserError, match=reason):
        store.read(path)
    assert not (path.parent / "exploded").exists()


@pytest.mark.parametrize("harm", HARMS)
def test_a_hostile_checkpoint_is_passed_over_before_anything_is_loaded(victim: Path, harm: str) -> None:
    hurt, reason = HARMS[harm]
    hurt(victim)
    if not harm.startswith(("upwards", "absolute", "no name", "linked seal")):  # they bring their own
        seal(victim)
    require_passed_over(victim, reason)


@pytest.mark.parametrize("content", SEALS)
def test_a_hostile_seal_is_no_crash(victim: Path, content: str) -> None:
    (victim / "COMPLETE").write_text(SEALS[content][0])
    require_passed_over(victim, SEALS[content][1])


def test_the_bomb_of_these_tests_would_explode(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


def test_the_seal_of_these_tests_is_accepted(victim: Path) -> None:
    seal(victim)
    assert store.verify(victim) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["model", "optim"])
def test_numbers_that_are_not_finite_are_an_error_that_names_the_tensor(
    tmp_path: Path, kind: str, value: float
) -> None:
    given = {"model": {"w": torch.ones(9)}, "optim": {"w.m": torch.ones(9, dtype=torch.bfloat16)}}
    (name,) = given[kind]
    given[kind][name][4] = value
    store.save(tmp_path, 1, given["model"], given["optim"], {})
    with pytest.raises(store.Unsound, match=f"step-000001: {kind} tensor {name}: not all numbers are finite"):
        store.load(store.read(tmp_path / "latest"), {"w": torch.ones(9)}, {"w.m": torch.ones(9, dtype=torch.bfloat16)})
