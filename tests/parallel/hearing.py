"""Two processes, one of which waits for the other: what the main one says comes while it works, not when it is done."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina.checkpoint import readback, store
from lumina.checkpoint.writer import Writer
from lumina.errors import UserError
from lumina.parallel.world import join
from lumina.progress import Tell

# Reads a checkpoint back, and is not done before the process that waits has heard of it.
READER = """
import time
from pathlib import Path
print(10, flush=True)
end = time.monotonic() + 60
while not Path({heard!r}).exists():
    assert time.monotonic() < end, "not heard"
    time.sleep(0.02)
print("[]")
"""


def main(root: Path) -> None:
    world, words, heard = join(), list[tuple[Any, ...]](), root / "heard"

    def hear(*word: Any) -> None:
        words.append(word)
        if not world.main:
            heard.touch()

    def work(tell: Tell) -> int:
        tell("verifying", 1, 2)
        end = time.monotonic() + 60
        while not heard.exists():
            assert time.monotonic() < end, "not heard"
            time.sleep(0.02)
        tell("verifying", 2, 2)
        return 7

    assert world.follow(work, hear) == 7
    assert words == [("verifying", 1, 2), ("verifying", 2, 2)]

    def fail(tell: Tell) -> None:
        tell("failing", 0, 1)
        raise UserError("no such thing")

    with pytest.raises(UserError, match="no such thing") as failed:
        world.follow(fail, hear)
    assert failed.value.told == (not world.main)
    assert words.pop() == ("failing", 0, 1)

    words.clear()
    heard.unlink(missing_ok=True)
    world.decide(lambda: (root / "reader.py").write_text(READER.format(heard=str(heard))))
    readback.__file__ = str(root / "reader.py")
    writer = Writer(root / "checkpoints", world)
    writer.save(1, {"w": torch.ones(9)}, {}, {})
    writer.finish(hear)
    (receipt,) = writer.poll()
    assert words == [("reading step 1 back", 10, receipt.bytes)]

    words.clear()
    found, _ = store.newest(root / "checkpoints", world, hear)
    assert found
    assert {what for what, _, _ in words} == {"verifying step-000001"}
    assert words[-1][1] == words[-1][2] == receipt.bytes
