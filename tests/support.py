"""Small models, texts and runs that many tests need."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lumina.cli import main
from lumina.config.resolve import resolve
from lumina.config.schema.data import DataConfig
from lumina.config.schema.model import ModelConfig
from lumina.data.files import find_files
from lumina.data.formats import read_files
from lumina.data.records import Problems, Record
from lumina.events import EventWriter
from lumina.run.folder import Run

KINDS = ("dense", "moe", "mod", "hybrid")


def model_config(kind: str, **changes: Any) -> ModelConfig:
    """The tiny preset's model as this kind; `changes` are keys below `model`, `capacity` is the depth capacity."""
    if "capacity" in changes:
        changes["mod.capacity"] = changes.pop("capacity")
    keys = {f"model.{key}": value for key, value in changes.items()}
    return resolve("tiny", {"model.kind": kind, **keys}).config.model


def read_records(specs: Sequence[str]) -> Iterator[Record]:
    """The records of all `specs`, in order; `UserError` with all problems comes after the last one."""
    problems = Problems()
    yield from read_files(find_files(specs, problems), problems)
    problems.raise_any()


def data_config(train: str | Sequence[str], **keys: Any) -> DataConfig:
    """The section `data` with these keys."""
    given = (train,) if isinstance(train, str) else tuple(train)
    return DataConfig.model_validate({"train": given, **keys})


def write_text(folder: Path, lines: int = 600) -> Path:
    """A text file with something to learn: counted lines of a small grammar, about 25 kB."""
    path = folder / "text.txt"
    path.write_text(
        "".join(f"line {i}: {'abc' * (i % 5)} and {i % 7} more words, {i * i % 11}\n" for i in range(lines)),
        encoding="utf-8",
    )
    return path


def write_chats(folder: Path, conversations: int = 200) -> Path:
    """Conversations about sums in the shape of OpenAI's, every third with two turns."""
    path = folder / "chats.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(conversations):
            turns = [(i % 10, i % 7)] if i % 3 else [(i % 10, i % 7), (i % 5, i % 4)]
            said = [(f"What is {a} and {b}, number {i}?", f"It is {a + b}.") for a, b in turns]
            roles = [
                {"role": role, "content": text}
                for pair in said
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            file.write(json.dumps({"messages": roles}) + "\n")
    return path


def contents(folder: Path) -> dict[str, str]:
    """What every name below a folder is. Who holds a lock is no content; a log may have been opened, not written."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path)] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            found[str(path)] = "folder"
        elif path.name != "lock":
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def hugging_face_settings(config: ModelConfig) -> dict[str, Any]:
    """What the classes of transformers call our shape."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.seq_len,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "attn_implementation": "eager",
    }


def require_refusal(
    folder: Path, command: list[str], needles: list[str], capsys: pytest.CaptureFixture[str], output: bool = False
) -> None:
    """A command ends with 2, says all `needles` (on standard error, or on `output` too), and leaves `folder` as it was.

    No traceback, and not more than anybody reads.
    """
    before = contents(folder)
    assert main(command) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    heard = said.out + said.err if output else said.err
    assert not [needle for needle in needles if needle not in heard], heard
    assert len(said.err) < 1500
    assert contents(folder) == before


@contextmanager
def full(events: EventWriter) -> Iterator[None]:
    """Inside the block the writer writes to a device that is always full."""
    path, file = events.path, events._file
    events.path = Path("/dev/full")
    events._file = events.path.open("ab", buffering=0)
    try:
        yield
    finally:
        events._file.close()
        events.path, events._file = path, file


def debug_made_tiny(**changes: str | None) -> list[str]:
    """Settings that make the debug preset, or a file that extends it, a matter of a second.

    A change to None leaves that key alone.
    """
    keys: dict[str, str | None] = {
        "model.width": "32", "model.layers": "2", "model.heads": "2", "model.kv_heads": "1", "model.head_dim": "16",
        "model.vocab": "300", "model.seq_len": "32", "train.batch_tokens": "128", "train.steps": "4",
        "train.eval_every": "2", "checkpoint.every": "2", "parallel.threads": "1", "train.compile": "off",
    }  # fmt: skip
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in keys.items() if value is not None]


def settings(folder: Path, kind: str = "hybrid", **keys: Any) -> dict[str, Any]:
    """A tiny run on `write_text`, in keyword form."""
    return {
        "data.train": str(write_text(folder)),
        "model.kind": kind,
        "train.steps": 6,
        "checkpoint.every": 2,
        **{key.replace("__", "."): value for key, value in keys.items()},
    }


def history(run: Run) -> list[tuple[Any, ...]]:
    """Every logged number that training determines."""
    keys = ("t", "step", "tokens", "loss", "acc", "lr", "grad_norm", "bal", "agree", "bpb")
    return [tuple(event.get(key) for key in keys) for event in run.events() if event["t"] in ("step", "eval")]


def tensors(run: Run) -> dict[str, Tensor]:
    """Every tensor in the run's newest checkpoint."""
    newest = (run.checkpoints / "latest").resolve()
    files = sorted(newest.glob("*/*.safetensors"))
    return {f"{path.parent.name}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def tensors_of(run: Run) -> dict[str, str]:
    """The bytes of each, by a hash."""
    return {
        name: hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors(run).items()
    }


def same_tensors(one: Run, other: Run) -> bool:
    """Whether the newest checkpoints of two runs hold the same tensors, to the bit."""
    return tensors_of(one) == tensors_of(other)


# `python -m lumina`, each batch of which takes its time: whoever watches it and sends signals is never too late.
SLOWLY = """
import sys, time
from lumina.cli import main
from lumina.data.loader import Loader

batch = Loader.batch

def slowly(*which):
    time.sleep(0.05)
    return batch(*which)

Loader.batch = slowly
sys.exit(main())
"""


def until(found: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120) -> Any:
    """What `found` returns once it is true. If the process ends before, or that takes too long, the test fails."""
    end = time.monotonic() + seconds
    while not (value := found()):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"ended with {process.returncode}: {process.communicate()}")
        time.sleep(0.02)
    return value


def ended(process: subprocess.Popen[str], seconds: float = 120) -> tuple[str, str]:
    """What a process said until it ended; one that does not end is killed, and the test fails."""
    try:
        return process.communicate(timeout=seconds)
    finally:
        process.kill()
        process.wait()


def script(path: Path) -> ModuleType:
    """A Python file that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
