"""Which arms a gauntlet has, and all of them taken, several side by side."""

from __future__ import annotations

import math
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from lumina.errors import UserError
from lumina.verify.gauntlet.arms import Arm, Result, Root, lead, take, watches
from lumina.verify.gauntlet.cases import CASES, SOUND, Case, Suite
from lumina.verify.gauntlet.policies import POLICIES

HEALTHY_RUNS = 8  # of a kind, at least: their losses' standard deviation is sigma
WATCHED_ALONE = ("dense",)  # the kinds on which other policies are shown
SEEDS_OF_OTHERS = 2


def arms(
    suite: Suite, cases: Sequence[Case], kinds: Sequence[str], seeds: Sequence[int], modes: Sequence[str] = ("act",)
) -> list[Arm]:
    """All of them, each alone, too, and as many healthy runs of each kind as scoring faults needs."""
    names = {case.name for case in cases}
    every = suite.cases or [(case.name, kind) for case in cases for kind in case.kinds if case.name not in SOUND]
    pairs = [(CASES[name], kind) for name, kind in every if name in names and kind in kinds]
    if not suite.alone:
        return [
            Arm(case.name, kind, seed, mode, suite.name) for case, kind in pairs for seed in seeds for mode in modes
        ]
    faulty = dict.fromkeys((case.against, kind) for case, kind in pairs if case.fault)
    beside = dict.fromkeys((case.against, kind) for case, kind in pairs if case.fault or case.undone or case.sound)
    wanted = [Arm(against, kind, seed, "off", suite.name) for against, kind in beside for seed in seeds]
    for case, kind in pairs:
        who = [*([] if case.sound else ["off"]), *modes]
        wanted += [Arm(case.name, kind, seed, mode, suite.name) for seed in seeds for mode in who]
    more = [] if suite.sigma else range(1000, 1000 + max(0, HEALTHY_RUNS - len(set(seeds))))
    # For sigma alone: they come last.
    wanted += [Arm(against, kind, seed, "off", suite.name) for against, kind in faulty for seed in more]
    return list(dict.fromkeys(wanted))


def others(wanted: Sequence[Arm], seeds: Sequence[int]) -> list[Arm]:
    """The same under every other policy, for the kinds and the first of the seeds that they are shown on."""
    shown = [arm for arm in wanted if arm.mode == "off" and arm.case not in SOUND and arm.kind in WATCHED_ALONE]
    some = [arm for arm in shown if arm.seed in seeds[:SEEDS_OF_OTHERS]]
    return [replace(arm, mode=mode) for arm in some for mode in POLICIES]


def take_all(
    wanted: Sequence[Arm], workers: int, tell: Callable[[Result], None], known: Iterable[Result] = ()
) -> list[Result]:
    """All arms but those `known`, in so many processes; `tell` hears of each that is done. In the order of `wanted`.

    The healthy runs that they are forked from come first, as they are needed.
    """
    found = {result.arm: result for result in known}
    left = [arm for arm in wanted if arm not in found]
    waiting: dict[Root, list[Arm]] = {}
    for arm in left:
        waiting.setdefault(arm.root, []).append(arm)

    def done(result: Result) -> None:
        found[result.arm] = result
        tell(result)

    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory(prefix="lumina-healthy-") as folder:
        pool = ProcessPoolExecutor(workers, mp_context=context)
        leads: dict[Future[Path | None], Root] = {}
        running: set[Future[Result]] = set()
        try:
            while waiting or running:
                roots = iter([root for root in waiting if root not in leads.values()])
                while len(leads) + len(running) < 2 * workers and (root := next(roots, None)):
                    leads[pool.submit(lead, root, Path(folder) / str(hash(root)))] = root
                ready, _ = wait(leads, timeout=0)
                for healthy in ready:
                    mine, error = waiting.pop(leads.pop(healthy)), healthy.exception()
                    if isinstance(error, BrokenExecutor):
                        raise error
                    if error:
                        said = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                        for arm in mine:
                            done(Result(arm, math.inf, crashed=said, told=watches(arm.mode)))
                    else:
                        running |= {pool.submit(take, arm, healthy.result()) for arm in mine}
                under_way: list[Future[Any]] = [*leads, *running]
                wait(under_way, return_when=FIRST_COMPLETED)
                for one in [one for one in running if one.done()]:
                    running.discard(one)
                    done(one.result())
        finally:  # an interrupted one waits for what is being trained, and not for all that is to come
            pool.shutdown(cancel_futures=True)
    return [found[arm] for arm in wanted]
