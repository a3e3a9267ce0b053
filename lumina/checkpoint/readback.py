"""Reads a new checkpoint back from the disk, in a process of its own that yields to everything else.

    python -I -S readback.py <folder> <SHA-256 of its COMPLETE> <process that asks>

It imports the standard library only: it starts in milliseconds, holds no lock and no GPU, writes nothing, and ends
when the process that asked is gone. It prints a JSON list of what is wrong. The pages that the writer left in memory
are given back first, so that it is the disk that is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator

CHUNK = 1 << 22
NICEST = 19


def fingerprint(path: str | os.PathLike[str]) -> tuple[int, str]:
    """Size in bytes and SHA-256. `OSError` if the file cannot be read."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def damage(path: str | os.PathLike[str], name: str, size: int, sha256: str) -> Iterator[str]:
    """How a file differs from what was saved as `name`: no item, or one."""
    try:
        found, digest = fingerprint(path)
    except OSError as error:
        yield f"{name} cannot be read: {error.strerror}"
        return
    if found != size:
        yield f"{name} has {found} bytes, {size} were saved"
    elif digest != sha256:
        yield f"{name} has other bytes than were saved"


def forget(path: str) -> None:
    """Lets the system drop what it holds of a file in memory, where it can be told to."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def problems(folder: str, seal: str, asked_by: int) -> Iterator[str]:
    """What is not on the disk as it was written."""
    complete = os.path.join(folder, "COMPLETE")
    forget(complete)
    with open(complete, "rb") as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != seal:
        yield "COMPLETE has other bytes than were saved"
        return
    for name, entry in json.loads(content)["files"].items():
        if os.getppid() != asked_by:
            sys.exit(1)
        path = os.path.join(folder, name)
        if os.path.exists(path):
            forget(path)
        yield from damage(path, name, entry["size"], entry["sha256"])


if __name__ == "__main__":
    os.nice(NICEST)
    print(json.dumps(list(problems(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
