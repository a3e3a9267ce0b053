"""How fast files become shards, beside what the tokenizer alone can do and beside `datasets.map`; and its memory.

All arms encode the same documents with the same tokenizer; one of them does nothing else, which is the ceiling of any
that also reads, splits and writes. That the shards hold as many tokens is checked before anything is timed. A training
step and the assembly of its batch are timed beside.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lumina.bench.harness import Arm, Measurement, Ratio, Run, memory_of, timed
from lumina.config.resolve import resolve
from lumina.config.schema.data import DataConfig
from lumina.data.corpus import open_folder
from lumina.data.sample import sample_files
from lumina.data.shards import prepare_folder
from lumina.data.tokenizer import Tokenizer, train_bpe
from lumina.training import setup
from lumina.training.step import train_step

CEILING, OURS, PEER = "encode_batch, in all threads", "lumina data prepare", "datasets.map, 2 processes"
IDS = "the same, and its ids as arrays"  # which the library gives as lists of Python's integers only
STEP, BATCH = "a step of the debug preset", "its batch"
THREADS = "TOKENIZERS_PARALLELISM"
BATCH_CHARACTERS = 1 << 22
VOCAB = 8192
LARGE = "large.txt"
BARS = ((OURS, CEILING, 0.95), (OURS, IDS, 0.95), (OURS, PEER, 1.0))


def suite(copies: int = 2, folder: str = "") -> list[Arm]:
    """The arms, on `copies` of the standard library as JSON lines, a document a file."""
    root = Path(folder) if folder else _temporary()
    texts = [f"# {i}\n{text}" for i, text in enumerate(_texts() * copies)]  # copies differ, so that documents do
    source, tokenizer = _write(root, texts)
    tokens = sum(map(len, tokenizer.encode_batch(texts))) + len(texts)
    _require_same(source, root, tokens)
    arms = [
        Arm(CEILING, lambda: timed(lambda: _encode(tokenizer, texts), "cpu"), tokens),
        Arm(IDS, lambda: timed(lambda: _encode(tokenizer, texts, arrays=True), "cpu"), tokens),
        Arm(OURS, lambda: timed(lambda: _prepare(source, root), "cpu"), tokens),
    ]
    if importlib.util.find_spec("datasets"):
        arms.append(Arm(PEER, lambda: timed(lambda: _map(source, root), "cpu"), tokens))
    return [*arms, *_step_arms()]


def _temporary() -> Path:
    """A folder that goes when the process does."""
    root = tempfile.mkdtemp(prefix="lumina-bench-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return Path(root)


def _require_same(source: Path, root: Path, tokens: int) -> None:
    """What is timed is the same work: shards hold as many tokens, and an end token more where each side begins."""
    _prepare(source, root)
    shards = open_folder(root / "shards")
    made = sum(len(shard.tokens) - 1 for shard in (*shards.train, *shards.heldout))
    if made != tokens:
        raise ValueError(f"{made} tokens are prepared, {tokens} are encoded")


def _texts() -> list[str]:
    return [path.read_text(encoding="utf-8", errors="replace") for path, _ in sample_files()]


def _write(root: Path, texts: Sequence[str]) -> tuple[Path, Tokenizer]:
    root.mkdir(parents=True, exist_ok=True)
    source = root / "corpus.jsonl"
    with source.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    tokenizer = train_bpe(texts, VOCAB)
    tokenizer.save(root / "tokenizer")
    return source, tokenizer


def _encode(tokenizer: Tokenizer, texts: Sequence[str], arrays: bool = False) -> None:
    """Nothing but the library's fastest call, in the batches that we use; then perhaps its ids, as arrays."""
    batch, size = list[str](), 0
    for text in (*texts, None):
        if text is not None:
            batch.append(text)
            size += len(text)
        if text is None or size >= BATCH_CHARACTERS:
            encoded = tokenizer._inner.encode_batch_fast(batch, add_special_tokens=False)
            if arrays:
                _ = [np.array(encoding.ids, np.uint16) for encoding in encoded]
            batch, size = [], 0


def _config(source: Path, root: Path) -> DataConfig:
    return resolve("debug", {"data.train": str(source), "data.tokenizer": str(root / "tokenizer")}).config.data


def _prepare(source: Path, root: Path) -> None:
    shutil.rmtree(root / "shards", ignore_errors=True)
    prepare_folder(_config(source, root), root / "shards", vocab=VOCAB)


