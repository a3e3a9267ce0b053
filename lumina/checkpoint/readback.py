"""Reads a new checkpoint back from the disk, in a process of its own that yields to everything else.

    python -I -S readback.py <folder> <SHA-256 of its COMPLETE> <process that asks> <where xxhash is>

It imports the standard library and xxhash only: it starts in milliseconds, holds no lock and no GPU, writes nothing,
and ends when the process that asked is gone. It prints how many bytes it has read, a line now and then, and a JSON list
of what is wrong. It is the disk that is read, not what the writer left in memory.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

if __name__ == "__main__":
    sys.path.append(sys.argv[4])
import xxhash

Look = Callable[["str | os.PathLike[str]", str], "tuple[int, str]"]
Sign = Callable[[], object]
HASHES: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
CHUNK = 1 << 22
WORD = 64  # chunks
NICEST = 19
# How file systems refuse to go past the memory: some when a file is opened, others not before it is read.
NOT_PAST_MEMORY = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


def fingerprint(path: str | os.PathLike[str], hash: str = "xxh3_128") -> tuple[int, str]:
    """Size in bytes and one of `HASHES`. `OSError` if the file cannot be read."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, HASHES[hash]).hexdigest()
        return file.tell(), digest


def fingerprint_on_disk(
    path: str | os.PathLike[str], hash: str = "xxh3_128", sign: Sign = lambda: None
) -> tuple[int, str]:
    """The same past the memory that the writer left, and without filling it again, where the file system can.

    A `sign` is given for every chunk.
    """
    try:
        return _read(path, getattr(os, "O_DIRECT", 0), hash, sign)
    except OSError as error:
        if error.errno not in NOT_PAST_MEMORY:
            raise
        return _read(path, 0, hash, sign)  # it lives in memory, or elsewhere


def _read(path: str | os.PathLike[str], how: int, hash: str, sign: Sign) -> tuple[int, str]:
    descriptor = os.open(path, os.O_RDONLY | how)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        digest, size, end = HASHES[hash](), 0, os.fstat(descriptor).st_size
        with mmap.mmap(-1, CHUNK) as page, memoryview(page) as buffer:  # begins where a disk can write to
            while size < end and (count := os.readv(descriptor, [buffer])):
                digest.update(buffer[:count])
                size += count
                sign()
        return size, digest.hexdigest()
    finally:
        os.close(descriptor)


def damage(
    path: str | os.PathLike[str], name: str, size: int, digest: str, hash: str = "xxh3_128", look: Look | None = None
) -> Iterator[str]:
    """How a file differs from what was saved as `name`: no item, or one."""
    try:
        found, now = (look or fingerprint)(path, hash)
    except OSError as error:
        yield f"{name} cannot be read: {error.strerror}"
        return
    if found != size:
        yield f"{name} has {found} bytes, {size} were saved"
    elif now != digest:
        yield f"{name} has other bytes than were saved"


def problems(folder: str, seal: str, sign: Sign) -> Iterator[str]:
    """What is not on the disk as it was written. Gives a `sign` for every chunk that it reads."""

    def look(path: str | os.PathLike[str], hash: str) -> tuple[int, str]:
        return fingerprint_on_disk(path, hash, sign)

    complete = os.path.join(folder, "COMPLETE")
    try:
        found = look(complete, "sha256")[1]
    except OSError as error:
        yield f"COMPLETE cannot be read: {error.strerror}"
        return
    if found != seal:
        yield "COMPLETE has other bytes than were saved"
        return
    with open(complete, "rb") as file:
        files = json.load(file)["files"]
    for name, entry in files.items():
        yield from damage(os.path.join(folder, name), name, entry["size"], entry["xxh3_128"], look=look)


def main(folder: str, seal: str, asked_by: str) -> None:
    """Prints now and then how many bytes were read, then what is wrong."""
    chunks = itertools.count(1)

    def sign() -> None:
        if os.getppid() != int(asked_by):
            sys.exit(1)
        if (read := next(chunks)) % WORD == 0:
            print(read * CHUNK, flush=True)

    print(json.dumps(list(problems(folder, seal, sign))))


if __name__ == "__main__":
    os.nice(NICEST)
    main(*sys.argv[1:4])
