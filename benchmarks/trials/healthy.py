"""Trials on healthy runs, of candidates that harm or do nothing: how many a trial would commit. None should be.

    python benchmarks/trials/healthy.py run dense 30 FILE.jsonl       # one run and the trial on it; --help for more
    python benchmarks/trials/healthy.py report NAME FILE.jsonl ...    # NAME.md beside this file, from raw files

A run trains to the fork; there the product's own trial is held, with pairs of arms that share a control. Each candidate
is then judged as if it had been alone, the easiest bar; where several are tried the product asks more of each. A
process whose time is over stops; each row that it wrote is valid, and a trial that lacks its last pair counts where no
third pair could have made it win.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pilot import BEGAN, KEYS, LateError, Writer

from lumina.bench.report import table
from lumina.config.overlay import Overlay
from lumina.orchestrator.candidates import Candidate
from lumina.orchestrator.protocol import Fork, Outcome
from lumina.orchestrator.trial import Judged, Size, judge
from lumina.orchestrator.trying import CONTROL, Trial
from lumina.training.controls import SessionControls
from lumina.training.session import Session
from lumina.training.trainer import stand
from lumina.verify.report import about

STEPS, FORK = 1200, 400
SIZE = Size(100, 100, 3)
ID = "healthy"  # of the trial
USUAL = (
    Candidate("lr x0.25", "lr.scale 0.25", (("lr.scale", 0.25),)),
    Candidate("lr x2", "lr.scale 2", (("lr.scale", 2.0),)),
    Candidate("lr x4", "lr.scale 4", (("lr.scale", 4.0),)),
    Candidate("clip 0.3", "clip 0.3", (("clip", 0.3),)),
    Candidate("weight decay x3", "weight_decay 0.3", (("weight_decay", 0.3),)),
    Candidate("z loss x10", "z_loss 1e-3", (("z_loss", 1e-3),)),
    Candidate("fresh moments", "optimizer.reset", (("optimizer.reset", 1), ("lr.warmup", 20))),
)
CANDIDATES = {
    "dense": USUAL,
    "moe": (
        Candidate("balance 0.1", "balance 0.1", (("balance", 0.1),)),
        Candidate("temperature 2", "temperature 2", (("temperature", 2.0),)),
        Candidate("no bias", "bias_rate 0", (("bias_rate", 0.0),)),
        Candidate("expert dropout 0.2", "expert_dropout 0.2", (("expert_dropout", 0.2),)),
        *USUAL,
    ),
    "mod": (
        Candidate("frozen predictor", "predictor 0", (("predictor", 0.0),)),
        Candidate("capacity x2", "mod_capacity 0.5", (("mod_capacity", 0.5),)),
        *USUAL,
    ),
}
GRAIN, FARTHEST = 1e-4, 1.0  # gains of a missing pair that are looked through, nats
PILOT = {"lr x0.25", "lr x2", "clip halved", "weight decay x3"}  # of its candidates those that do not help


class EnoughError(Exception):
    """The trial was held: what is left of the run is of no interest."""


class Told(Fork):
    """A fork whose arms are told as they end; none begins when the time of this process is over."""

    def __init__(self, fork: Fork, told: Writer, deadline: float) -> None:
        self.fork, self.told, self.deadline = fork, told, deadline

    def run(self, name: str, overlays: Sequence[Overlay], steps: int, probe: int, hold: bool = False) -> Outcome:
        if time.monotonic() > self.deadline:
            raise LateError
        outcome = self.fork.run(name, overlays, steps, probe, hold)
        if probe:  # else what is kept of a winner is run again
            arm, pair = name.removeprefix(f"{ID}-").rsplit("-", 1)
            self.told("end", arm=arm, pair=int(pair), steps=steps, probe=probe, loss=outcome.heldout)
        return outcome


def run(
    kind: str, seed: int, path: Path, names: Sequence[str], seconds: float, size: Size, truth: bool, code: str | None
) -> None:
    """Trains one run to the fork and holds a trial of these candidates there; or, for `truth`, goes on to the end."""
    told = Writer(path, kind=kind, seed=seed)
    keys = KEYS | {"model.kind": kind, "train.steps": STEPS, "train.batch_tokens": 512, "train.seed": seed}
    keys |= {"train.optimizer": "muon"}
    tried = tuple(one for one in CANDIDATES[kind] if not names or one.name in names)
    if missing := {*names} - {one.name for one in tried}:
        raise SystemExit(f"no such candidates of {kind}: {', '.join(sorted(missing))}")
    with tempfile.TemporaryDirectory(prefix="lumina-healthy-") as folder:
        session = stand("tiny", keys, Path(folder))
        told("about", **about() | ({"commit": code} if code else {}), device="cpu", keys=keys)
        hold = partial(go_on, session, tried, told) if truth else partial(try_out, session, tried, size, told, seconds)
        step = session._step

        def stepping() -> None:
            step()
            if session.state.progress.step == FORK:
                told("fork", step=FORK, step_ms=1e3 * session.state.progress.wall / FORK)
                hold()
                raise EnoughError
            if time.monotonic() > BEGAN + seconds:
                raise LateError

        session._step = stepping  # type: ignore[method-assign]
        try:
            session.train()
        except EnoughError:
            told("done", seconds=time.monotonic() - BEGAN)
        except LateError:
            told("late", seconds=time.monotonic() - BEGAN)


def try_out(session: Session, tried: tuple[Candidate, ...], size: Size, told: Writer, seconds: float) -> None:
    controls = SessionControls(session)
    trial = Trial(ID, tried, size, controls.step + 1, decay=0, placebo=False, exact=True)
    with controls.fork(controls.step_seconds, size.steps + size.probe) as fork:
        trial.hold(controls, Told(fork, told, BEGAN + seconds))
    told("trial", **trial.plain())


def go_on(session: Session, tried: tuple[Candidate, ...], told: Writer) -> None:
    """To the end of the run and its planned decay, as it is and with each candidate."""
    controls = SessionControls(session)
    with controls.fork(controls.step_seconds) as fork:
        for name, laid in {CONTROL: [], **{one.name: one.overlays(controls.step + 1) for one in tried}}.items():
            told("truth", arm=name, loss=fork.run(f"truth-{name}", laid, controls.rest, 0).heldout)


# -- the page ----------------------------------------------------------------------------------------------------------


class Tried(NamedTuple):
    """A candidate of one run, judged as if it had been alone."""

    setting: str
    seed: int
    judged: Judged
    among: Judged  # the same as one of all that this trial had
    truth: float | None  # by how much it ended above going on as before, at the end of the run, nats

    @property
    def whole(self) -> bool:
        """Whether all of its pairs were held."""
        return len(self.judged.gains) == SIZE.pairs

    @property
    def lost(self) -> bool:
        """Whether it did not win, and would not have won whatever the gain of a pair that is missing."""
        if self.whole:
            return not self.judged.won
        lacks = [*self.judged.gains, *[0.0] * (SIZE.pairs - len(self.judged.gains) - 1)]
        thirds = (step * GRAIN for step in range(round(FARTHEST / GRAIN)))
        return not any(judge("", [0.0] * SIZE.pairs, [*(-gain for gain in lacks), -third], 1).won for third in thirds)


@dataclass
class Healthy:
    """What the raw files say of one run: the losses that its arms ended with, in the order of pairs."""

    setting: str
    seed: int
    about: list[dict[str, Any]] = field(default_factory=list)
    ends: dict[str, dict[int, float]] = field(default_factory=dict)
    truths: dict[str, float] = field(default_factory=dict)

    def tried(self) -> Iterator[Tried]:
        """Those whose trial is decided."""
        control = self.ends.get(CONTROL, {})
        arms = [arm for arm in self.ends if arm != CONTROL]
        for arm in arms:
            held = sorted(control.keys() & self.ends[arm].keys())[: SIZE.pairs]
            if len(held) < SIZE.pairs - 1:
                continue
            before, ends = ([of[pair] for pair in held] for of in (control, self.ends[arm]))
            known = {arm, CONTROL} <= self.truths.keys()
            truth = self.truths[CONTROL] - self.truths[arm] if known else None
            alone, among = (judge(arm, before, ends, candidates) for candidates in (1, len(arms)))
            found = Tried(self.setting, self.seed, alone, among, truth)
            if found.whole or found.lost:
                yield found


def read(files: Iterable[Path]) -> list[Healthy]:
    """Every run in raw files of this script, and those of the pilot that held trials of this size."""
    runs: dict[tuple[str, int], Healthy] = {}
    for path in files:
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            setting = row["kind"] if "kind" in row else f"dense {row['size']} {row['optimizer']} (pilot)"
            one = runs.setdefault((setting, row["seed"]), Healthy(setting, row["seed"]))
            if row["t"] == "about":
                one.about.append(row)
            elif row["t"] == "truth":
                one.truths[row["arm"]] = row["loss"]
            elif row["t"] == "end":
                one.ends.setdefault(row["arm"], {})[row["pair"]] = row["loss"]
            elif row["t"] == "probed" and (row["h"], row["m"]) == SIZE[:2] and row["arm"] in {CONTROL, *PILOT}:
                one.ends.setdefault(row["arm"], {})[row["order"]] = row["sample"]
    return [runs[key] for key in sorted(runs)]


MEANING = (
    f"A trial: {SIZE.pairs} pairs of a candidate and going on as before, {SIZE.steps} steps each and then a probe of "
    f"{SIZE.probe}, on healthy runs of the preset `tiny` ({STEPS:,} steps of 512 tokens, Muon, forked behind step "
    f"{FORK}), and on those of the pilot that held trials of this size (lr x0.5 is left out there: it helps). "
    "Candidates of a run share its control. Gains are in nats a token of held-out text; above 0 is better. "
    "*Committed*: it won as the only candidate, with all that the product asks (`lumina.orchestrator.trial.judge`); "
    "*among all*: it won as one of those tried on that run. *Lower bound*: the highest of a trial, at 95 %, one-sided; "
    "above 0, a gain that is too small or too uneven is what keeps it from being committed. *Whole*: trials with all "
    f"pairs; the others lack the last, and no gain of it up to {FARTHEST:g} would have made them win, for one pair was "
    "not better than the control or the two were too small or too uneven. Only whole ones have a lower bound."
)


def page(runs: Sequence[Healthy], said: str) -> str:
    tried = [one for run in runs for one in run.tried()]
    count = len({(one.setting, one.seed) for one in tried})
    won = [one for one in tried if one.whole and one.judged.won]
    whole = sum(one.whole for one in tried)
    head = (
        f"{len(won)} of {len(tried)} trials ({whole} of them whole) of candidates that harm or do nothing, on {count} "
        "healthy runs, committed one."
    )
    lines = ["# Trials on healthy runs", "", f"**{head}{' ' if said else ''}{said}**", "", MEANING]
    parts = [table("What was tried", *rows(tried)), table("What would have been committed", *commits(won))]
    return "\n".join(lines) + "\n" + "".join(parts if won else parts[:1]) + f"\n## Where\n\n{machines(runs)}\n"


def rows(tried: Sequence[Tried]) -> tuple[list[str], list[list[str]]]:
    cells = []
    for setting, arm in sorted({(one.setting, one.judged.name) for one in tried}):
        mine = [one for one in tried if (one.setting, one.judged.name) == (setting, arm)]
        means = [one.judged.mean for one in mine]
        sd = f"{statistics.stdev(means):.4f}" if len(means) > 1 else "-"
        noise = statistics.fmean(one.judged.noise**2 for one in mine) ** 0.5
        whole = [one for one in mine if one.whole]
        low = f"{max(one.judged.low for one in whole):+.4f}" if whole else "-"
        numbers = [f"{statistics.fmean(means):+.4f}", sd, f"{noise:.4f}", low]
        won = [str(sum(one.judged.won for one in whole)), str(sum(one.among.won for one in whole))]
        cells.append([setting, arm, str(len(mine)), str(len(whole)), *numbers, *won])
    header = ["run", "candidate", "trials", "whole", "mean gain", "sd over runs", "sd of a pair", "lower bound"]
    return [*header, "committed", "among all"], cells


def commits(won: Sequence[Tried]) -> tuple[list[str], list[list[str]]]:
    header = ["run", "seed", "candidate", "gains", "mean", "lower bound", "among all", "gain at the end of the run"]
    cells = []
    for one in won:
        gains = " ".join(f"{gain:+.4f}" for gain in one.judged.gains)
        judged = [f"{one.judged.mean:+.4f}", f"{one.judged.low:+.4f}", "yes" if one.among.won else "no"]
        end = "-" if one.truth is None else f"{one.truth:+.4f}"
        cells.append([one.setting, str(one.seed), one.judged.name, gains, *judged, end])
    return header, cells


def machines(runs: Sequence[Healthy]) -> str:
    """Where the runs were made, in one line each."""
    said: dict[str, set[str]] = {}
    for run in runs:
        if any(run.tried()):
            for one in run.about:
                code = f"lumina {one['lumina']} at {one['commit']}, torch {one['torch']}, Python {one['python']}"
                where = f"{one['date'][:10]}, {one['machine']}, on {one['device']}, one thread each, {code}"
                said.setdefault(where, set()).add(f"{run.setting} seed {run.seed}")
    return "\n\n".join(f"{where}: {', '.join(sorted(names))}." for where, names in said.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("run", help="one run, and the trial on it")
    one.add_argument("kind", choices=CANDIDATES)
    one.add_argument("seed", type=int)
    one.add_argument("file", type=Path)
    one.add_argument("--candidates", default="", help="names, with commas between; usually all")
    one.add_argument("--seconds", type=float, default=1e9, help="after which it stops")
    one.add_argument("--size", default=",".join(map(str, SIZE)), help="steps, probe, pairs")
    one.add_argument("--truth", action="store_true", help="no trial: with each to the end of the run")
    one.add_argument("--commit", help="of the code, where it lies in no checkout")
    page_ = verbs.add_parser("report", help="a page from raw files")
    page_.add_argument("name")
    page_.add_argument("files", type=Path, nargs="+")
    page_.add_argument("--say", default="", help="what follows, in one sentence")
    asked = parser.parse_args()
    if asked.verb == "report":
        path = Path(__file__).parent / f"{asked.name}.md"
        path.write_text(page(read(asked.files), asked.say), encoding="utf-8")
        return
    names, size = [name for name in asked.candidates.split(",") if name], Size(*map(int, asked.size.split(",")))
    run(asked.kind, asked.seed, asked.file, names, asked.seconds, size, asked.truth, asked.commit)


if __name__ == "__main__":
    main()