def _map(source: Path, root: Path) -> None:
    """Tokenise, then pack into windows of 512, as transformers' `run_clm` does, in two processes for two cores."""
    import datasets
    from tokenizers import Tokenizer as Library

    datasets.disable_progress_bars()
    cache = root / "datasets"
    shutil.rmtree(cache, ignore_errors=True)
    loaded = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(cache))
    name = str(root / "tokenizer" / "tokenizer.json")

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        os.environ[THREADS] = "false"
        global _inner
        if _inner is None:
            _inner = Library.from_file(name)
        return {"ids": [[*e.ids, 0] for e in _inner.encode_batch_fast(rows["text"], add_special_tokens=False)]}

    def pack(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        flat = np.concatenate([np.array(ids) for ids in rows["ids"]])
        return {"ids": np.split(flat, range(512, len(flat), 512))}

    try:
        encoded = loaded.map(encode, batched=True, num_proc=2, remove_columns=loaded.column_names)
        encoded.map(pack, batched=True, num_proc=2)
    finally:
        os.environ[THREADS] = "true"  # the library switches threads off for good, and the other arms would have one


_inner: Any = None


def _step_arms() -> list[Arm]:
    """One training step of the debug preset on the embedded texts and conversations, and the assembly of its batch."""
    keys = {"data.train": ["sample", "sample_chat"], "data.mode": "hybrid_interleaved", "train.compile": "off"}
    resolved = resolve("debug", keys)
    corpus = setup.load_data(resolved.config)
    parts = setup.build(setup.settle_all(resolved, corpus)[0].config, corpus)
    tokens, turn = parts.config.train.batch_tokens, iter(range(10**9))

    def step() -> Run:
        batch = parts.loader.batch(0)
        return timed(
            lambda: train_step(parts.model, parts.optimizer, batch, 0.0, parts.plan, parts.precision, freeze_bias=True),
            "cpu",
        )

    return [Arm(STEP, step, tokens), Arm(BATCH, lambda: timed(lambda: parts.loader.batch(next(turn)), "cpu"), tokens)]


def bars(measured: Measurement) -> list[list[str]]:
    """Each bar, the share that was reached with its interval, and whether the interval bears it."""
    names = {arm.name for arm in measured.arms}
    rows = []
    for ours, other, least in BARS:
        if {ours, other} <= names:
            found = _speed(measured, ours, other)
            rows.append([f"{ours}: at least {least:.0%} of {other}", _share(found), _verdict(found.low >= least)])
    found = measured.ratio(BATCH, STEP)
    return [*rows, [f"{BATCH}: less than 1 % of the step", _share(found, 2), _verdict(found.high < 0.01)]]


def _speed(measured: Measurement, arm: str, to: str) -> Ratio:
    ratio = measured.ratio(to, arm)
    scale = measured.amount(arm) / measured.amount(to)
    return Ratio(*(scale * value for value in (ratio.median, ratio.low, ratio.high)))


def _share(found: Ratio, digits: int = 0) -> str:
    return "{} % [{}, {}]".format(*(f"{100 * v:.{digits}f}" for v in (found.median, found.low, found.high)))


def _verdict(met: bool) -> str:
    return "met" if met else "NOT met"


# -- memory ---------------------------------------------------------------------------------------------------


def memory(sizes: Sequence[int]) -> dict[int, int]:
    """Bytes that preparing a file of so many MB takes at its peak, each in a fresh process, above an empty one."""
    found = {}
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="lumina-bench-") as folder:
            _write(Path(folder), _texts())
            _grow(Path(folder, LARGE), size * 10**6)
            found[size] = memory_of(preparing, [OURS], repeats=1, folder=folder)[OURS]
    return found


def preparing(folder: str) -> list[Arm]:
    """The suite of `memory`: preparing the large file in a folder."""
    root = Path(folder)
    return [Arm(OURS, lambda: timed(lambda: _prepare(root / LARGE, root), "cpu"), 1)]


def _grow(path: Path, size: int) -> None:
    """A text of so many bytes: the standard library again and again, each time with other numbers in it."""
    texts, written, turn = _texts(), 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            for text in texts:
                written += len(text.encode())
                file.write(f"# {turn}\n{text}\n")
                turn += 1
                if written >= size:
                    break
