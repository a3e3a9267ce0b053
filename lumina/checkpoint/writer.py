"""Saves that let training go on: the steps wait for what needs the tensors, a thread waits for the disk.

    inline      the caller writes and hashes at once, with every core; flushing and publishing happen beside the steps
    background  the caller copies the tensors into memory kept for that; all the rest happens beside the steps

A published checkpoint is read back from the disk by a process of low priority; until that has come, the save is under
way. There is one at a time: a save that finds another under way waits for it. Only the caller's thread, which all
processes have at the same step, speaks with other processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import xxhash

from lumina.checkpoint import phases, places, readback, tensors
from lumina.checkpoint.phases import Buffers, Files, Staged, Tensors
from lumina.checkpoint.store import Receipt, verify
from lumina.errors import UserError
from lumina.parallel.world import ALONE, World
from lumina.progress import Tell, silent

Way = Literal["inline", "background"]
LOOK = 1.0  # seconds between two looks at a save that is waited for


class Unread(Exception):  # noqa: N818 - not an error: somebody else has to look
    """Raised where no other process read a checkpoint back; says why."""


def nothing(*_: object) -> None:
    """What is done around a save by default."""


class Writer:
    """Saves checkpoints below `root`; every process of `world` calls the same methods at the same steps.

    A context: leaving it with an error lets what is under way land if it can, and at once if it was an interrupt.
    """

    def __init__(
        self,
        root: Path,
        world: World = ALONE,
        way: Way = "inline",
        before: Callable[[], object] = nothing,
        after: Callable[[Path], object] = nothing,
    ) -> None:
        """`before` a checkpoint is published something may have to be on the disk; `after` it was read back as it was
        written, others may go. Both are called in the thread of the main process's save.
        """
        self.root, self.world, self.way, self.before, self.after = root, world, way, before, after
        self._buffers = Buffers() if way == "background" else None
        self._under_way: Save | None = None
        self._receipts: list[Receipt] = []
        self._waited = 0.0
        self._far = (0, 1)  # bytes that were read back of the save under way, of how many

    @property
    def busy(self) -> bool:
        """Whether a save is under way, as of the last call."""
        return self._under_way is not None

    def save(self, step: int, model: Tensors, optim: Tensors, state: dict[str, Any]) -> None:
        """Begins a checkpoint of `step`, and returns when the tensors may change again; see `store.save`.

        Raises the error of the save before, if that failed, and begins nothing then.
        """
        self.finish()
        waited, self._waited, start = self._waited, 0.0, time.perf_counter()
        staged = self.world.each(lambda: phases.stage(step, model, optim, state, self.world, self._buffers))
        aside = self.world.decide(lambda: phases.begin(self.root, step))
        save = Save(self, aside, staged, start)
        try:
            if self.way == "inline":
                self.world.each(save.write)
        except BaseException:
            save.drop()
            raise
        self._under_way = save
        stall = waited + time.perf_counter() - start
        save.receipt = replace(save.receipt, way=self.way, waited=waited, stall=stall)
        save.run(save.land)

    def poll(self) -> list[Receipt]:
        """What was published since the last call, read back or found damaged. Raises the error of a save that failed.

        Does not wait. Several processes exchange a few bytes, while a save is under way only.
        """
        self._advance()
        receipts, self._receipts = self._receipts, []
        return receipts

    def finish(self, tell: Tell = silent) -> None:
        """Waits for the save that is under way; the next one's receipt says how long. Raises its error.

        All processes hear how far the main one has read it back: whoever waits for that is alive.
        """
        start, heard = time.perf_counter(), 0
        while save := self._under_way:
            save.join(LOOK)
            self._advance()
            if self._far[0] > heard:
                heard = self._far[0]
                tell(f"reading step {save.staged.step} back", *self._far)
        self._waited += time.perf_counter() - start

    def _advance(self) -> None:
        """Learns where the save stands in every process, and takes the next part if all are ready for it."""
        if (save := self._under_way) is None:
            return
        stands, far = zip(*self.world.collect((save.stands(), save.far)), strict=True)
        self._far = far[0]
        errors = [error for error in stands if isinstance(error, UserError)]
        if errors:
            self._under_way = None
            save.cancel()
            save.join()
            save.drop()
            errors[0].told = stands[self.world.rank] is not errors[0]
            raise errors[0]
        if isinstance(stands[0], Receipt):
            self._under_way = None
            self._receipts.append(stands[0])
            return
        written = [files for files in stands if isinstance(files, dict)]
        if len(written) == self.world.size and self.world.main:
            every = {name: entry for files in written for name, entry in files.items()}
            save.run(lambda: save.publish(every))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if (save := self._under_way) is None:
            return
        if kind is None or (issubclass(kind, Exception) and self.world.size == 1):
            save.join()
        else:  # others may be gone already
            save.cancel()


class Save:
    """One save under way, in this process: a thread takes its parts, the caller asks how it stands."""

    def __init__(self, writer: Writer, aside: Path, staged: Staged, start: float) -> None:
        self.root, self.world, self.before, self.after = writer.root, writer.world, writer.before, writer.after
        self.aside, self.staged, self.start = aside, staged, start
        self.files: Files | None = None
        self.receipt = Receipt(places.folder(self.root, staged.step), staged.step, 0.0, 0, 0.0)
        self.far = (0, 1)  # bytes read back, of how many
        self._cancelled = threading.Event()
        self._reader: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Files | Receipt | BaseException | None = None

    def run(self, part: Callable[[], Files | Receipt]) -> None:
        """Takes a part in a thread of its own."""

        def work() -> None:
            try:
                self._outcome = part()
            except BaseException as error:  # raised where the caller asks how it stands
                self._outcome = error

        self._outcome = None
        self._thread = threading.Thread(target=work, name=f"checkpoint of step {self.staged.step}", daemon=True)
        self._thread.start()

    def stands(self) -> Files | Receipt | UserError | None:
        """None: under way. The files of this process: the disk has them. A receipt: published.

        An error that is no `UserError` is raised.
        """
        outcome = self._outcome
        if isinstance(outcome, BaseException) and not isinstance(outcome, UserError):
            raise outcome
        return outcome

    def join(self, seconds: float | None = None) -> None:
        """Waits for the part that is under way, at most so many seconds."""
        if self._thread:
            self._thread.join(seconds)

    def cancel(self) -> None:
        """Ends what is under way soon; nobody asks for it any more."""
        self._cancelled.set()
        if self._reader:
            self._reader.kill()

    def drop(self) -> None:
        if self.world.main:
            phases.drop(self.aside)

    # -- parts --------------------------------------------------------------------------------------------------

    def write(self) -> None:
        self.files = phases.write(self.root, self.aside, self.staged, self.world.rank, self._cancelled.is_set)

    def land(self) -> Files | Receipt:
        """Waits until the disk has this process's files; a process that is alone publishes them."""
        if self.files is None:
            self.write()
        assert self.files is not None
        phases.flush(self.root, self.aside, self.staged.step, self.files)
        return self.publish(self.files) if self.world.size == 1 else self.files

    def publish(self, files: Files) -> Receipt:
        """Makes `files`, all processes' together, a checkpoint, reads it back, and does what is due then."""
        step = self.staged.step
        seal = phases.seal(self.root, self.aside, step, files)
        self._go_on()
        self.before()
        path = phases.publish(self.root, self.aside, step)
        seconds, size = time.perf_counter() - self.start, sum(entry.size for entry in files.values())
        found, how = self._look(path, seal, size)
        receipt = replace(
            self.receipt,
            path=path,
            seconds=seconds,
            bytes=size,
            verified=not found,
            damaged=bool(found),
            problems=(*found, *how),
        )
        try:
            if receipt.damaged:
                receipt = replace(receipt, path=places.set_aside(path))
                self._bring_back(path)
            else:
                places.settle(path)
                self.after(path)
        except UserError as error:
            receipt = replace(receipt, refused=error)
        return receipt

    def _bring_back(self, path: Path) -> None:
        """What the damaged one at `path` replaced has its name again, unless it is damaged, too."""
        if os.path.lexists(old := places.replaced(path)) and verify(old):
            places.discard(old)
        places.put_back(self.root)
        places.point_latest(self.root)

    def _look(self, path: Path, seal: str, size: int) -> tuple[list[str], list[str]]:
        """What is wrong on the disk; and, where this process had to look itself, why: unread, it would be of no use."""

        def sign() -> None:
            self._go_on()
            self.far = min(self.far[0] + readback.CHUNK, size), size

        try:
            return self._read_back(path, seal, size), []
        except Unread as why:
            return list(readback.problems(str(path), seal, sign)), [f"read back by the training itself: {why}"]

    def _read_back(self, path: Path, seal: str, size: int) -> list[str]:
        """What is wrong on the disk. Raises `Unread` if no process could be asked, or it did not answer."""
        library = str(Path(xxhash.__file__).parents[1])
        command = [sys.executable, "-I", "-S", readback.__file__, str(path), seal, str(os.getpid()), library]
        try:
            self._reader = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except OSError as error:
            raise Unread(f"no process for it: {error.strerror}") from error
        last = "nothing"
        with self._reader as reader:
            for line in map(str.strip, reader.stdout or ()):
                last = line or last
                if line.isdecimal():
                    self.far = min(int(line), size), size
        if code := reader.returncode:
            raise Unread(f"its process ended with {code} and said: {last}")
        found: list[str] = json.loads(last)
        return found

    def _go_on(self) -> None:
        if self._cancelled.is_set():
            raise tensors.Abandoned
