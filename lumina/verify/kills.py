"""One configuration: a run that is left alone, and runs that are killed again and again, which must end equal to it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lumina.checkpoint import store, writer
from lumina.config.resolve import read
from lumina.events import read_events
from lumina.run import index
from lumina.run.folder import Run
from lumina.training import precision
from lumina.training.trainer import Trainer
from lumina.verify import configurations, moments
from lumina.verify.comparison import differences
from lumina.verify.configurations import DAMAGED, EVERY, STEPS
from lumina.verify.moments import INDEX, PLACES, RESTORING, SETTING_ASIDE, SWEEPING, Instant, Note
from lumina.verify.processes import LONGEST, Ended, fork, last_line

OVERFLOWING = 2.0**22  # fp16's first loss scale: some steps overflow and are skipped, as now and then in a long run
CLOCK_EVERY = 3  # of so many kills one falls at a random time, the others at an exact instant
INSIDE = 2  # exact kills inside a function, to one before and one after it
LATE = 10  # attempts in a row that may end before they are killed
LEFTOVERS = ("*.tmp-*", "*.old", "*.part")

Tell = Callable[[dict[str, Any]], None]
Moment = Instant | float  # seconds after the start of the process


@dataclass(frozen=True)
class Job:
    """A configuration to verify, with so many kills; the first one is the `turn`-th of all moments."""

    preset: str
    name: str
    seed: int
    kills: int
    turn: int
    folder: str


@dataclass(frozen=True)
class Look:
    """What a run folder holds when no process is at it."""

    run: str | None = None
    newest: int = 0  # step of the newest checkpoint that verifies; 0 if there is none
    announced: int = 0  # the last one that the log tells of
    began: tuple[int, ...] = ()  # the steps at which the attempts of the log began
    problems: tuple[str, ...] = ()


class Broken(Exception):  # noqa: N818 - a verdict, not an error of this program
    """The configuration failed so that nothing more can be learned from it."""


class Ordeal:
    """Verifies one configuration; `tell` gets a `kill` after each kill."""

    def __init__(self, job: Job, tell: Tell) -> None:
        self.job, self.tell = job, tell
        self.folder = Path(job.folder) / job.name
        self.log = self.folder / "output.txt"
        row = configurations.named(job.preset, job.name)
        self.settings = configurations.settings(job.preset, row, self.folder)
        self.note = Note()
        self.random = random.Random(f"{job.seed} {job.name}")
        self.done = self.late = 0  # kills; attempts that ended before theirs

    def verdict(self) -> dict[str, Any]:
        """Kills, rounds (runs that were killed), seconds and problems; the folder is gone if there are none."""
        start, rounds, problems = time.perf_counter(), 0, list[str]()
        configurations.write_data(self.folder)
        try:
            whole = self._whole()
            while self.done < self.job.kills and not problems:
                rounds += 1
                problems = self._ask(_verdict, whole, self._round(self.folder / f"killed-{rounds}"))
        except Broken as broken:
            problems = [str(broken)]
        if not problems:
            shutil.rmtree(self.folder)
        seconds = round(time.perf_counter() - start, 2)
        return {"t": "verdict", "kills": self.done, "rounds": rounds, "seconds": seconds, "problems": problems}

    # -- runs -------------------------------------------------------------------------------------------------------

    def _whole(self) -> str:
        """The run that is left alone; learns how long its parts take and how often each place is reached."""
        root, started = self.folder / "whole", time.monotonic()
        ended = self._attempt(root, None)
        self.preparing = self.note.begun - started
        self.training = ended.seconds - self.preparing
        self.calls = list(self.note.calls)
        return str(self._look(root).run)

    def _round(self, root: Path) -> str:
        """One run, killed until it ends before a kill, or until none is left and it may end. Returns its path."""
        look = Look()
        while True:
            moment = self._draw(look.newest) if self.done < self.job.kills else None
            ended = self._attempt(root, moment)
            before, look = look, self._look(root)
            self._require(before, look)
            if not ended.killed:
                self.late = self.late + 1 if moment else 0
                if self.late == LATE:
                    raise Broken(f"{LATE} attempts in a row ended before they were to be killed, the last one {moment}")
                return str(look.run)
            self.done, self.late = self.done + 1, 0
            self._tell_kill(moment, ended, before, look)

    def _attempt(self, root: Path, moment: Moment | None) -> Ended:
        """The same command again, in a process of its own. Raises `Broken` unless it is killed or succeeds."""
        self.note.clear()
        instant = moment if isinstance(moment, Instant) else None
        work = partial(_train, self.job.preset, self.settings, root, self.note, instant)
        ended = fork(work, self.log, moment if isinstance(moment, float) else LONGEST)
        if ended.seconds >= LONGEST:
            raise Broken(f"an attempt did not end within {LONGEST:g} s; it was {self.note.where()}")
        if ended.code not in (0, -signal.SIGKILL):
            raise Broken(f"an attempt ended with exit code {ended.code}: {last_line(self.log)}")
        return ended

    def _draw(self, done: int) -> Moment:
        """When to kill the next attempt, which begins with step `done`."""
        number = self.job.turn + self.done
        share = (STEPS - done) / STEPS
        if number % CLOCK_EVERY == 0:
            return self.random.uniform(0, self.preparing + self.training * share)
        turn = number - number // CLOCK_EVERY - 1
        ahead = {SWEEPING: done > 0, RESTORING: done > 0, SETTING_ASIDE: done < DAMAGED}
        turns = (PLACES[(turn + i) % len(PLACES)] for i in range(len(PLACES)))
        place = next(place for place in turns if ahead.get(place.name, True))
        i = INDEX[place.name]
        call = self.random.randint(1, max(1, int(self.calls[i] * share)))
        inside = [self.random.randint(1, self.note.operations[i])] * INSIDE if self.note.operations[i] else []
        return Instant(place, call, self.random.choice([0, *inside, -1]))

    # -- what must hold after each attempt -----------------------------------------------------------------------------

    def _require(self, before: Look, now: Look) -> None:
        """The attempt between two looks began where the first one said, and what is announced is there."""
        if now.problems:
            raise Broken("; ".join(now.problems))
        for began in now.began[len(before.began) :]:
            if began != before.newest:
                raise Broken(f"an attempt began at step {began}; checkpoint {before.newest} was complete before it")
        if now.newest < now.announced:
            raise Broken(f"checkpoint {now.announced} was announced, but the newest complete one is {now.newest}")

    def _tell_kill(self, moment: Moment | None, ended: Ended, before: Look, now: Look) -> None:
        """Tells of a kill. Raises `Broken` if more was lost than one interval and the write in flight."""
        note = self.note
        trained = before.newest + note.trained
        in_flight = before.newest + note.saving_since > now.newest
        damaged = now.newest == DAMAGED - EVERY and trained >= DAMAGED
        allowed = EVERY * (1 + damaged) + (note.trained - note.saving_since if in_flight else 0)
        exact = isinstance(moment, Instant)
        self.tell(
            {
                "t": "kill",
                "way": "exact" if exact else "clock",
                "moment": moment.place.name if isinstance(moment, Instant) else note.where(),
                "when": str(moment) if exact else f"after {moment:.3f} s",
                "from": before.newest,
                "trained": trained,
                "newest": now.newest,
                "lost": trained - now.newest,
                "seconds": round(ended.seconds, 3),
            }
        )
        if trained - now.newest > allowed:
            raise Broken(f"killed at step {trained}, it goes on from {now.newest}: more than {allowed} steps are lost")

    def _look(self, root: Path) -> Look:
        found = self._ask(_look, root)
        return Look(**found | {key: tuple(found[key]) for key in ("began", "problems")})

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """The answer of another process, so that this one stays without threads."""
        ended = fork(partial(question, *arguments), self.log)
        if ended.code != 0:
            raise Broken(f"what a kill left cannot be read: {last_line(self.log)}")
        return ended.answer


# -- what the forked processes do -----------------------------------------------------------------------------------


def _train(preset: str, settings: dict[str, Any], root: Path, note: Note, instant: Instant | None) -> None:
    precision.FIRST_SCALE = OVERFLOWING
    setattr(writer.Save, "_read_back", _damaging(writer.Save._read_back))  # noqa: B010 - as mypy wants it
    moments.arm(note, instant)
    Trainer(preset, settings, root=root).fit()


def _damaging(read_back: Callable[..., Any]) -> Callable[..., Any]:
    """Reading back from a disk that changes a byte of one checkpoint first: so a run sets one aside."""

    def reading(save: writer.Save, path: Path, *rest: Any) -> Any:
        if store.step_of(path) == DAMAGED:
            with next((path / store.MODEL).iterdir()).open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                last = file.read(1)[0]
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last ^ 1]))
        return read_back(save, path, *rest)

    return reading


def _look(root: Path) -> dict[str, Any]:
    """A `Look` as plain values. Raises whatever reading a file of the run raises."""
    runs = index.runs(root)
    if not runs:
        return asdict(Look())
    run, problems = runs[0], ["the same command began another run"] if len(runs) > 1 else []
    read(run.config)
    events = list(read_events(run.event_log)) if run.event_log.exists() else []
    found, skipped = store.newest(run.checkpoints, own=run.id)
    torn = [(path.name, reason) for path, reason in skipped if store.step_of(path) != DAMAGED]
    problems += [f"a kill left a checkpoint that is passed over: {name}: {reason}" for name, reason in torn]
    sound = (event for event in events if event["t"] == "checkpoint" and event["step"] != DAMAGED)
    announced = max((event["step"] for event in sound), default=0)
    began = tuple(event["step"] for event in events if event["t"] == "run")
    return asdict(Look(str(run.path), found.step if found else 0, announced, began, tuple(problems)))


def _verdict(whole: str, killed: str) -> list[str]:
    """All that is wrong with a killed run that came to its end."""
    expected, run = Run(Path(whole)), Run(Path(killed))
    if not run.finished:
        return ["the run did not come to its end"]
    left = sorted(path for pattern in LEFTOVERS for path in run.path.rglob(pattern))
    problems = [f"left behind: {path.relative_to(run.path)}" for path in left]
    for path in store.checkpoints(run.checkpoints):
        problems += [f"{path.name}: {problem}" for problem in store.verify(path, own=run.id)]
    return problems or differences(expected, run)
