"""One process decides, all act: what the main process does through `Controls` the others do with it.

Each call of a method is told to all before it is done. A `UserError` is raised in all of them (`World.decide`,
`World.each`), so those that follow may pass over it: the one that decides hears of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

from lumina.config.overlay import Overlay, Value
from lumina.errors import UserError
from lumina.orchestrator.protocol import Controls, Data, Decision, Fork, Heard, Outcome, Replay
from lumina.parallel.world import World

END, ENTER, LEAVE, RUN = "end", "enter", "leave", "run"


class Leading(Controls):
    """`Controls` that tells the others of each call; they follow until the block ends."""

    def __init__(self, controls: Controls, world: World) -> None:
        self.controls, self.world = controls, world

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._tell(END)

    def _tell(self, what: str, *arguments: Any) -> None:
        self.world.decide(lambda: (what, arguments))

    def _do(self, what: str, *arguments: Any) -> Any:
        self._tell(what, *arguments)
        return getattr(self.controls, what)(*arguments)

    @property
    def step(self) -> int:
        return self.controls.step

    @property
    def overlays(self) -> tuple[Overlay, ...]:
        return self.controls.overlays

    def overlay(self, why: Decision, key: str, value: Value, steps: int | None = None) -> Overlay:
        laid: Overlay = self._do("overlay", why, key, value, steps)
        return laid

    def lift(self, why: Decision, id: str) -> None:
        self._do("lift", why, id)

    def undo(self, why: Decision, *ids: str) -> None:
        self._do("undo", why, *ids)

    def rollback(self, why: Decision, step: int, data: Data = "replay", until: int = 0) -> None:
        self._do("rollback", why, step, data, until)

    @property
    def rest(self) -> int:
        return self.controls.rest

    @property
    def step_seconds(self) -> float:
        return self.controls.step_seconds

    def work(self, overlays: Sequence[Overlay]) -> float:
        return self.controls.work(overlays)

    def alters(self, overlays: Sequence[Overlay]) -> bool:
        return self.controls.alters(overlays)

    def points(self) -> tuple[int, ...]:
        points: tuple[int, ...] = self._do("points")
        return points

    def replan(self, why: Decision) -> None:
        self._do("replan", why)

    def snapshot(self) -> int:
        size: int = self._do("snapshot")
        return size

    @contextmanager
    def _fork(self, step_seconds: float, worth: int) -> Iterator[Fork]:
        self._tell(ENTER, step_seconds, worth)
        try:
            with self.controls.fork(step_seconds, worth) as fork:
                yield _LeadingFork(fork, self)
        finally:
            self._tell(LEAVE)

    def fork(self, step_seconds: float, worth: int = 0) -> AbstractContextManager[Fork]:
        return self._fork(step_seconds, worth)

    def commit(self, why: Decision, fork: Fork, outcome: Outcome) -> list[Heard]:
        assert isinstance(fork, _LeadingFork)
        self._tell("commit", why, None, outcome)  # each has its own fork
        return self.controls.commit(why, fork.fork, outcome)

    def replay(self, before: int) -> Replay | None:
        found: Replay | None = self._do("replay", before)
        return found

    def save(self) -> None:
        self._do("save")

    def stop(self, why: Decision) -> None:
        self._do("stop", why)


class _LeadingFork(Fork):
    def __init__(self, fork: Fork, leading: Leading) -> None:
        self.fork, self.leading = fork, leading

    def run(self, name: str, overlays: Sequence[Overlay], steps: int, probe: int, hold: bool = False) -> Outcome:
        self.leading._tell(RUN, name, tuple(overlays), steps, probe, hold)
        return self.fork.run(name, overlays, steps, probe, hold)


def _main_process_says() -> tuple[str, tuple[Any, ...]]:
    raise AssertionError("nobody follows in the main process")


def follow(controls: Controls, world: World) -> None:
    """Does what the main process says, until it ends.

    What fails here fails in the main process, too, which then ends: only then it is raised, for nobody must be left
    waiting.
    """
    fork: Any = None
    failed: Exception | None = None
    with ExitStack() as stack:
        while True:
            what, arguments = world.decide(_main_process_says)
            if what == END:
                break
            try:
                if what == ENTER:
                    fork = stack.enter_context(controls.fork(*arguments))
                elif what == LEAVE:
                    stack.close()
                elif what == RUN:
                    fork.run(*arguments)
                elif what == "commit":
                    controls.commit(arguments[0], fork, arguments[2])
                else:
                    getattr(controls, what)(*arguments)
            except UserError:
                pass
            except Exception as error:
                failed = error
    if failed:
        raise failed
